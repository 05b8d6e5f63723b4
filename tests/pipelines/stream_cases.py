"""A causal pipeline that is small enough for a test, and its video made slowly."""

from __future__ import annotations

import torch
from diffusers import WanPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from tests.pipelines.causal_wan import State, random_state, velocity
from tests.pipelines.tiny_pipes import wan
from vidattn.pipelines.streaming.recipe import KEY, Recipe

HEADS, HEAD_DIM, CHANNELS = 3, 12, 16
# 3 x 5 tokens to a frame
SIZE, LATENT = (48, 80), (6, 10)
RECIPE = Recipe(chunk=2, times=(1000.0, 500.0), size=SIZE)


def causal_state() -> State:
    """Random weights in the names of Wan's own code, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return random_state(
            heads=HEADS, head_dim=HEAD_DIM, layers=2, channels=CHANNELS, text=16, ffn=24,
            patch=(1, 2, 2),
        )  # fmt: skip


def causal_pipe(recipe: Recipe | None = RECIPE) -> WanPipeline:
    """A pipeline with those weights; without a recipe its model does not say that it is causal."""
    from convert_causal import build_transformer

    pipe = wan()
    heads = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
    pipe.transformer = build_transformer(causal_state(), recipe or RECIPE, **heads)
    if recipe is None:
        config = {x: y for x, y in pipe.transformer.config.items() if x != KEY}
        pipe.transformer._internal_dict = FrozenDict(config)
    return pipe


def slow_latents(
    pipe: WanPipeline, prompt: str, num_chunks: int, recipe: Recipe = RECIPE, seed: int = 0,
    guidance_prompt: str | None = None,
) -> Tensor:  # fmt: skip
    """(C, F, h, w) float64 latents of a video, each step a pass over all of it under a mask."""
    generator = torch.Generator().manual_seed(seed)
    state = causal_state()
    texts = [embed(pipe, text) for text in (prompt, guidance_prompt) if text is not None]
    past, chunks = torch.zeros(CHANNELS, 0, *LATENT, dtype=torch.float64), []
    for _ in range(num_chunks):
        frames = len(recipe.chunk_at(past.shape[1]))
        chunks.append(frames)
        shape = (1, CHANNELS, frames, *LATENT)
        x = torch.randn(shape, generator=generator)[0].double()
        levels = recipe.levels
        for level, following in zip(levels, (*levels[1:], 0.0)):
            times = torch.tensor([recipe.clean_time] * past.shape[1] + [1000 * level] * frames)
            video = torch.cat([past, x], 1)
            outs = [velocity(state, video, times, text, chunks, HEADS) for text in texts]
            out = outs[0] if len(outs) == 1 else outs[1] + recipe.guidance * (outs[0] - outs[1])
            clean, drift = x - level * out[:, -frames:], out[:, -frames:]
            if following and recipe.sampler == "renoise":
                noise = torch.randn(shape, generator=generator)[0].double()
                x = (1 - following) * clean + following * noise
            else:
                x = clean + following * drift
        past = torch.cat([past, x], 1)
    return past


def embed(pipe: WanPipeline, prompt: str) -> Tensor:
    """(L, width) words of a prompt, as a stream gives them to the transformer."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512
        )
    return found[0][0]
