"""What cannot be done is said: by patch, while running, or in the report."""

import diffusers
import peft
import pytest
import torch
from torch import nn

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_pipes import run_wan
from vidattn.methods.neighborhood import Neighborhood
from vidattn.pipelines import family
from vidattn.pipelines.families.positions import longest_video
from vidattn.pipelines.hooks.masks import key_mask, paired, unpaired
from vidattn.pipelines.steps import Count
from vidattn.schedule import DenseGuard


@pytest.fixture
def wan():
    return build("WanTransformer3DModel")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "neighbourhood"}, "did you mean 'neighborhood'"),
        ({"method": "neighborhood", "windows": 3}, "did you mean 'window'"),
        ({"method": Neighborhood(), "window": 3}, "belong to a method given by name"),
        ({"method": "radial", "density": 2.0}, "density must be"),
        (
            {"method": "radial", "density": "0.3"},
            "density of method .radial. must be a number or none, got",
        ),
        ({"method": "radial", "dense_layers": -1}, "dense_layers must be a count"),
        ({"method": "radial", "dense_layers": 1.5}, "dense_layers must be a count"),
        ({"method": "radial", "dense_steps": True}, "dense_steps must be a count"),
        ({"method": "radial", "dense_steps": "2"}, "dense_steps must be a count"),
        ({"method": "radial", "dense_steps": float("nan")}, "dense_steps must be a count"),
    ],
)
def test_bad_options(wan, options, words):
    with pytest.raises(ValueError, match=words):
        vidattn.patch(wan, **options)
    with pytest.raises(ValueError, match="not patched"):
        vidattn.unpatch(wan)


@torch.no_grad()
def test_fractions_of_steps_that_nobody_knows(wan):
    case = TINY["WanTransformer3DModel"]
    with vidattn.patch(wan, "neighborhood", window=3, dense_steps=0.5) as handle:
        with pytest.raises(ValueError, match="nothing says how many there are: run"):
            case.call(wan)
        with handle.generation(num_steps=2) as generation:
            for step in range(2):
                generation.at(step)
                case.call(wan)
        assert [layer.num_sparse for layer in handle.report().layers] == [0, 1]


PARALLEL = ("DataParallel", "DistributedDataParallel")


@pytest.mark.parametrize("wrapper", [*PARALLEL, "PeftModel"])
@torch.no_grad()
def test_wrapped_models(wan, wrapper, tmp_path):
    case = TINY["WanTransformer3DModel"]
    if wrapper == "PeftModel":
        wrapped = peft.get_peft_model(wan, peft.LoraConfig(target_modules=["to_q"]))
    else:
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        wrapped = getattr(nn.parallel, wrapper)(wan)
    try:
        dense = case.call(wrapped)
        handle = vidattn.patch(wrapped, "neighborhood", window=3, dense_layers=0)
        assert not torch.equal(case.call(wrapped), dense)
        assert handle.report().num_sparse == 2
        vidattn.unpatch(wrapped)
        assert torch.equal(case.call(wrapped), dense)
    finally:
        if wrapper != "PeftModel":
            torch.distributed.destroy_process_group()


def test_models_without_a_preset(wan):
    for pipe in (wan, tiny_pipes.wan()):
        with pytest.raises(ValueError, match="and no preset is for a WanTransformer3D"):
            vidattn.patch(pipe)


def test_published_models_get_their_preset(wan, monkeypatch):
    shape = family.Model("WanTransformer3DModel", 40, 40)
    monkeypatch.setattr("vidattn.pipelines.patch.shape_of", lambda model: shape)
    with vidattn.patch(tiny_pipes.wan()) as handle:
        assert handle.schedule.name == "schedule 'wan2.1-14b'"
        assert handle.schedule.guard.steps == 0.24
    with vidattn.patch(tiny_pipes.wan(two_experts=True), dense_steps=2) as handle:
        assert handle.schedule.name == "schedule 'wan2.2-a14b'" and handle.schedule.guard.steps == 2
    with pytest.raises(ValueError, match="presets wan2.1-14b and wan2.2-a14b both are for a WanTr"):
        vidattn.patch(wan)
    with pytest.raises(ValueError, match="the options .'density'. belong to a method"):
        vidattn.patch(tiny_pipes.wan(), density=0.3)


def test_twice(wan):
    vidattn.patch(wan, "radial")
    with pytest.raises(ValueError, match="patched already: call vidattn.unpatch first"):
        vidattn.patch(wan, "neighborhood")
    vidattn.unpatch(wan)
    vidattn.patch(wan, "neighborhood").remove()
    with pytest.raises(ValueError, match="not patched"):
        vidattn.unpatch(wan)


def test_a_pipeline_and_its_transformer():
    pipe = tiny_pipes.wan()
    handle = vidattn.patch(pipe, "radial")
    with pytest.raises(ValueError, match="patched already"):
        vidattn.patch(pipe.transformer, "radial")
    vidattn.unpatch(pipe.transformer)
    assert type(pipe) is diffusers.WanPipeline
    handle.remove()


def test_unknown_models():
    with pytest.raises(ValueError, match="unknown transformer 'Linear'.*WanTransformer3DM"):
        vidattn.patch(nn.Linear(2, 2), "radial")
    with pytest.raises(ValueError, match="cannot patch a str: give a diffusers pipeline"):
        vidattn.patch("Wan-AI/Wan2.1", "radial")


SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "sample_size": 8,
}
REFUSED = {
    "SanaVideoTransformer3DModel": (SANA, "its self-attention is linear"),
    "Kandinsky5Transformer3DModel": (
        {**TINY["Kandinsky5Transformer3DModel"].config, "attention_type": "nabla"},
        "sparse attention of its own",
    ),
    "LatteTransformer3DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_attention_heads": 1,
            "attention_head_dim": 8,
            "caption_channels": 8,
            "cross_attention_dim": 8,
            "norm_type": "ada_norm_single",
        },
        "within each frame and across time",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    config, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"{name} cannot be patched: .*{words}"):
        vidattn.patch(getattr(diffusers, name)(**config), "radial")


def test_a_pipeline_with_a_unet():
    class Pipe:
        components = {"unet": object.__new__(diffusers.UNetSpatioTemporalConditionModel)}

    nn.Module.__init__(Pipe.components["unet"])
    with pytest.raises(ValueError, match="cannot be patched: it attends within each frame"):
        vidattn.patch(Pipe(), "radial")


@torch.no_grad()
def test_a_model_that_does_not_attend(wan):
    class Linear:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return attn.to_v(hidden_states)

    wan.blocks[1].attn1.set_processor(Linear())
    with vidattn.patch(wan, "neighborhood", window=3, dense_layers=0):
        with pytest.raises(RuntimeError, match="blocks.1.attn1 cannot run sparse: it does not use"):
            TINY["WanTransformer3DModel"].call(wan)
    with vidattn.patch(wan, "neighborhood", window=3, dense_layers=0, strict=False) as handle:
        TINY["WanTransformer3DModel"].call(wan)
    layers = handle.report().layers
    assert layers[0].num_sparse == 1 and layers[1].num_sparse == 0
    assert "it does not use scaled_dot_product_attention" in layers[1].num_dense


@torch.no_grad()
def test_attention_that_was_replaced(wan, monkeypatch):
    def sage(query, key, value, **options):
        return value

    with vidattn.patch(wan, "neighborhood", window=3, dense_layers=0):
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", sage)
        with pytest.raises(RuntimeError, match="was replaced by tests.pipelines.test_errors.*sage"):
            TINY["WanTransformer3DModel"].call(wan)


@torch.no_grad()
def test_a_layer_that_never_runs(wan):
    class Identity(nn.Module):
        def forward(self, hidden_states, *args):
            return hidden_states

    with vidattn.patch(wan, "neighborhood", window=3) as handle:
        block, wan.blocks[1] = wan.blocks[1], Identity()
        with pytest.raises(RuntimeError, match="1 of 2 layers of transformer never attended"):
            TINY["WanTransformer3DModel"].call(wan)
        wan.blocks[1] = block
    with vidattn.patch(wan, "neighborhood", window=3, strict=False) as handle:
        wan.blocks[1] = Identity()
        TINY["WanTransformer3DModel"].call(wan)
        assert "never ran" in str(handle.report())
        wan.blocks[1] = block


@torch.no_grad()
def test_a_mask_that_no_plan_keeps():
    case = TINY["LTX2VideoTransformer3DModel"]
    model = build("LTX2VideoTransformer3DModel")
    mask = torch.rand(2, 114, 114)
    dense = case.call(model, video_self_attention_mask=mask)
    with vidattn.patch(model, "neighborhood", window=3, dense_layers=0):
        with pytest.raises(RuntimeError, match="cannot run sparse: its mask differs between"):
            case.call(model, video_self_attention_mask=mask)
    options = {"window": 3, "dense_layers": 0, "strict": False}
    with vidattn.patch(model, "neighborhood", **options) as handle:
        assert torch.equal(case.call(model, video_self_attention_mask=mask), dense)
    assert handle.report().num_sparse == 0
    assert "its mask differs between queries or heads" in str(handle.report())


@torch.no_grad()
def test_a_sequence_that_is_no_grid():
    case, model = TINY["LTX2VideoTransformer3DModel"], build("LTX2VideoTransformer3DModel")
    options = {"window": 3, "dense_layers": 0}
    # its rotary embedding comes from coordinates, so that it runs with sizes that are wrong
    with vidattn.patch(model, "neighborhood", **options):
        with pytest.raises(RuntimeError, match="114 keys do not fit the video of 9x5x7"):
            case.call(model, num_frames=9)
    dense = case.call(model)
    with vidattn.patch(model, "neighborhood", strict=False, **options):
        assert torch.equal(case.call(model, num_frames=9), dense)


def test_a_pipeline_whose_transformer_was_exchanged():
    pipe = tiny_pipes.wan()
    vidattn.patch(pipe, "radial")
    pipe.transformer = tiny_pipes.wan().transformer
    with pytest.raises(RuntimeError, match="is not the one that was patched"):
        run_wan(pipe)


@pytest.mark.parametrize("when", ["input", "output", "last"])
def test_nan_stops_the_generation(when):
    pipe = tiny_pipes.wan()
    step = {"input": 2, "output": 1, "last": 3}[when]

    def spoil(pipe, i, t, kwargs):
        if i == step - 1 and when == "input":
            kwargs["latents"] = kwargs["latents"] * float("inf")
        if i == step - 1 and when != "input":
            pipe.transformer.proj_out.weight.data.fill_(float("nan"))
        return kwargs

    words = {
        "input": "the latents were NaN or infinite at the start of step 3 of 4",
        "output": "the transformer gave NaN or infinity at step 2 of 4",
        "last": "the transformer gave NaN or infinity at step 4 of 4",
    }[when]
    with vidattn.patch(pipe, "neighborhood", window=3):
        with pytest.raises(FloatingPointError, match=words):
            # without guidance nothing runs after the last pass
            run_wan(pipe, callback_on_step_end=spoil, guidance_scale=1.0)


def test_guard_counts():
    guard = DenseGuard(layers=0.1, steps=0.1)
    assert [guard.num_steps(total) for total in (0, 1, 10, 30, 31)] == [0, 1, 1, 3, 4]
    assert guard.num_layers(25) == 3 and guard.needs_num_steps
    assert not DenseGuard(steps=3).needs_num_steps and DenseGuard(steps=3).num_steps(None) == 3
    assert not DenseGuard(steps=0.0).needs_num_steps


def test_steps_are_counted_by_time():
    def count(run, times):
        return [(run.follow(time), run.step)[1] for time in times]

    alone = Count()
    assert count(alone, (9, 9, 5, 5, 1, 9, 5)) == [0, 0, 1, 1, 2, 0, 1]
    assert count(alone, (7, 3)) == [0, 1]
    assert count(Count(), (0, 1, 2, 0)) == [0, 1, 2, 0]


def test_key_masks():
    keys = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    for mask in (keys[:, None, None], keys[:, None, None].expand(2, 4, 3, 3)):
        assert torch.equal(key_mask(mask, (2, 3), paired=False), keys)
    additive = torch.where(keys, 0.0, -10000.0)[:, None, None]
    assert torch.equal(key_mask(additive, (2, 3), paired=False), keys)
    both = keys[:, None, None] & keys[:, None, :, None]
    assert torch.equal(key_mask(both, (2, 3), paired=True), keys)
    with pytest.raises(ValueError, match="differs between queries"):
        key_mask(both, (2, 3), paired=False)
    with pytest.raises(ValueError, match="weighs scores"):
        key_mask(additive / 2e4, (2, 3), paired=False)
    wide = unpaired(torch.Tensor.repeat, (keys[:, None, None], 1, 1, 3, 1))
    assert wide.stride(2) == 0
    assert unpaired(torch.Tensor.__and__, (wide, wide.transpose(2, 3))) is wide
    assert torch.equal(paired(wide), both)


def test_ltx_coordinates():
    def place(*stretches):
        from tests.pipelines.tiny_inputs import coordinates

        return longest_video(coordinates(*stretches)[0])

    assert place((4, 3, 5, 0.0)) == ((4, 3, 5), 0)
    assert place((1, 3, 5, 8.0), (4, 3, 5, 0.0)) == ((4, 3, 5), 15)
    # reference frames behind the video begin at an earlier time
    assert place((4, 3, 5, 0.0), (2, 3, 5, 0.0)) == ((4, 3, 5), 0)
    assert place((1, 1, 1, 0.0)) == ((1, 1, 1), 0)
