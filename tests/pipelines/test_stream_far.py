"""A stream of AnyFlow-FAR is what its pipeline makes, with a past that does not grow."""

import dataclasses

import diffusers
import pytest
import torch
from torch.testing import assert_close

import vidattn
from tests.pipelines.tiny_inputs import WAN
from tests.pipelines.tiny_pipes import wan
from vidattn.pipelines.streaming.recipe import find_recipe

# 4 x 6 tokens to a frame, or 2 x 3 coarse ones
SIZE, LATENT, STEPS = (64, 96), (8, 12), 2
PARTITION = (1, 2, 2, 2, 2)
PROMPT = "a red boot"
pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "AnyFlowFARPipeline"), reason="not in this release of diffusers"
)


def far_pipe(limit=3):
    parts = wan().components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AnyFlowFARTransformer3DModel(
            **{**WAN, "in_channels": 16, "out_channels": 16, "rope_max_seq_len": 64},
            full_chunk_limit=limit,
            chunk_partition=PARTITION,
        ).eval()
        # as different from the fine ones as they may be
        torch.nn.init.normal_(model.far_patch_embedding.weight, std=0.1)
    pipe = diffusers.AnyFlowFARPipeline(
        transformer=model,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        **{name: parts[name] for name in ("tokenizer", "text_encoder", "vae")},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recipe_of(pipe, **changes):
    found = find_recipe(pipe.transformer, None)
    times = tuple(1000.0 - i for i in range(STEPS))
    return dataclasses.replace(found, times=times, size=SIZE, **changes)


def stream_of(pipe, policy="full", seed=7, **changes):
    """A stream with the noise that the pipeline draws for a seed."""
    recipe = recipe_of(pipe, **changes)
    stream = vidattn.stream(pipe, policy, prompt=PROMPT, recipe=recipe)
    shape = (1, 16, sum(PARTITION), *LATENT)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stream._maker._noise = lambda frames: noise[:, :, frames.start : frames.stop]
    return stream


def latents_of(stream, num_chunks=5):
    found = []

    def look(latents):
        found.append(latents)
        return latents.new_zeros(1, 1, 3, 1, 1)

    stream._decoder = look
    for _ in range(num_chunks):
        next(stream)
    return torch.cat(found, 2)


def stock(pipe, seed=7, **options):
    return pipe(
        PROMPT, height=SIZE[0], width=SIZE[1], num_frames=4 * sum(PARTITION) - 3,
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed),
        output_type="latent", **options,
    ).frames  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return far_pipe()


@pytest.fixture(scope="module")
def whole(pipe):
    """Latents of all chunks."""
    return latents_of(stream_of(pipe))


def test_full_is_the_pipeline(pipe, whole):
    assert recipe_of(pipe).chunk_at(0) == range(1) and recipe_of(pipe).chunk == 2
    assert_close(whole, stock(pipe), rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(pipe.transformer.rope)
    assert "forward" not in vars(pipe.transformer.patch_embedding)


def test_so_it_is_with_guidance_and_fewer_full_chunks():
    pipe = far_pipe(limit=2)
    found = latents_of(stream_of(pipe, guidance=3.0, negative_prompt="blurred"))
    expected = stock(pipe, guidance_scale=3.0, negative_prompt="blurred")
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_picture_is_the_first_frame(pipe):
    picture = torch.rand(1, 3, *SIZE)
    stream = stream_of(pipe)
    given = vidattn.stream(pipe, "full", prompt=PROMPT, recipe=recipe_of(pipe), start=picture)
    stream._maker._given = given._maker._given
    expected = stock(pipe, video=picture[None])
    assert_close(latents_of(stream), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "policy", ["rolling:window=12", "tempcache:window=12,similarity=1.0", "full+annsa:density=1.0"]
)
def test_a_policy_with_room_for_all_is_exact(pipe, whole, policy):
    assert_close(latents_of(stream_of(pipe, policy)), whole, rtol=1e-4, atol=1e-4)


def test_the_past_is_computed_anew_for_a_prompt(pipe, whole):
    stream = stream_of(pipe)
    found = [latents_of(stream, 4)]
    stream.switch(PROMPT)
    found.append(latents_of(stream, 1))
    assert_close(torch.cat(found, 2), whole, rtol=1e-4, atol=1e-4)
    stream.switch("a dog")
    assert set(stream._model._words) == {"cond"}


def test_nothing_grows_and_frames_go_on_behind_the_table(pipe):
    stream = vidattn.stream(pipe, "rolling:window=6,sink=1", prompt=PROMPT, recipe=recipe_of(pipe))
    latents_of(stream, 7)
    stream._frame = 2 * pipe.transformer.config.rope_max_seq_len
    assert latents_of(stream, 2).isfinite().all()
    assert len({(chunk.cache_tokens, chunk.cache_bytes) for chunk in stream.chunks[5:]}) == 1
    # coarse frames of the window but for those of a chunk, and two chunks in full
    assert stream.chunks[-1].cache_tokens == 4 * 6 + 4 * 24
    assert len(stream._past) <= 5


def test_sizes_have_whole_coarse_tokens(pipe):
    with pytest.raises(ValueError, match=r"tokens of 32x32 pixels: .* is \(64, 96\)"):
        vidattn.stream(pipe, "full", prompt=PROMPT, recipe=recipe_of(pipe), size=(64, 104))


def test_compiled_blocks_give_the_same(whole):
    pipe = far_pipe()
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert_close(latents_of(stream_of(pipe), 3), whole[:, :, :5], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
