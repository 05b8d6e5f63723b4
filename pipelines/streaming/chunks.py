"""Makes the latents of a chunk out of noise, by the steps of a recipe.

Letters: B batch, C channels, F latent frames, h, w their size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vidattn.pipelines.streaming.causal import CausalModel
from vidattn.pipelines.streaming.recipe import Recipe


class ChunkMaker:
    """Makes chunks one after the other; what they are depends on the seed and on those before.

    Args:
        scheduler: of the pipeline, for recipes that follow it; it is copied.
        shape: C, h and w of the latents.
        given: (B, C, F, h, w) frames that the video begins with, if any.
    """

    def __init__(
        self,
        model: CausalModel,
        recipe: Recipe,
        scheduler: Any,
        shape: tuple[int, int, int],
        seed: int,
        given: Tensor | None,
    ):
        self._model, self._recipe, self._shape, self._given = model, recipe, shape, given
        self._scheduler = copy.deepcopy(scheduler)
        # on the CPU, so that a seed means the same everywhere
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def make(self, frames: range) -> Tensor:
        """(B, C, F, h, w) float32 latents of the chunk that comes next."""
        given = self._given_of(frames)
        if given.shape[2] == len(frames):
            return given
        noisy = self._noise(frames)
        walk = self._schedule if self._recipe.sampler == "scheduler" else self._walk
        return _begun_with(given, walk(noisy, frames, given))

    def _walk(self, noisy: Tensor, frames: range, given: Tensor) -> Tensor:
        """By the levels of the recipe."""
        levels = self._recipe.levels
        for level, following in zip(levels, (*levels[1:], 0.0)):
            noisy = _begun_with(given, noisy)
            velocity = self._model.velocity(
                noisy, 1000 * level, frames, given.shape[2], 1000 * following
            )
            if following and self._recipe.sampler == "renoise":
                clean = noisy - level * velocity
                noisy = (1 - following) * clean + following * self._noise(frames)
            else:
                noisy = noisy + (following - level) * velocity
        return noisy

    def _schedule(self, noisy: Tensor, frames: range, given: Tensor) -> Tensor:
        """By the scheduler of the pipeline."""
        scheduler = self._scheduler
        scheduler.set_timesteps(len(self._recipe.times), device=self._model.device)
        times = [*scheduler.timesteps, 0.0]
        for step, following in zip(times, times[1:]):
            noisy = _begun_with(given, noisy)
            velocity = self._model.velocity(
                noisy, float(step), frames, given.shape[2], float(following)
            )
            noisy = scheduler.step(velocity, step, noisy, return_dict=False)[0]
        return noisy

    def _noise(self, frames: range) -> Tensor:
        """(B, C, F, h, w) noise."""
        channels, height, width = self._shape
        shape = (1, channels, len(frames), height, width)
        return torch.randn(shape, generator=self.generator).to(self._model.device)

    def _given_of(self, frames: range) -> Tensor:
        """The frames of a chunk that are given, of which there may be none."""
        if self._given is None:
            channels, height, width = self._shape
            return torch.empty(1, channels, 0, height, width, device=self._model.device)
        return self._given[:, :, frames.start : frames.stop]


def _begun_with(given: Tensor, latents: Tensor) -> Tensor:
    """A chunk whose first frames are those that are given."""
    return torch.cat([given, latents[:, :, given.shape[2] :]], 2)
