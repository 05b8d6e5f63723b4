"""Pictures: stock pipelines in every step, every method on one frame, and what is refused."""

import diffusers
import pytest
import torch

import vidattn
from tests.pipelines.masked_softmax import MaskedSoftmax, relative_rms
from tests.pipelines.tiny import TINY, build
from vidattn.catalog import list_sparse_methods
from vidattn.methods import create_method
from vidattn.pipelines.families.positions import first_picture

FLUX = "FluxTransformer2DModel"
STEPS = 3


class StepSoftmax(MaskedSoftmax):
    """A masked softmax whose mask is another in each step of so many calls."""

    def __init__(self, case, plans, per_step):
        super().__init__(case, {})
        self.plans, self.per_step = plans, per_step

    def attention(self, *args, **kwargs):
        plan = self.plans[self.calls // self.per_step]
        self.masks = {self.case.num_video: plan.mask()[0, 0]}
        return super().attention(*args, **kwargs)


def stock(kind: type, key: str) -> object:
    """A pipeline of diffusers with a transformer and a scheduler, and nothing else."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    names = kind._get_signature_keys(kind)[0]
    parts = {"transformer": build(key), "scheduler": scheduler}
    pipe = kind(**(dict.fromkeys(names) | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(width: int, length: int = 6) -> torch.Tensor:
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(width))


# pipelines, with what each is called with and its attention calls in a step
PIPELINES = {
    "Flux": (
        diffusers.FluxPipeline,
        FLUX,
        lambda: {"prompt_embeds": embeds(16), "pooled_prompt_embeds": embeds(8)[:, 0]},
        2,
    ),
    # guided in one batch
    "SD3": (
        diffusers.StableDiffusion3Pipeline,
        "SD3Transformer2DModel/3.5",
        lambda: {
            "prompt_embeds": embeds(16),
            "negative_prompt_embeds": -embeds(16),
            "pooled_prompt_embeds": embeds(8)[:, 0],
            "negative_pooled_prompt_embeds": -embeds(8)[:, 0],
        },
        3,
    ),
    # guided in two calls, each with text of a length of its own
    "Qwen-Image": (
        diffusers.QwenImagePipeline,
        "QwenImageTransformer2DModel",
        lambda: {
            "prompt_embeds": embeds(16),
            "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
            "negative_prompt_embeds": embeds(16, 6),
            "negative_prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
            "true_cfg_scale": 4.0,
        },
        4,
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_windows_move_as_a_stock_pipeline_steps(name):
    kind, key, given, per_step = PIPELINES[name]
    pipe, case = stock(kind, key), TINY[key]

    def run():
        generator = torch.Generator().manual_seed(0)
        _, h, w = case.size
        size = {"height": 16 * h, "width": 16 * w, "num_inference_steps": STEPS}
        return pipe(**given(), **size, generator=generator, output_type="latent").images

    dense, method = run(), create_method("msw_msa", windows=(2, 3))
    plans = [method.in_step(step).plan(vidattn.Grid(*case.size)) for step in range(STEPS)]
    with StepSoftmax(case, plans, per_step) as reference:
        expected = run()
    assert reference.calls == per_step * STEPS
    with vidattn.patch(pipe, method, dense_layers=0, dense_steps=0) as handle:
        actual = run()
    assert handle.report().num_sparse == reference.calls
    assert relative_rms(actual, expected) < 1e-5 < 20e-5 < relative_rms(actual, dense)
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("name", sorted(set(list_sparse_methods()) - {"paro", "lvsa"}))
@torch.no_grad()
def test_every_method_reads_a_share_of_a_picture_or_all_of_it(name):
    model, case = build(FLUX), TINY[FLUX]
    dense, grid = case.call(model), vidattn.Grid(*case.size)
    for density in (0.4, 1.0):
        method = create_method(name).with_density(density, grid)
        with vidattn.patch(model, method, dense_layers=0) as handle:
            out = case.call(model)
        report = handle.report()
        assert report.density == pytest.approx(density, abs=0.12)
        assert (relative_rms(out, dense) < 1e-5) == (density == 1.0)
    assert torch.equal(case.call(model), dense)


@torch.no_grad()
def test_radial_reads_one_frame_whole_and_says_so():
    model, case = build(FLUX), TINY[FLUX]
    with vidattn.patch(model, "radial", dense_layers=0) as handle:
        assert relative_rms(case.call(model), model_output := case.call(model)) < 1e-5
    assert model_output.isfinite().all() and handle.report().density == 1


REFUSED = {
    "Flux2Transformer2DModel": ({"kv_cache_mode": "extract"}, "reference pictures are kept"),
    FLUX: (
        {"img_ids": torch.rand(143, 3).cumsum(0) * torch.tensor([0, 1, 1])},
        "are no raster of evenly spaced rows",
    ),
    "QwenImageTransformer2DModel": (
        {"img_shapes": [[(1, 11, 13)], [(1, 13, 11)]]},
        "all samples of a batch must have the same",
    ),
    "Lumina2Transformer2DModel": (
        {"encoder_attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])},
        r"its prompts have \[6, 3\] tokens",
    ),
    "ZImageTransformer2DModel": (
        {"x": [[torch.randn(4, 1, 22, 26)]] * 2},
        "ZImageOmniPipeline is not served",
    ),
    "HiDreamImageTransformer2DModel": (
        {"hidden_states": torch.randn(2, 143, 16), "img_sizes": [(11, 13), (13, 11)]},
        "its pictures have the sizes",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals(key):
    changes, words = REFUSED[key]
    model = build(key)
    with vidattn.patch(model, "neighborhood", window=3), pytest.raises(ValueError, match=words):
        TINY[key].call(model, **changes)


def test_positions_of_pictures():
    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(3) * 2.0, torch.arange(5) * 0.5)
    assert first_picture(rows, 4) == ((1, 3, 5), 4)
    # a reference that goes on to the right, and one of a later time
    for other in (rows + torch.tensor([0, 0, 2.5]), rows + torch.tensor([1.0, 0, 0])):
        assert first_picture(torch.cat([rows, other]), 0) == ((1, 3, 5), 0)
    # one that goes on below, at another distance
    with pytest.raises(ValueError, match="no raster"):
        first_picture(torch.cat([rows, rows + torch.tensor([0, 9.0, 0])]), 0)
    # rounded to half precision
    assert first_picture((rows * 0.3).bfloat16(), 0) == ((1, 3, 5), 0)
    assert first_picture(rows[:5], 0) == ((1, 1, 5), 0)
    assert first_picture(rows[:1], 0) == ((1, 1, 1), 0)
