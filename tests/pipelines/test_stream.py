"""A stream is the video of a causal model, made chunk by chunk."""

import dataclasses

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch.testing import assert_close

import vidattn
from tests.pipelines.causal_wan import velocity
from tests.pipelines.stream_cases import (
    HEADS,
    LATENT,
    RECIPE,
    SIZE,
    causal_pipe,
    causal_state,
    embed,
    slow_latents,
)
from vidattn.pipelines.streaming.decode import denormalise, encode
from vidattn.pipelines.streaming.recipe import RECIPES, Recipe, find_recipe
from vidattn.pipelines.streaming.stream import Stream

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PROMPT = "a red boot"


@pytest.fixture(scope="module")
def pipe():
    return causal_pipe()


@pytest.fixture(scope="module")
def slow(pipe):
    """Latents of four chunks, each step a pass over the whole video under a mask."""
    return slow_latents(pipe, PROMPT, 4, seed=5)


def latents_of(stream: Stream, num_chunks: int) -> torch.Tensor:
    """(C, F, h, w) float64 latents of the next chunks, which are not decoded."""
    found = []

    def look(latents):
        found.append(latents[0].double())
        return latents.new_zeros(1, 1, 3, 1, 1)

    stream._decoder = look
    for _ in range(num_chunks):
        next(stream)
    return torch.cat(found, 1)


def test_a_stream_is_the_causal_model_over_the_whole_video(pipe, slow):
    found = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, seed=5), 4)
    assert found.shape == (16, 8, *LATENT)
    assert_close(found, slow, **TOLERANCE)


def test_frames_are_those_of_the_whole_video_decoded_at_once(pipe, slow):
    stream = vidattn.stream(pipe, "full", prompt=PROMPT, seed=5, num_frames=21)
    chunks = list(stream)
    assert [len(chunk) for chunk in chunks] == [5, 8, 8]
    latents = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, seed=5), 3)
    with torch.no_grad():
        at_once = pipe.vae.decode(denormalise(latents[None].float(), pipe.vae)).sample[0]
    expected = (at_once.transpose(0, 1) / 2 + 0.5).clamp(0, 1)
    assert_close(torch.cat(chunks), expected, rtol=0, atol=1e-6)
    with pytest.raises(StopIteration):
        next(stream)


def test_decoding_in_tiles_is_that_of_the_autoencoder(pipe):
    latents = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT), 1)
    pipe.vae.enable_tiling(32, 64, 16, 48)
    try:
        found = torch.cat(list(vidattn.stream(pipe, "full", prompt=PROMPT, num_frames=5)))
        with torch.no_grad():
            at_once = pipe.vae.decode(denormalise(latents[None].float(), pipe.vae)).sample[0]
    finally:
        pipe.vae.disable_tiling()
    assert_close(found, (at_once.transpose(0, 1) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_a_first_chunk_may_have_another_length(pipe):
    recipe = dataclasses.replace(RECIPE, first=1, sampler="euler")
    found = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, recipe=recipe), 3)
    assert found.shape[1] == 5
    assert_close(found, slow_latents(pipe, PROMPT, 3, recipe), **TOLERANCE)


def test_guidance_has_a_cache_of_its_own(pipe):
    recipe = dataclasses.replace(RECIPE, guidance=3.0, negative_prompt="blurred")
    found = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, recipe=recipe), 3)
    expected = slow_latents(pipe, PROMPT, 3, recipe, guidance_prompt="blurred")
    assert_close(found, expected, **TOLERANCE)


def test_the_scheduler_of_a_pipeline_may_lead(pipe, monkeypatch):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    recipe = dataclasses.replace(RECIPE, times=(3.0, 2.0, 1.0), sampler="scheduler")
    found = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, recipe=recipe), 2)
    # that of the pipeline is left alone
    assert len(scheduler.timesteps) == 1000
    scheduler.set_timesteps(3)
    times = tuple(scheduler.timesteps.tolist())
    euler = dataclasses.replace(recipe, times=times, shift=1.0, sampler="euler")
    expected = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, recipe=euler), 2)
    assert_close(found, expected, **TOLERANCE)


def test_a_window_is_that_of_a_mask_over_frames(pipe):
    policy = "rolling:window=6,sink=1,sink_at=absolute"
    stream = vidattn.stream(pipe, policy, prompt=PROMPT, seed=1)
    found = latents_of(stream, 5)
    # what the last chunk is made of, from the clean frames before it
    frames, state = torch.arange(10), causal_state()
    chunk = frames // 2
    near = frames[None] >= 2 * chunk[:, None] - 3
    visible = (chunk[:, None] >= chunk[None]) & (near | (frames < 1))
    noisy = torch.randn(16, 2, *LATENT).double()
    text = embed(pipe, PROMPT)
    times = torch.tensor([0.0] * 8 + [700.0] * 2)
    video = torch.cat([found[:, :8], noisy], 1)
    expected = velocity(state, video, times, text, [2] * 5, HEADS, visible)[:, 8:]
    again = vidattn.stream(pipe, policy, prompt=PROMPT, seed=1)
    latents_of(again, 4)
    with again._model.running():
        out = again._model.velocity(noisy[None].float(), 700.0, range(8, 10))[0]
    assert_close(out.double(), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "policy",
    [
        "rolling:window=12",
        "tempcache:window=16",
        "ema_sink:window=12",
        "full+annsa:density=1.0,block=16",
        "full+annca:keep=1.0",
    ],
)
def test_a_policy_with_room_for_all_is_exact(pipe, slow, policy):
    found = latents_of(vidattn.stream(pipe, policy, prompt=PROMPT, seed=5), 3)
    assert_close(found, slow[:, :6], **TOLERANCE)


def test_nothing_grows_over_a_long_video(pipe):
    stream = vidattn.stream(pipe, "tempcache:window=8,sink=1", prompt=PROMPT)
    latents_of(stream, 12)
    last = stream.chunks[6:]
    assert len({(chunk.cache_tokens, chunk.cache_bytes) for chunk in last}) == 1
    assert last[0].cache_tokens <= 6 * 15
    assert len(stream._past) <= 6


def test_frames_go_on_behind_the_table_of_the_model(pipe):
    stream = vidattn.stream(pipe, "rolling:window=6,sink=1", prompt=PROMPT)
    latents_of(stream, 1)
    stream._frame = 2 * pipe.transformer.rope.max_seq_len
    assert torch.isfinite(latents_of(stream, 2)).all()


def test_a_pipeline_is_left_as_it_was(pipe):
    processors = [type(block.attn1.processor) for block in pipe.transformer.blocks]
    options = {"num_inference_steps": 1, "output_type": "latent", "num_frames": 5}

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, height=SIZE[0], width=SIZE[1], generator=generator, **options).frames

    before = run()
    one = vidattn.stream(pipe, "full", prompt=PROMPT, seed=5)
    other = vidattn.stream(pipe, "rolling:window=6,sink=1", prompt="a dog", seed=6)
    alone = latents_of(vidattn.stream(pipe, "full", prompt=PROMPT, seed=5), 2)
    first = latents_of(one, 1)
    latents_of(other, 1)
    # in the middle of two videos, of which one is never ended
    assert_close(run(), before, rtol=0, atol=0)
    assert_close(torch.cat([first, latents_of(one, 1)], 1), alone, rtol=0, atol=0)
    assert [type(block.attn1.processor) for block in pipe.transformer.blocks] == processors
    assert "forward" not in vars(pipe.transformer.rope)


def test_a_failing_chunk_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    stream = vidattn.stream(pipe, "full", prompt=PROMPT)
    processors = [type(block.attn1.processor) for block in pipe.transformer.blocks]
    monkeypatch.setattr(stream._model._reader, "attend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert [type(block.attn1.processor) for block in pipe.transformer.blocks] == processors
    assert "forward" not in vars(pipe.transformer.rope)


@pytest.mark.parametrize("at", ["velocity", "commit"])
def test_an_interrupted_chunk_is_made_again(pipe, slow, monkeypatch, at):
    stream = vidattn.stream(pipe, "full", prompt=PROMPT, seed=5)
    latents_of(stream, 2)
    owner = stream._model if at == "velocity" else stream._model.caches[1]
    with monkeypatch.context() as patch:
        patch.setattr(owner, at, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert_close(latents_of(stream, 2), slow[:, 4:], **TOLERANCE)


def test_a_prompt_may_change_with_the_past_or_without(pipe):
    plain, kept, anew = (
        vidattn.stream(pipe, "full", prompt=prompt, seed=5) for prompt in (PROMPT, PROMPT, "a dog")
    )
    past = latents_of(kept, 2)
    kept.switch("a dog", recache=False)
    with_past = latents_of(kept, 1)
    switched = vidattn.stream(pipe, "full", prompt=PROMPT, seed=5)
    latents_of(switched, 2)
    switched.switch("a dog")
    recached = latents_of(switched, 1)
    assert (with_past - recached).abs().max() > 3e-4
    assert (with_past - latents_of(plain, 3)[:, 4:]).abs().max() > 1e-3
    # a video of the new prompt, which begins with the frames of the old one
    anew._maker._given = past.float()[None]
    latents_of(anew, 2)
    for _ in range(4):
        anew._maker._noise(range(2))
    assert_close(latents_of(anew, 1), recached, **TOLERANCE)


def test_a_recache_goes_back_as_far_as_the_policy():
    pipe = causal_pipe()
    stream = vidattn.stream(pipe, "rolling:window=6,sink=2", prompt=PROMPT)
    latents_of(stream, 6)
    held = stream._model.caches[0].held
    stream.switch("a dog")
    assert sorted(stream._model.caches[0].held) == sorted(held) == [0, 1, 10, 11]


def test_a_video_goes_on_from_given_frames(pipe):
    start = torch.rand(9, 3, *SIZE)
    stream = vidattn.stream(pipe, "full", prompt=PROMPT, start=start, seed=2)
    found = latents_of(stream, 3)
    given = encode(start[None], pipe.vae)[0].double()
    assert_close(found[:, :3], given, rtol=1e-5, atol=1e-5)
    # one frame of the second chunk is given: its first step, at times of each token
    state, generator = causal_state(), torch.Generator().manual_seed(2)
    noise = torch.randn(1, 16, 2, *LATENT, generator=generator)[0].double()
    video = torch.cat([given, noise[:, 1:]], 1)
    times, text = torch.tensor([0.0, 0.0, 0.0, 1000.0]), embed(pipe, PROMPT)
    out = velocity(state, video, times, text, [2, 2], HEADS)[:, 3:]
    again = torch.randn(1, 16, 2, *LATENT, generator=generator)[0].double()[:, 1:]
    level = RECIPE.levels[1]
    noisy = (1 - level) * (noise[:, 1:] - out) + level * again
    times[3] = 1000 * level
    out = velocity(state, torch.cat([given, noisy], 1), times, text, [2, 2], HEADS)[:, 3:]
    assert_close(found[:, 3:4], noisy - level * out, rtol=1e-3, atol=1e-3)


def test_a_picture_is_the_first_frame(pipe):
    picture = torch.rand(1, 3, *SIZE)
    video = next(vidattn.stream(pipe, "full", prompt=PROMPT, start=picture))
    with torch.no_grad():
        latents = encode(picture[None], pipe.vae)
        expected = pipe.vae.decode(denormalise(latents, pipe.vae)).sample[0, :, 0]
    assert_close(video[0], (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 10}, "nearest are 5 and 13"),
        ({"num_frames": 3}, "nearest are 5 and 13"),
        ({"num_frames": 0}, "num_frames must be"),
        ({"size": (48, 90)}, r"nearest that does is \(48, 96\)"),
        ({"size": 80}, "a height and a width"),
        ({"prompt": " "}, "prompt must say"),
        ({"start": torch.rand(2, 3, *SIZE)}, "nearest are 1 and 5"),
        ({"start": torch.rand(1, 3, 8, 8)}, "start must be frames"),
        ({"policy": "rolling:window=4"}, "give window=6 or more"),
        ({"policy": "rolling:cap=70"}, "the cache may hold 70 tokens .* needs 90"),
        ({"policy": "rollin"}, "did you mean 'rolling'"),
        ({"recipe": "self-forced"}, "did you mean 'self-forcing'"),
        ({"recipe": 3}, "recipe must be"),
        ({"size": ()}, "a height and a width"),
        ({"seed": None}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        (
            {"start": torch.zeros(1, 3, *SIZE, dtype=torch.uint8)},
            "got torch.uint8",
        ),
        ({"start": torch.full((1, 3, *SIZE), 255.0)}, "got torch.float32 from 255 to 255"),
        ({"start": torch.full((1, 3, *SIZE), torch.nan)}, "numbers from 0 to 1"),
        ({"start": torch.rand(9, 3, *SIZE), "num_frames": 5}, "is to have 5 in all"),
        ({"policy": "rolling:window=8,window=9"}, "says window twice"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        vidattn.stream(pipe, **{"policy": "full", "prompt": PROMPT, **options})


def test_a_bidirectional_model_is_told_what_is_needed():
    pipe = causal_pipe(recipe=None)
    with pytest.raises(ValueError, match="3 heads is bidirectional .* scripts/convert_causal.py"):
        vidattn.stream(pipe, prompt=PROMPT)
    assert vidattn.stream(pipe, prompt=PROMPT, recipe=RECIPE).recipe is RECIPE


def test_what_holds_the_attention_already_is_refused(pipe):
    with vidattn.patch(pipe, "dense"), pytest.raises(ValueError, match="call vidattn.unpatch"):
        vidattn.stream(pipe, prompt=PROMPT)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.1))
    try:
        with pytest.raises(ValueError, match="disable_cache"):
            vidattn.stream(pipe, prompt=PROMPT)
    finally:
        pipe.transformer.disable_cache()


def test_a_recipe_is_saved_with_the_weights(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    assert find_recipe(model, None) == RECIPE


def test_a_recipe_of_whole_numbers_is_read_again(pipe, tmp_path, monkeypatch):
    recipe = Recipe(chunk=2, times=(1000, 500), size=[48, 80])
    assert recipe == RECIPE
    pipe.transformer.save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    model.register_to_config(**dataclasses.replace(recipe, times=(900, 100)).to_config())
    model.save_pretrained(tmp_path)
    assert find_recipe(WanTransformer3DModel.from_pretrained(tmp_path), None).times == (900, 100)


@pytest.mark.parametrize("policy", ["full", "tempcache:window=8", "head_classes:window=8"])
def test_the_state_of_the_process_may_change_between_chunks(pipe, policy):
    plain = vidattn.stream(pipe, policy, prompt=PROMPT, seed=5)
    expected = latents_of(plain, 6)
    stream, found = vidattn.stream(pipe, policy, prompt=PROMPT, seed=5), []
    for i in range(6):
        with torch.inference_mode(i % 2 == 0):
            found.append(latents_of(stream, 1))
    assert_close(torch.cat(found, 1), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = latents_of(vidattn.stream(pipe, policy, prompt=PROMPT, seed=5), 6)
    assert 0 < (rounded - expected).abs().max() < 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk": 0}, "chunk must be"),
        ({"times": (500.0, 750.0)}, "times must fall"),
        ({"times": ()}, "times must fall"),
        ({"sampler": "heun"}, "sampler must be"),
        ({"shift": 0.0}, "shift must be"),
        ({"shift": float("inf")}, "shift must be"),
        ({"shift": "5"}, "shift must be a number"),
        ({"times": 1000.0}, "times must be a list"),
        ({"guidance": float("nan")}, "guidance must be at least 1"),
        ({"guidance": 0.5}, "guidance must be at least 1"),
        ({"negative_prompt": None}, "negative_prompt must be"),
        ({"policy": None}, "policy must be"),
        ({"clean_time": 1000.0}, "clean_time must be"),
    ],
)
def test_a_bad_recipe_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**changes)


def test_the_levels_of_self_forcing_are_those_of_its_paper():
    levels = RECIPES["self-forcing"].levels
    assert_close(torch.tensor(levels), torch.tensor([1.0, 0.9375, 0.83333333, 0.625]))
