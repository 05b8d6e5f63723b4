"""One causal transformer with its caches: what it makes of a chunk at a noise level.

Letters: B batch, C channels, F latent frames, h, w their size, S tokens, L words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidattn.pipelines.streaming.checks import check_size, transformer_of
from vidattn.pipelines.streaming.policies import Policies
from vidattn.pipelines.streaming.reading import CLEAN, NOISY, Kind, Reader, Words, site_of
from vidattn.pipelines.streaming.recipe import Recipe
from vidattn.pipelines.streaming.rope import starting_at
from vidattn.pipelines.streaming.timing import timing_of
from vidattn.streaming.cache import Cache, Site

# of the text encoder of Wan, which SkyReels-V2 has too
PROMPT_TOKENS = 512
# noise levels of the frames of a chunk, of 1000
Times = Sequence[float]


@contextmanager
def without_gradients() -> Iterator[None]:
    """Record no gradients, and make tensors that may be changed wherever they go."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class CausalModel:
    """The transformer of a pipeline, which goes on with the video in its caches.

    Args:
        size: of the frames, height and width in pixels.
    """

    def __init__(self, pipe: Any, policies: Policies, recipe: Recipe, size: tuple[int, int]):
        self._pipe, self._recipe, self._model = pipe, recipe, transformer_of(pipe)
        rows, columns = check_size(pipe, self._model, size)
        self._frame_tokens = rows * columns
        self.device = torch.device(pipe._execution_device)
        site = site_of(
            self._model, (rows, columns), recipe.longest, self.device, self._model.dtype,
            len(recipe.passes),
        )  # fmt: skip
        self._reader: Any = self._make_reader(policies, site)
        self._words: dict[str, Words] = {}

    def _make_reader(self, policies: Policies, site: Site) -> object:
        return Reader(self._model, policies, self._recipe.passes, site)

    @property
    def caches(self) -> list[Cache]:
        """Those of all layers and passes."""
        return self._reader.caches

    @property
    def num_tokens(self) -> int:
        """Keys that a query of the next chunk reads of the past, the most over layers."""
        return self._reader.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of all that is kept of the past."""
        return self._reader.num_bytes

    @property
    def lag(self) -> int:
        """Frames that are kept beside the caches before they go into them."""
        return 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """What runs the model stands in this block; outside of it the pipeline is as it was."""
        with without_gradients(), self._reader.installed():
            yield

    def read_prompt(self, prompt: str) -> None:
        """Let a prompt lead from now on.

        Raises:
            ValueError: it is empty.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt must say what the video shows, got {prompt!r}")
        passes = self._recipe.passes
        with without_gradients():
            found = self._pipe.encode_prompt(
                prompt=prompt,
                negative_prompt=self._recipe.negative_prompt,
                do_classifier_free_guidance=len(passes) > 1,
                max_sequence_length=PROMPT_TOKENS,
                device=self.device,
            )
        self._words = {x: Words.of(y.to(self._model.dtype)) for x, y in zip(passes, found)}

    def velocity(
        self,
        latents: Tensor,
        timestep: float,
        frames: range,
        num_given: int = 0,
        following: float = 0.0,
    ) -> Tensor:
        """(B, C, F, h, w) float32 velocity of a chunk at a time of 1000.

        Args:
            latents: (B, C, F, h, w) of the chunk.
            num_given: first frames of it that are clean.
            following: time of the next step, which flow maps are told.
        """
        clean = [self._recipe.clean_time] * num_given
        times, ends = (clean + [x] * (len(frames) - num_given) for x in (timestep, following))
        return self._guided(latents, times, ends, frames, NOISY)

    def keep(self, latents: Tensor, frames: range) -> None:
        """Make a clean chunk part of the past."""
        self._clean(latents, frames, CLEAN)

    def reset(self) -> None:
        """Forget the video."""
        self._reader.reset()

    def _clean(self, latents: Tensor, frames: range, kind: Kind) -> None:
        """Let a chunk without noise go through the transformer."""
        times = [self._recipe.clean_time] * len(frames)
        self._guided(latents, times, times, frames, kind)

    def _guided(
        self, latents: Tensor, times: Times, following: Times, frames: range, kind: Kind
    ) -> Tensor:
        """(B, C, F, h, w) float32 velocity of all passes of a step together."""
        latents = latents.to(self._model.dtype)
        outs = []
        for name, words in self._words.items():
            with self._reader.at(name, frames, words, kind):
                outs.append(self._run(name, words, latents, times, following, frames, kind).float())
        if len(outs) == 1:
            return outs[0]
        cond, uncond = outs
        return uncond + self._recipe.guidance * (cond - uncond)

    def _run(
        self,
        name: str,
        words: Words,
        latents: Tensor,
        times: Times,
        following: Times,
        frames: range,
        kind: Kind,
    ) -> Tensor:
        """(B, C, F, h, w) what the transformer makes of a chunk in one pass."""
        timing = timing_of(self._model, times, self._frame_tokens, self._recipe.fps, self.device)
        with starting_at(self._model, frames.start, latents), self._model.cache_context(name):
            return self._pipe.transformer(
                hidden_states=latents,
                encoder_hidden_states=words.embeddings,
                return_dict=False,
                **timing,
            )[0]
