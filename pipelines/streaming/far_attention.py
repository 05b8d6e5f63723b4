"""What the attention of AnyFlow-FAR reads: coarse keys of the past, full ones of the last chunks.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb
from torch import Tensor

from vidattn.pipelines.streaming.policies import Policies
from vidattn.pipelines.streaming.reading import CLEAN, COARSE, NOISY, Kind, Words, caches_of
from vidattn.streaming.attention import read
from vidattn.streaming.cache import Cache, Part, Site

# diffusers pads noisy chunks to whole blocks of so many tokens, with keys of 0 that are read
BLOCK = 128


class FarReader:
    """Stands in for the attention of a transformer, with caches for each layer and pass.

    Args:
        passes: of a step, by their names; a guided model has two.
    """

    def __init__(self, model: Any, policies: Policies, passes: tuple[str, ...], site: Site):
        self._model, self._policies = model, policies
        num_layers = len(model.blocks)
        self._caches = {name: caches_of(policies, site, num_layers) for name in passes}
        # keys and values of the last chunks
        self._recent: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}
        self._passes = passes
        self.forget_recent()
        self._now: tuple[str, range, Words, Kind] | None = None

    @property
    def caches(self) -> list[Cache]:
        """Those of the coarse past."""
        return [cache for caches in self._caches.values() for cache in caches]

    @property
    def num_tokens(self) -> int:
        """Keys that a query of the next chunk reads of the past, the most over layers."""
        recent = next(iter(self._recent.values()))[0]
        own = sum(k.shape[2] for k, _ in recent)
        return own + max(cache.num_past_tokens for cache in self.caches)

    @property
    def num_bytes(self) -> int:
        """Memory of all that is kept."""
        recent = [x for layers in self._recent.values() for kept in layers for x in kept]
        own = sum(x.numel() * x.element_size() for pair in recent for x in pair)
        return own + sum(cache.num_bytes for cache in self.caches)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in the layers in a with block."""
        before = []
        try:
            for index, block in enumerate(self._model.blocks):
                for attention in (block.attn1, block.attn2):
                    before.append((attention, attention.processor))
                    attention.processor = _Processor(self, index)
            yield
        finally:
            for attention, processor in before:
                attention.processor = processor

    @contextmanager
    def at(self, name: str, frames: range, words: Words, kind: Kind) -> Iterator[None]:
        """One forward pass, of some frames; what is coarse becomes part of the caches."""
        self._now = name, frames, words, kind
        try:
            yield
        finally:
            self._now = None
        if kind == COARSE:
            for cache in self._caches[name]:
                cache.commit()

    def forget_recent(self) -> None:
        """Forget the chunks that are kept in full."""
        layers = range(len(self._model.blocks))
        self._recent = {name: [[] for _ in layers] for name in self._passes}

    def reset(self) -> None:
        """Forget the video."""
        self.forget_recent()
        for cache in self.caches:
            cache.reset()

    def read_video(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D): what the queries of a chunk read in a layer."""
        assert self._now is not None
        name, frames, _, kind = self._now
        cache, recent = self._caches[name][index], self._recent[name][index]
        if kind == COARSE:
            parts = cache.append(q, k, v, frames)
        else:
            nothing = k[:, :, :0]
            past = cache.append(q, nothing, nothing, range(frames.start, frames.start))
            num_zeros = -q.shape[2] % BLOCK if kind == NOISY else 0
            parts = tuple(_longer(part, recent, (k, v), num_zeros) for part in past)
        if kind == CLEAN:
            recent.append((k, v))
        return read(q, parts, k.shape[1], policy=self._policies.queries)

    def read_words(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D): what the queries of a chunk read of the prompt."""
        assert self._now is not None
        part = Part(k, v, weight=self._now[2].weight)
        if self._policies.text is not None:
            part = self._policies.text.choose(q, part, q.shape[-1] ** -0.5)
        return read(q, (part,), k.shape[1])


class _Processor:
    """Attends as ``AnyFlowCausalAttnProcessor`` does, by a reader."""

    def __init__(self, reader: FarReader, index: int):
        self._reader, self._index = reader, index

    # what caches do is nothing to compile
    @torch.compiler.disable
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: object = None,
        rotary_emb: dict[str, Tensor] | None = None,
    ) -> Tensor:
        assert attention_mask is None
        words = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states))
        k, v = attn.norm_k(attn.to_k(words)), attn.to_v(words)
        q, k, v = (
            x.to(hidden_states.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (q, k, v)
        )
        if rotary_emb is None:
            out = self._reader.read_words(q, k, v)
        else:
            q, k = (apply_rotary_emb(x, rotary_emb["query"]) for x in (q, k))
            out = self._reader.read_video(self._index, q, k, v)
        out = out.transpose(1, 2).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


def _longer(
    part: Part, recent: list[tuple[Tensor, Tensor]], own: tuple[Tensor, Tensor], num_zeros: int
) -> Part:
    """A part of the past with the last chunks behind it, and the chunk itself.

    Args:
        recent, own: (B, H, S, D) keys and values of all heads.
        num_zeros: keys of 0 that are read too.
    """
    heads = slice(None) if part.heads is None else part.heads
    pairs = [(k[:, heads], v[:, heads]) for k, v in (*recent, own)]
    weight = part.weight
    if num_zeros:
        zero = torch.zeros_like(part.k[:, :, :1]) if part.k.shape[2] else own[0][:, heads, :1] * 0
        # one stands for all; a policy takes the last keys for those of the chunk itself
        pairs.insert(-1, (zero, zero))
    k, v = (torch.cat(x, 2) for x in zip((part.k, part.v), *pairs))
    if weight is None and num_zeros:
        weight = torch.ones(1, 1, part.k.shape[2], device=k.device)
    if weight is not None:
        weight = F.pad(weight, (0, k.shape[2] - part.k.shape[2]), value=1.0)
    if weight is not None and num_zeros:
        weight[..., -own[0].shape[2] - 1] = num_zeros
    return replace(part, k=k, v=v, frames=None, weight=weight)
