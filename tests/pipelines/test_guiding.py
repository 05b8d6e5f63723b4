"""Guides against their formulas, which are applied to maps that a masked softmax forms."""

import pytest
import torch

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.masked_softmax import MaskedSoftmax, relative_rms
from tests.pipelines.tiny import TINY, build
from vidattn.guides import list_guides
from vidattn.pipelines.guiding import search_heads

WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
# alone, text behind, text in front, keys without queries
FAMILIES = [WAN, "HunyuanVideoTransformer3DModel", COGVIDEOX, "Cosmos3OmniTransformer"]
# text that attends alone; heads that are not told, of a picture and of a video
UNLIKE = [
    "QwenImage21Transformer2DModel",
    "Krea2Transformer2DModel",
    "Kandinsky6Transformer3DModel",
]
families = pytest.mark.parametrize("key", FAMILIES)


class Edited(MaskedSoftmax):
    """A masked softmax of the layers in turn, whose maps a function of layer and map edits."""

    def __init__(self, case, num_layers, change, masks=None):
        self.num_layers, self.change = num_layers, change
        everything = torch.ones(case.num_video, case.num_video, dtype=torch.bool)
        super().__init__(case, masks or {case.num_video: everything})

    def edit(self, weights, video):
        return self.change((self.calls - 1) % self.num_layers, weights.clone(), video, self.case)


def identity(heads, strength):
    """Rows of the video go to the identity in some heads, which are (layer, head)."""

    def change(layer, weights, video, case):
        silent = weights.shape[3] - weights.shape[2]
        rows = slice(video.start - silent, video.stop - silent)
        eye = torch.eye(weights.shape[3], dtype=weights.dtype)[video]
        for at, head in heads:
            if at == layer:
                weights[:, head, rows] = (1 - strength) * weights[:, head, rows] + strength * eye
        return weights

    return change


def fast(factor, low):
    """High frequencies of the rows along the frames, by a discrete Fourier transform."""

    def change(layer, weights, video, case):
        t, h, w = case.size
        part = weights[..., video].unflatten(-1, (t, h * w))
        places = torch.arange(t, dtype=weights.dtype)
        wave = torch.exp(-2j * torch.pi * places[:, None] * places / t)
        spectrum = torch.einsum("ft,...ts->...fs", wave, part.to(wave.dtype))
        share = torch.minimum(places, t - places) * 2 / t
        spectrum[..., share > low, :] *= factor
        back = torch.einsum("tf,...fs->...ts", wave.conj() / t, spectrum).real
        weights[..., video] = back.flatten(-2)
        return weights

    return change


def steady(anchor, share):
    """Maps behind a layer go to that of the layer."""
    seen = {}

    def change(layer, weights, video, case):
        if layer == anchor:
            seen["map"] = weights
        elif layer > anchor:
            weights = (1 - share) * weights + share * seen["map"]
        return weights

    return change


def both(first, second):
    return lambda *seen: second(seen[0], first(*seen), *seen[2:])


def expected(key, model, change, masks=None):
    """What a transformer gives with edited maps, and how many of them there were."""
    case, num_layers = TINY[key], len(layers_of(model))
    with Edited(case, num_layers, change, masks) as mode:
        out = case.call(model)
    assert mode.calls == num_layers
    return out


def layers_of(model):
    with vidattn.patch(model, "dense") as handle:
        return handle.sites[0].layers


@families
@torch.no_grad()
def test_away_from_a_pass_with_weaker_heads(key):
    model, call = build(key), TINY[key].call
    plain = call(model)
    last = len(layers_of(model)) - 1
    perturbed = expected(key, model, identity([(0, 1), (last, 0)], 0.7))
    with vidattn.guide(model, "softpag", heads=("0:1", f"{last}:0"), strength=0.7, scale=2.0):
        out = call(model)
    assert relative_rms(out - plain, 2 * (plain - perturbed)) < 1e-3
    assert (out - plain).abs().max() > 1e-3
    assert torch.equal(call(model), plain) and not model._forward_hooks


@families
@torch.no_grad()
def test_more_of_what_changes_fast(key):
    model, call = build(key), TINY[key].call
    plain = call(model)
    wanted = expected(key, model, fast(3.0, 0.5))
    with vidattn.guide(model, "broadway", motion=3.0, low=0.5, steps=(0, 1)):
        out = call(model)
    assert relative_rms(out, wanted) < 1e-5
    assert (out - plain).abs().max() > 1e-3
    assert torch.equal(call(model), plain)


@torch.no_grad()
def test_later_layers_go_to_an_earlier_one():
    model, call = build(WAN), TINY[WAN].call
    plain = call(model)
    wanted = expected(WAN, model, both(fast(2.0, 0.25), steady(0, 0.6)))
    with vidattn.guide(model, "broadway", motion=2.0, consistency=0.6, anchor=0, steps=(0, 1)):
        out = call(model)
    # the enhancement is of the sum of both maps, whose order does not matter
    assert (out - plain).abs().max() > 1e-3
    assert relative_rms(out, wanted) < 1e-5


@torch.no_grad()
def test_an_anchor_that_runs_too_late_is_refused():
    model = build("WanVACETransformer3DModel")
    with vidattn.guide(model, "broadway", consistency=0.5, anchor=0, steps=(0, 1)):
        with pytest.raises(ValueError, match="runs before layer 0: give another anchor"):
            TINY["WanVACETransformer3DModel"].call(model)


@torch.no_grad()
def test_a_patch_stays_sparse():
    model, case = build(WAN), TINY[WAN]
    plan = vidattn.plan("neighborhood", vidattn.Grid(*case.size), window=(3, 3, 5))
    masks = {case.num_video: plan.mask()[0, 0]}
    wanted = expected(WAN, model, fast(3.0, 0.25), masks)
    weaker = expected(WAN, model, identity([(1, 0), (1, 1)], 1.0), masks)
    with vidattn.patch(model, "neighborhood", window=(3, 3, 5), dense_layers=0) as handle:
        sparse = case.call(model)
        with vidattn.guide(model, "broadway", motion=3.0, steps=(0, 1)):
            assert relative_rms(case.call(model), wanted) < 1e-5
        with vidattn.guide(model, "softpag:heads=1,scale=0.5"):
            out = case.call(model)
        assert relative_rms(out - sparse, 0.5 * (sparse - weaker)) < 1e-3
        assert torch.equal(case.call(model), sparse)
        assert handle.report().layers[0].density == pytest.approx(plan.density)


def second_pass(pipe, change, scale, rows, steps=range(9)):
    """Have the transformer of a pipeline add a guide by its formula to ``rows`` of a batch."""
    model, seen = pipe.transformer, []
    case = TINY[type(model).__name__]
    forward, context = model.forward, type(model).cache_context

    def cache_context(name, **options):
        seen.append(name)
        return context(model, name, **options)

    def guided(*args, **given):
        (out,) = forward(*args, **given, **{} if "return_dict" in given else {"return_dict": False})
        if seen[-1] != "uncond" and (len(set(times + [float(given["timestep"][0])])) - 1) in steps:
            size = tuple(given["hidden_states"].shape)
            with Edited(shaped(case, model, size), len(layers_of_plain), change):
                (weaker,) = forward(*args, **given)
            out = torch.cat([out[:rows], out[rows:] + scale * (out - weaker)[rows:]])
        times.append(float(given["timestep"][0]))
        return (out,)

    times, layers_of_plain = [], layers_of(model)
    model.forward, model.cache_context = guided, cache_context
    return lambda: [vars(model).pop(name) for name in ("forward", "cache_context")]


def shaped(case, model, size):
    """A case with the grid of latents of a size."""
    import dataclasses

    axes = size[2:] if type(model).__name__ == WAN else (size[1], *size[3:])
    return dataclasses.replace(case, size=(axes[0], axes[1] // 2, axes[2] // 2))


@pytest.mark.parametrize("steps", [(0.0, 1.0), (0.25, 0.75)])
def test_passes_without_the_prompt_stay(steps):
    pipe = tiny_pipes.wan()
    plain = tiny_pipes.run_wan(pipe, guidance_scale=3.0)
    at = range(int(steps[0] * 4), int(steps[1] * 4))
    undo = second_pass(pipe, identity([(1, 1)], 1.0), 1.5, 0, at)
    wanted = tiny_pipes.run_wan(pipe, guidance_scale=3.0)
    undo()
    with vidattn.guide(pipe, "softpag", heads=("1:1",), scale=1.5, steps=steps):
        out = tiny_pipes.run_wan(pipe, guidance_scale=3.0)
    assert (out - plain).abs().max() > 1e-3
    assert relative_rms(out, wanted) < 1e-4
    assert torch.equal(tiny_pipes.run_wan(pipe, guidance_scale=3.0), plain)


def test_of_a_batch_with_both_the_half_with_the_prompt_is_guided():
    pipe = tiny_pipes.cogvideox()
    plain = tiny_pipes.run_joint(pipe, guidance_scale=3.0)
    undo = second_pass(pipe, identity([(0, 1)], 1.0), 1.5, 1)
    wanted = tiny_pipes.run_joint(pipe, guidance_scale=3.0)
    undo()
    with vidattn.guide(pipe, "softpag", heads=("0:1",), scale=1.5):
        out = tiny_pipes.run_joint(pipe, guidance_scale=3.0)
    assert (out - plain).abs().max() > 1e-3
    assert relative_rms(out, wanted) < 1e-4


def test_two_experts_and_two_prompts():
    pipe = tiny_pipes.wan(two_experts=True)
    plain = tiny_pipes.run_wan(pipe)
    with vidattn.guide(pipe, "broadway", motion=2.0, steps=(0, 1)):
        out = tiny_pipes.run_wan(pipe)
        two = tiny_pipes.run_wan(pipe, num_videos_per_prompt=2)
    assert (out - plain).abs().max() > 1e-3 and two.shape[0] == 2
    assert torch.equal(tiny_pipes.run_wan(pipe), plain)


@pytest.mark.parametrize("key", [WAN, *UNLIKE])
@pytest.mark.parametrize("name", list_guides())
@torch.no_grad()
def test_every_guide_comes_off(name, key):
    model, call = build(key), TINY[key].call
    with vidattn.patch(model, "neighborhood", window=3, dense_layers=0):
        plain = call(model)
        with vidattn.guide(model, name, steps=(0, 1)):
            out = call(model)
        # a picture has no motion
        acts = name == "softpag" or TINY[key].size[0] > 1
        assert out.isfinite().all() and ((out - plain).abs().max() > 1e-4) == acts
        assert torch.equal(call(model), plain)


@torch.no_grad()
def test_unpatching_ends_it():
    model, call = build(WAN), TINY[WAN].call
    plain = call(model)
    handle = vidattn.patch(model, "neighborhood", window=(3, 3, 5), dense_layers=0)
    guidance = vidattn.guide(model, "softpag")
    handle.remove()
    assert torch.equal(call(model), plain) and not model._forward_hooks
    guidance.remove()
    assert torch.equal(call(model), plain)


@torch.no_grad()
def test_the_search_tries_every_head_and_keeps_the_best():
    model, call = build(WAN), TINY[WAN].call
    with vidattn.guide(model, "softpag", heads=("1:1", "0:0")):
        target = call(model)
    found = search_heads(model, lambda: -(call(model) - target).square().mean().item(), rounds=2)
    alone = {x.heads: x.score for x in found if len(x.heads) == 1}
    assert set(alone) == {("0:0",), ("0:1",), ("1:0",), ("1:1",)}
    best = max(alone, key=alone.get)
    pairs = {x.heads for x in found} - set(alone)
    assert pairs == {(*best, head) for (head,) in alone if (head,) != best}
    assert set(found[0].heads) == {"1:1", "0:0"} and found[0].score == 0
    assert [x.score for x in found] == sorted((x.score for x in found), reverse=True)
    few = search_heads(model, lambda: 1.0, rounds=3, candidates=("0:1",))
    assert [x.heads for x in few] == [("0:1",)]


@pytest.mark.parametrize(
    ("guide", "options", "words"),
    [
        ("softpga", {}, "unknown guide 'softpga': did you mean 'softpag'"),
        ("softpag", {"head": ("0:1",)}, "unknown option of guide 'softpag' 'head'"),
        ("softpag", {"heads": ("0:2",)}, r"heads has '0:2', and the model has layers 0 to 1 of 2"),
        ("softpag", {"heads": ("2",)}, "heads has '2', and the model has layers 0 to 1"),
        ("softpag", {"heads": ("a:b",)}, "heads must be LAYER:HEAD or LAYER each, as 2:0"),
        ("softpag", {"heads": ()}, "heads must be such as"),
        ("softpag", {"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ("softpag", {"scale": float("nan")}, "scale must be above 0, got nan"),
        ("softpag:scale=1", {"scale": 1}, "has the options .'scale'. already"),
        ("broadway", {"motion": 0.5}, "motion must be at least 1, got 0.5"),
        ("broadway", {"low": 1}, "low must be from 0 to below 1"),
        ("broadway", {"consistency": 0.5, "anchor": 1}, "anchor is layer 1, and those with"),
        ("broadway", {"steps": (0.5, 0.2)}, "steps must be two parts of the denoising steps"),
        (None, {"scale": 1}, "belong to a guide given by name"),
    ],
)
def test_bad_options_leave_the_model_alone(guide, options, words):
    from vidattn.guides.softpag import SoftPAG

    model = build(WAN)
    with pytest.raises(ValueError, match=words):
        vidattn.guide(model, SoftPAG() if guide is None else guide, **options)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_what_it_cannot_do_is_refused():
    model, call = build(WAN), TINY[WAN].call
    with vidattn.guide(model, "softpag"):
        with pytest.raises(ValueError, match="transformer is guided already"):
            vidattn.guide(model, "broadway")
        with pytest.raises(RuntimeError, match="guided, which is not for training"):
            call(model)
    with vidattn.guide(model, "broadway"), torch.no_grad():
        with pytest.raises(ValueError, match="nothing says how many there are"):
            call(model)
    with pytest.raises(ValueError, match="unknown transformer 'Linear'"):
        vidattn.guide(torch.nn.Linear(2, 2), "softpag")
    pipe = tiny_pipes.wan()
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with vidattn.guide(pipe, "softpag"):
        with pytest.raises(RuntimeError, match="a step cache, which would serve both passes"):
            tiny_pipes.run_wan(pipe)
