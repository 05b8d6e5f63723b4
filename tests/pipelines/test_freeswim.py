"""Large videos by FreeSwim: both paths against a slow twin, and a pipeline that stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanVideoToVideoPipeline
from torch.overrides import TorchFunctionMode

import vidattn
from tests.pipelines import tiny_pipes
from vidattn.methods.freeswim import sharpness
from vidattn.pipelines.enlarging import enlarge, late_start, pad
from vidattn.pipelines.freeswim import FreeSwimPipeline

# 3 x 4 tokens; the large size has 5 x 7
TRAINED, LARGE = (48, 64), (80, 112)
CALL = {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0}


def run(pipe, height=LARGE[0], width=LARGE[1], prompt="a fox", call=CALL, **options):
    options = {"trained": TRAINED, "quantise": "none"} | options
    generator = torch.Generator().manual_seed(0)
    large = FreeSwimPipeline(pipe, **options)
    return large(prompt, height=height, width=width, generator=generator, output_type="pt", **call)


class Masked(TorchFunctionMode):
    """Self-attention over the video under a mask, at a scale of its own."""

    def __init__(self, mask, factor):
        super().__init__()
        self.mask, self.factor = mask, factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        if given["query"].shape[2] == given["key"].shape[2]:
            scale = self.factor * given["query"].shape[-1] ** -0.5
            given = given | {"attn_mask": self.mask, "scale": scale}
        return func(**given)


class SlowTwin:
    """A transformer with both paths, written plainly: passes are asked and unasked in turns."""

    def __init__(self, model, grid, cache_steps):
        self.model, self.inner, self.cache_steps = model, model.forward, cache_steps
        rows, columns = (x // 16 for x in TRAINED)
        self.window = vidattn.plan("freeswim", grid, window=(rows, columns)).mask()[0]
        self.factor, self.calls, self.given = sharpness(rows * columns), 0, {}
        for i, block in enumerate(model.blocks):
            block.attn2.register_forward_hook(lambda module, args, out, i=i: self.cross(i, out))
        model.forward = self.forward

    def cross(self, layer, out):
        if self.mode == "record":
            self.given[layer] = out
        return self.given[layer] if self.mode == "replace" else out

    def forward(self, *args, **kwargs):
        step, self.mode = self.calls // 2, "own"
        is_asked = self.calls % 2 == 0
        self.calls += 1
        if is_asked and step % self.cache_steps == 0:
            self.mode = "record"
            with Masked(None, self.factor):
                self.inner(*args, **kwargs)
        self.mode = "replace" if is_asked else "own"
        with Masked(self.window, self.factor):
            return self.inner(*args, **kwargs)


def attentive():
    """A pipeline whose tokens differ in what they ask of the text."""
    pipe = tiny_pipes.wan()
    for block in pipe.transformer.blocks:
        block.attn2.norm_q.weight.data.mul_(30)
        block.attn2.to_v.weight.data.mul_(5)
    return pipe


@pytest.mark.parametrize("cache_steps", [1, 2])
def test_both_paths_equal_a_slow_twin(cache_steps):
    pipe = attentive()
    found = run(pipe, strength=0.75, cache_steps=cache_steps)
    assert found.frames.shape == (1, 5, 3, *LARGE) and found.base.shape == (1, 5, 3, *TRAINED)
    twin = attentive()
    latents = _start(twin, found.base, 0.75)
    SlowTwin(twin.transformer, vidattn.Grid(2, 5, 7), cache_steps)
    with late_start(twin.scheduler, 0.75), torch.no_grad():
        expected = twin(
            "a fox", height=80, width=112, latents=latents, output_type="pt", **CALL
        ).frames
    assert (found.frames - expected).abs().max() < 1e-4
    # the paths differ, or this would show nothing
    alone = attentive()
    with (
        late_start(alone.scheduler, 0.75),
        vidattn.patch(alone, "freeswim", window=(3, 4), dense_layers=0, dense_steps=0),
    ):
        windows = alone("a fox", height=80, width=112, latents=latents, output_type="pt", **CALL)
    assert (found.frames - windows.frames).abs().max() > 1e-3


def _start(pipe, base, strength):
    """Latents of the enlarged clip with the noise that the run had."""
    generator = torch.Generator().manual_seed(0)
    # what the clip of the trained size took
    torch.randn(1, 16, 2, TRAINED[0] // 8, TRAINED[1] // 8, generator=generator)
    large = FreeSwimPipeline(pipe, trained=TRAINED, strength=strength)
    with torch.no_grad():
        latents = large._encode(pad(enlarge(base, LARGE), LARGE))
    return large._noise(latents, generator, CALL)[0]


def test_comes_off_bit_for_bit(monkeypatch):
    pipe, totals = tiny_pipes.wan(), []
    before = tiny_pipes.run_wan(pipe)
    progress_bar = type(pipe).progress_bar

    def told(self, iterable=None, total=None):
        totals.append(total)
        return progress_bar(self, iterable, total)

    monkeypatch.setattr(type(pipe), "progress_bar", told)
    run(pipe, tiling=True)
    # four steps, and 0.7 of them
    assert totals == [4, 2] and "progress_bar" not in vars(pipe)
    assert torch.equal(tiny_pipes.run_wan(pipe), before)
    assert not pipe.vae.use_tiling and "set_timesteps" not in vars(pipe.scheduler)
    modules = [m for m in pipe.transformer.modules() if "forward" in vars(m)]
    assert modules == [] and "forward" not in vars(pipe.transformer)


def test_odd_sizes_two_prompts_and_two_experts():
    pipe = tiny_pipes.wan(two_experts=True)
    found = run(pipe, height=75, width=101, prompt=["a fox", "an owl"], strength=1.0)
    assert found.frames.shape == (2, 5, 3, 75, 101)
    assert torch.isfinite(found.frames).all()
    large = FreeSwimPipeline(pipe, trained=TRAINED, quantise="none")
    assert found.cache_bytes == large.cache_bytes((5, 75, 101), num_videos=2)
    names = {layer.name.split(".")[0] for layer in found.report.layers if layer.num_sparse}
    assert names == {"transformer", "transformer_2"}


def test_eight_bits_are_enough():
    exact = run(attentive())
    small = run(attentive(), quantise="int8", cache_device="cpu")
    error = (exact.frames - small.frames).square().mean()
    assert 0 < error < 1e-4
    assert small.cache_bytes < 0.4 * exact.cache_bytes


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_late_start_is_that_of_video_to_video(kind, strength):
    pipe = tiny_pipes.wan()
    if kind == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler.set_timesteps(10)
    other = WanVideoToVideoPipeline(
        **{k: v for k, v in pipe.components.items() if k != "transformer_2"}
    )
    expected, count = other.get_timesteps(10, pipe.scheduler.timesteps, strength, "cpu")
    with late_start(pipe.scheduler, strength):
        pipe.scheduler.set_timesteps(10)
        assert torch.equal(pipe.scheduler.timesteps, expected)
        assert pipe.scheduler.num_inference_steps == count == len(pipe.scheduler.sigmas) - 1
    pipe.scheduler.set_timesteps(10)
    assert len(pipe.scheduler.timesteps) == 10


def test_enlarging_keeps_the_shape_of_things():
    clip = torch.zeros(1, 2, 3, 8, 8)
    clip[..., 2:6, 2:6] = 1
    large = enlarge(clip, (16, 32))
    assert large.shape == (1, 2, 3, 16, 32)
    # twice as wide as high: four times larger, and cut above and below
    assert large[0, 0, 0, 8, 16] == 1 and large[0, 0, 0, 8, 3] < 0.1
    padded = pad(large, (17, 35))
    assert torch.equal(padded[..., 16, :32], large[..., 15, :])


@pytest.mark.parametrize(
    "call, options, message",
    [
        ({"height": 48, "width": 64}, {}, "48 x 64 is not above the trained size of 48 x 64"),
        ({"height": 40}, {}, "not above the trained size"),
        ({}, {"trained": None}, "nobody knows the size that a model of 2 layers and 2 heads"),
        ({}, {"trained": (50, 64)}, "in multiples of .16, 16., got"),
        ({}, {"cache_gib": 1e-6}, "cache_gib is 1e-06: allow more"),
        ({}, {"strength": 0.0}, "strength must be above 0"),
        ({}, {"cache_steps": 0}, "cache_steps must be a positive integer"),
        ({}, {"quantise": "int2"}, "unknown quantise 'int2'"),
        ({"call": CALL | {"latents": None}}, {}, "takes no latents"),
    ],
)
def test_refused_before_anything_runs(call, options, message, monkeypatch):
    pipe = tiny_pipes.wan()
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(ValueError, match=message):
        run(pipe, **call, **options)


def test_other_pipelines_and_patched_ones_are_refused():
    with pytest.raises(ValueError, match="of a WanPipeline, got"):
        FreeSwimPipeline(tiny_pipes.cogvideox(), trained=TRAINED)
    pipe = tiny_pipes.wan()
    with vidattn.patch(pipe, "radial"), pytest.raises(ValueError, match="patched already"):
        run(pipe)
