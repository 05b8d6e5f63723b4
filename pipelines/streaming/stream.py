"""Makes a video of any length, chunk by chunk, with a causal model and a cache that stays small.

Letters: B batch, C channels, F latent frames, h, w their size; T frames, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidattn.kernels.timing import synchronize
from vidattn.pipelines.streaming.causal import CausalModel, without_gradients
from vidattn.pipelines.streaming.checks import (
    FAR,
    check_seed,
    check_start,
    latent_frames,
    transformer_of,
)
from vidattn.pipelines.streaming.chunks import ChunkMaker
from vidattn.pipelines.streaming.decode import Decoder, encode
from vidattn.pipelines.streaming.policies import Given, Policies, find_policies
from vidattn.pipelines.streaming.recipe import Recipe, find_recipe
from vidattn.streaming.cache import Cache


@dataclass(frozen=True)
class ChunkReport:
    """What one chunk took.

    Args:
        first_frame: latent frame that it begins at.
        num_frames: decoded frames that it gave.
        seconds: to make, keep and decode it.
        cache_tokens: keys that a query of the next chunk reads of the past, the most over layers.
        cache_bytes: memory of all that is kept of the past.
    """

    first_frame: int
    num_frames: int
    seconds: float
    cache_tokens: int
    cache_bytes: int


class Stream(Iterator[Tensor]):
    """A video that is being made: iterating gives its frames, a chunk at a time.

    The pipeline is changed only while a chunk is made, so that a stream may be left at any time,
    several may run in turns on one pipeline, and the pipeline itself beside them. A chunk that was
    interrupted is made again by the next call.
    """

    def __init__(
        self,
        pipe: Any,
        policies: Policies,
        recipe: Recipe,
        prompt: str,
        size: tuple[int, int],
        total: int | None,
        seed: int,
        start: Tensor | None,
    ):
        self.policies, self.recipe = policies, recipe
        self.chunks: list[ChunkReport] = []
        self._pipe, self._total, self._frame = pipe, total, 0
        self._model = _model_of(pipe)(pipe, policies, recipe, size)
        given = None
        if start is not None:
            check_start(start, size, pipe.vae_scale_factor_temporal, total)
            with without_gradients():
                given = encode(start[None], pipe.vae).to(self._model.device)
        channels, factor = pipe.transformer.config.out_channels, pipe.vae_scale_factor_spatial
        shape = (channels, size[0] // factor, size[1] // factor)
        self._maker = ChunkMaker(self._model, recipe, pipe.scheduler, shape, seed, given)
        self._decoder = Decoder(pipe.vae)
        # clean chunks that are still in the cache, by their first frames
        self._past: dict[int, Tensor] = {}
        self._is_past_whole = True
        self._model.read_prompt(prompt)

    @property
    def frame(self) -> int:
        """Latent frame that the next chunk begins at."""
        return self._frame

    @property
    def caches(self) -> list[Cache]:
        """Those of the layers in their order, for one pass of a step after the other."""
        return self._model.caches

    def __next__(self) -> Tensor:
        """The frames of the next chunk: (T, 3, H, W) float32 in [0, 1].

        Raises:
            StopIteration: the video has its length.
            ValueError: a cache that keeps everything has reached its limit.
        """
        if self._total is not None and self._frame >= self._total:
            raise StopIteration
        synchronize()
        begin = time.perf_counter()
        frames = self.recipe.chunk_at(self._frame)
        latents = self._make(frames)
        with without_gradients():
            video = self._decoder(latents)[0]
        self._frame = frames.stop
        self._remember(frames, latents)
        synchronize()
        self.chunks.append(
            ChunkReport(
                first_frame=frames.start,
                num_frames=len(video),
                seconds=time.perf_counter() - begin,
                cache_tokens=self._model.num_tokens,
                cache_bytes=self._model.num_bytes,
            )
        )
        return video

    def switch(self, prompt: str, *, recache: bool = True) -> None:
        """Let the chunks from the next one on show another prompt.

        Args:
            recache: compute the past in the cache anew under the new prompt, as LongLive does
                (2509.22622), as far as the policy keeps it; without, what was seen under the old
                one stays in force for a while.

        Raises:
            ValueError: the prompt is empty.
        """
        self._model.read_prompt(prompt)
        if recache:
            self._recache()

    def close(self) -> None:
        """End the video; a second time does nothing."""
        self._total = self._frame
        self._past.clear()
        self._model.reset()
        self._pipe.maybe_free_model_hooks()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, frames: range) -> Tensor:
        """(B, C, F, h, w) latents of a chunk, which become part of the past."""
        if not self._is_past_whole:
            self._recache()
        generator = self._maker.generator
        state = generator.get_state()
        try:
            with self._model.running():
                latents = self._maker.make(frames)
                self._is_past_whole = False
                self._model.keep(latents, frames)
                self._is_past_whole = True
        except BaseException:
            generator.set_state(state)
            raise
        return latents

    def _recache(self) -> None:
        """Compute the past anew."""
        self._is_past_whole = False
        self._model.reset()
        with self._model.running():
            for first, latents in sorted(self._past.items()):
                self._model.keep(latents, range(first, first + latents.shape[2]))
        self._is_past_whole = True

    def _remember(self, frames: range, latents: Tensor) -> None:
        """Keep a clean chunk, and those before it that the policy keeps too."""
        self._past[frames.start] = latents
        policy = self.policies.cache
        window, sink = getattr(policy, "window", None), getattr(policy, "sink", 0)
        if window is None:
            return
        oldest = frames.stop + self.recipe.longest - (window - sink) - self._model.lag
        self._past = {
            first: x
            for first, x in self._past.items()
            if first < sink or first + x.shape[2] > oldest
        }


def _model_of(pipe: Any) -> type[CausalModel]:
    """What runs the transformer of a pipeline."""
    if type(transformer_of(pipe)).__name__ != FAR:
        return CausalModel
    # not in every release of diffusers
    from vidattn.pipelines.streaming.far import FarModel

    return FarModel


def stream(
    pipe: Any,
    policy: Given = None,
    *,
    prompt: str,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    recipe: Recipe | str | None = None,
) -> Stream:
    """Make a video chunk by chunk with a causal model, in memory that does not grow.

    Each chunk is made from noise while it reads the cache of what came before, is written into the
    cache by one more pass without noise, and is decoded where the last one ended, as in
    Self-Forcing (2506.08009). The components are those of diffusers, and are left as they are.

    Args:
        pipe: a ``WanPipeline`` whose transformer was trained to be causal.
        policy: what is kept of the past: a name from ``list_policies()``, also with options as in
            "rolling:window=21", or a policy; when not given that of the recipe. One for each kind
            may be given, in a sequence or as in "rolling+annca".
        num_frames: of the video, a whole number of chunks; None for one without an end.
        size: height and width in pixels; when not given those of the recipe.
        seed: of the noise; frames do not depend on how long the video is.
        start: (T, 3, H, W) frames in [0, 1] that the video begins with, one picture or the frames
            of a video to go on with.
        recipe: how the model is run, or the name of a recipe; when not given that in its
            configuration.

    Raises:
        ValueError: a pipeline, model, policy, size or length that does not fit, with what would.

    >>> for frames in vidattn.stream(pipe, "tempcache:cap=20000", prompt="a red boot"):
    ...     show(frames)
    """
    chosen = find_recipe(transformer_of(pipe), recipe)
    policies = find_policies(policy, chosen.policy)
    total = latent_frames(num_frames, chosen, pipe.vae_scale_factor_temporal)
    check_seed(seed)
    size = chosen.size if size is None else size
    return Stream(pipe, policies, chosen, prompt, size, total, seed, start)
