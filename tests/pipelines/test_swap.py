"""Objects whose class is swapped: owners that come off in any order, and classes of others."""

import copy

import diffusers
import pytest
import torch

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.tiny_pipes import run_wan
from vidattn.pipelines.hooks.swap import marks, swap_in, swap_out


class Thing:
    def tell(self):
        return "own"


def louder(base):
    return {"tell": lambda self: "".join([base.tell(self), *marks(self)])}


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_owners_come_off_in_any_order(order):
    thing = Thing()
    for mark in "abc":
        swap_in(thing, louder, mark)
    assert thing.tell() == "ownabc" and copy.copy(thing).tell() == "own"
    left = "abc"
    for mark in order:
        swap_out(thing, mark)
        left = left.replace(mark, "")
        assert thing.tell() == f"own{left}"
    assert type(thing) is Thing and vars(thing) == {}


def test_a_class_of_somebody_else_on_top():
    thing = Thing()
    swap_in(thing, louder, "a")
    top = type("Thing", (type(thing),), {"tell": lambda self: super(top, self).tell().upper()})
    thing.__class__ = top
    assert thing.tell() == "OWNA"
    swap_out(thing, "a")
    assert type(thing) is top and thing.tell() == "OWN"
    swap_in(thing, louder, "b")
    assert thing.tell() == "OWNB"
    thing.__class__ = top.__mro__[1]
    swap_out(thing, "b")
    assert type(thing) is Thing


def second(pipe):
    """A pipeline with a transformer of its own and the other parts of another."""
    parts = pipe.components | {"transformer": tiny_pipes.wan().transformer}
    other = diffusers.WanPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def run(pipe):
    """A clip that goes through the text encoder and the VAE."""
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    return run_wan(pipe, output_type="pt", **size)


@pytest.mark.parametrize("first_off", [0, 1])
def test_pipelines_that_share_their_parts(first_off):
    pipes = [tiny_pipes.wan()]
    pipes.append(second(pipes[0]))
    before = [run(pipe) for pipe in pipes]
    kinds = [type(pipes[0].vae), type(pipes[0]), dict(vars(pipes[0].vae))]
    options = {"window": 1, "dense_layers": 0, "dense_steps": 0}
    handles = [vidattn.patch(pipe, "neighborhood", **options) for pipe in pipes]
    for i, other in ((0, 1), (1, 0)):
        run(pipes[i])
        # what is shared counts for the pipeline that ran
        report = handles[i].report()
        assert report.vae_ms > 0 and report.text_encoder_ms > 0
        mine = (report.vae_ms, report.text_encoder_ms)
        run(pipes[other])
        assert (handles[i].report().vae_ms, handles[i].report().text_encoder_ms) == mine
    handles[first_off].remove()
    assert torch.equal(run(pipes[first_off]), before[first_off])
    last = 1 - first_off
    assert not torch.equal(run(pipes[last]), before[last])
    assert handles[last].report().vae_ms > 0
    handles[last].remove()
    assert torch.equal(run(pipes[last]), before[last])
    assert kinds == [type(pipes[0].vae), type(pipes[0]), dict(vars(pipes[0].vae))]


def test_the_transformer_has_gone():
    pipe = tiny_pipes.wan()
    vidattn.patch(pipe, "radial")
    transformer, pipe.transformer = pipe.transformer, None
    vidattn.unpatch(pipe)
    assert type(pipe) is diffusers.WanPipeline and "_vidattn" not in vars(pipe.vae)
    pipe.transformer = transformer
    with pytest.raises(ValueError, match="this WanPipeline is not patched"):
        vidattn.unpatch(pipe)


def test_an_expert_that_is_put_in_later():
    pipe = tiny_pipes.wan(two_experts=True)
    expert, pipe.transformer_2 = pipe.transformer_2, None
    with vidattn.patch(pipe, "neighborhood", window=3):
        pipe.transformer_2 = expert
        with pytest.raises(RuntimeError, match="transformer_2 of this pipeline was put in after"):
            run_wan(pipe)
    pipe.transformer_2 = None
    with vidattn.patch(pipe, "neighborhood", window=3, strict=False):
        pipe.transformer_2 = expert
        run_wan(pipe)


def test_what_is_put_on_the_class_of_a_thing_outlives_ours():
    class Own(Thing):
        def tell(self):
            return "own"

    plain, thing, tell = Own(), Own(), Own.tell
    swap_in(thing, louder, "a")
    cls = type(thing)
    assert cls.tell is tell and Own() != thing
    cls.tell = lambda self: tell(self).upper()
    cls.note = 1
    assert (plain.tell(), thing.tell(), Own.note) == ("OWN", "OWNa", 1)
    swap_out(thing, "a")
    assert thing.tell() == "OWN"
    swap_in(thing, louder, "b")
    assert type(thing) is cls
    del type(thing).note
    cls.tell = tell
    assert (plain.tell(), thing.tell()) == ("own", "ownb") and not hasattr(Own, "note")


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("first_off", ["ours", "theirs"])
def test_a_call_that_others_put_into_the_class(first, first_off):
    # as caches do that wrap a pipeline's call, and as parallel attention replaces a processor's
    pipe, seen = tiny_pipes.wan(), []
    processor = pipe.transformer.blocks[0].attn1.processor
    originals = {cls: cls.__call__ for cls in (type(pipe), type(processor))}

    def put(thing):
        before = type(thing).__call__

        def call(self, *args, **kwargs):
            seen.append(type(self).__name__)
            return before(self, *args, **kwargs)

        type(thing).__call__ = call

    def take_off(thing):
        original = next(f for cls, f in originals.items() if isinstance(thing, cls))
        type(thing).__call__ = original

    try:
        handle = vidattn.patch(pipe, "radial", density=0.5) if first == "ours" else None
        put(pipe), put(processor)
        handle = handle or vidattn.patch(pipe, "radial", density=0.5)
        run_wan(pipe)
        assert {"WanPipeline", "WanAttnProcessor"} == set(seen) and handle.report().num_sparse
        seen.clear()
        if first_off == "theirs":
            take_off(pipe), take_off(processor)
            run_wan(pipe)
            assert not seen and handle.report().num_sparse
        handle.remove()
        run_wan(pipe)
        assert bool(seen) == (first_off == "ours")
        assert all(type(x) in originals for x in (pipe, processor))
    finally:
        for cls, function in originals.items():
            cls.__call__ = function
