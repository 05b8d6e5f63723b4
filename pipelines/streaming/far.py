"""AnyFlow-FAR with its caches: the last chunks in full, what is older in coarse patches.

Diffusers computes the keys of the whole past anew after every chunk. Here the coarse ones, which
see nothing but older coarse ones, are computed once and go into a cache with a policy; only the
chunks that are kept in full are computed again, as what is before them has become coarse. Without
a limit that is the same video, and with a window every chunk takes the same time.

Letters: B batch, C channels, F latent frames, h, w their size, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidattn.pipelines.streaming.causal import CausalModel, Times
from vidattn.pipelines.streaming.far_attention import FarReader
from vidattn.pipelines.streaming.policies import Policies
from vidattn.pipelines.streaming.reading import CLEAN, COARSE, Kind, Words
from vidattn.pipelines.streaming.rope import THETA, forwarding
from vidattn.streaming.cache import Site


class FarModel(CausalModel):
    """The transformer of AnyFlow-FAR, which goes on with the video in its caches."""

    def _make_reader(self, policies: Policies, site: Site) -> object:
        # clean chunks that are kept in full, with their frames
        self._recent: list[tuple[range, Tensor]] = []
        return FarReader(self._model, policies, self._recipe.passes, site)

    @property
    def lag(self) -> int:
        """Frames that are kept in full before they become coarse."""
        return (self._model.config.full_chunk_limit - 1) * self._recipe.chunk

    def keep(self, latents: Tensor, frames: range) -> None:
        """Make a clean chunk part of the past."""
        self._recent.append((frames, latents))
        while len(self._recent) >= self._model.config.full_chunk_limit:
            old, theirs = self._recent.pop(0)
            self._clean(theirs, old, COARSE)
        self._reader.forget_recent()
        for recent, theirs in self._recent:
            self._clean(theirs, recent, CLEAN)

    def reset(self) -> None:
        """Forget the video."""
        super().reset()
        self._recent.clear()

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
        coarse = latents if kind == COARSE else None
        given = latents if coarse is None else _small(self._model, latents)
        timestep, r_timestep = (torch.tensor([x], device=self.device) for x in (times, following))
        edges = self._model.config.patch_size[1:]
        shape = (given.shape[3] // edges[0], given.shape[4] // edges[1])
        # made out here: code that torch.compile made for one chunk then serves all
        freqs = _tables(self._model, shape, frames, self.device, coarse is not None)
        with _placed(self._model, freqs, coarse):
            out = self._pipe.transformer(
                hidden_states=given.transpose(1, 2),
                timestep=timestep,
                r_timestep=r_timestep,
                encoder_hidden_states=words.embeddings,
                chunk_partition=[len(frames)],
                # a pass that reads a cache, which is ours
                kv_cache=[None] * len(self._model.blocks),
                kv_cache_flag={"is_cache_step": False, "num_cached_chunks": 0},
                return_dict=False,
            )[0]
        return out.transpose(1, 2)


@contextmanager
def _placed(model: Any, freqs: Tensor, coarse: Tensor | None) -> Iterator[None]:
    """Let a transformer see tokens where they stand in time, in a with block.

    Args:
        freqs: (1, 1, S, D / 2) their turns.
        coarse: (B, C, F, h, w) what is cut into coarse patches in place of what it is given.
    """
    with forwarding(model.rope, lambda *_, **__: {"query": freqs, "key": freqs}):
        if coarse is None:
            yield
            return
        with forwarding(model.patch_embedding, lambda _: model.far_patch_embedding(coarse)):
            yield


def _small(model: Any, latents: Tensor) -> Tensor:
    """Latents of a size that has as many patches as others have coarse ones."""
    fine, coarse = model.config.patch_size[1:], model.config.compressed_patch_size[1:]
    height, width = (x // large * small for x, small, large in zip(latents.shape[3:], fine, coarse))
    return latents[..., :height, :width]


def _tables(
    model: Any, shape: tuple[int, int], frames: range, device: torch.device, coarse: bool
) -> Tensor:
    """(1, 1, S, D / 2) turns of the tokens of some frames, as ``AnyFlowCausalRotaryPosEmbed``."""
    rope = model.rope
    of_frame = rope._forward_compressed_frame if coarse else rope._forward_full_frame
    table = of_frame(1, *shape, device)
    head_dim = model.config.attention_head_dim
    num = head_dim // 2 - 2 * (head_dim // 6)
    exponents = torch.arange(num, dtype=torch.float64) / num
    angles = torch.tensor(frames, dtype=torch.float64)[:, None] / THETA**exponents
    times = torch.polar(torch.ones_like(angles), angles).to(device, table.dtype)
    times = times[:, None, None].expand(-1, *shape, -1)
    places = table[..., num:].expand(len(frames), -1, -1, -1)
    return torch.cat([times, places], -1).flatten(0, 2)[None, None]
