"""A stream of SkyReels-V2 is diffusion forcing where a block begins when the last is done."""

import diffusers
import pytest
import torch
from torch.testing import assert_close

import vidattn
from tests.pipelines.stream_cases import LATENT, SIZE
from tests.pipelines.tiny_inputs import WAN
from tests.pipelines.tiny_pipes import wan
from vidattn.pipelines.streaming.recipe import RECIPES, Recipe

STEPS, CHUNK, NUM_CHUNKS = 3, 2, 3
RECIPE = Recipe(
    chunk=CHUNK,
    times=(1000.0, 700.0, 400.0),
    sampler="scheduler",
    guidance=4.0,
    negative_prompt="blurred",
    fps=24,
    size=SIZE,
)


@pytest.fixture(params=[False, True])
def pipe(request):
    parts = wan().components
    # the pipeline overwrites what the first step left for the corrector of the second
    scheduler = diffusers.UniPCMultistepScheduler.from_config(
        parts["scheduler"].config, disable_corrector=[0]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {**WAN, "in_channels": 16, "out_channels": 16}
        model = diffusers.SkyReelsV2Transformer3DModel(**config, inject_sample_info=request.param)
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        transformer=model.eval(),
        scheduler=scheduler,
        **{name: parts[name] for name in ("tokenizer", "text_encoder", "vae")},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(stream):
    found = []

    def look(latents):
        found.append(latents)
        return latents.new_zeros(1, 1, 3, 1, 1)

    stream._decoder = look
    assert len(list(stream)) == NUM_CHUNKS
    return torch.cat(found, 2)


def test_it_is_that_of_the_pipeline(pipe):
    options = {"prompt": "a red boot", "num_frames": 4 * (CHUNK * NUM_CHUNKS - 1) + 1}
    stream = vidattn.stream(pipe, "full", recipe=RECIPE, **options)
    # the pipeline fails where it is given noise, and draws that of all frames at once
    shape, generator = (1, 16, CHUNK * NUM_CHUNKS, *LATENT), torch.Generator().manual_seed(7)
    noise = torch.randn(shape, generator=generator)
    stream._maker._noise = lambda frames: noise[:, :, frames.start : frames.stop]
    found = latents_of(stream)
    expected = pipe(
        generator=generator.manual_seed(7), height=SIZE[0], width=SIZE[1], fps=RECIPE.fps,
        num_inference_steps=STEPS, guidance_scale=RECIPE.guidance, output_type="latent",
        negative_prompt=RECIPE.negative_prompt, ar_step=STEPS, causal_block_size=CHUNK, **options,
    ).frames  # fmt: skip
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # which it has told to wait by a mask
    with pytest.raises(ValueError, match="_set_ar_attention"):
        vidattn.stream(pipe, "full", recipe=RECIPE, **options)


@pytest.mark.parametrize("pipe", [False], indirect=True)
def test_it_needs_a_recipe(pipe):
    with pytest.raises(ValueError, match="bidirectional as far as .* skyreels-v2-df"):
        vidattn.stream(pipe, "full", prompt="a red boot")
    assert RECIPES["skyreels-v2-df"].longest == 5
