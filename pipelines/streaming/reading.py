"""Lets the attention of a transformer read a cache, and words that stand for many.

Letters: B batch, H heads, S queries, D head dim, L words, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidattn.pipelines.family import attentions, family_of
from vidattn.pipelines.hooks.intercept import Layer, give_back, take
from vidattn.pipelines.hooks.ring import Ring
from vidattn.pipelines.streaming.policies import Policies
from vidattn.pipelines.streaming.rope import rotation_of
from vidattn.streaming.attention import read
from vidattn.streaming.cache import Cache, Part, Site
from vidattn.streaming.policy import TextPolicy

# a chunk that is being made, one that is done, and one that is to be kept in less detail
Kind = Literal["noisy", "clean", "coarse"]
NOISY: Kind = "noisy"
CLEAN: Kind = "clean"
COARSE: Kind = "coarse"


class Words(NamedTuple):
    """A prompt without its padding, of which one word stands for all.

    Args:
        embeddings: (1, L, C).
        weight: (1, 1, L), how many words each stands for.
    """

    embeddings: Tensor
    weight: Tensor

    @classmethod
    def of(cls, embeddings: Tensor) -> Words:
        """The words of (1, L, C) embeddings, where padding is zero and so all alike."""
        is_padding = ~embeddings[0].any(-1)
        num_padding = int(is_padding.sum())
        words = embeddings[:, ~is_padding]
        weight = torch.ones(1, 1, words.shape[1], device=words.device)
        if num_padding:
            words = F.pad(words, (0, 0, 0, 1))
            weight = F.pad(weight, (0, 1), value=float(num_padding))
        return cls(words, weight)


class _Owner:
    """What is said of layers that cannot do what is asked of them."""

    def skipped(self, layer: Layer, allowed: bool) -> None:
        """A layer ran without attending.

        Raises:
            RuntimeError: its cache would have a hole.
        """
        raise RuntimeError(f"{layer.name} did not attend, so that its cache has no keys of a chunk")

    def check_gradient(self, layer: Layer) -> None:
        """A stream has no gradients."""

    def cannot(self, layer: Layer, why: str) -> None:
        """A layer cannot read its cache.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{layer.name} cannot read its cache: {why}")


class WordReader(_Owner):
    """Stands before the cross-attention of a transformer.

    Args:
        policy: which words are read; None for all of them.
    """

    def __init__(self, policy: TextPolicy | None):
        self._policy = policy
        self.weight: Tensor | None = None

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, ring: Ring | None = None
    ) -> Tensor:
        """(B, H, S, D) attention of a layer to the words of the prompt."""
        assert mask is None and ring is None
        part = Part(k, v, weight=self.weight)
        if self._policy is not None:
            part = self._policy.choose(q, part, q.shape[-1] ** -0.5 if scale is None else scale)
        return read(q, (part,), k.shape[1], scale)


class Reader(_Owner):
    """Stands before the attention of a transformer, with a cache for each layer and pass.

    Args:
        passes: of a step, by their names; a guided model has two.
    """

    def __init__(
        self,
        model: nn.Module,
        policies: Policies,
        passes: tuple[str, ...],
        site: Site,
    ):
        self._policies, found = policies, attentions(family_of(model), model)
        self._words = words = WordReader(policies.text)
        self._layers = [
            (Layer(path, index, self, model), module.processor)
            for index, (path, module) in enumerate(found)
        ]
        for index, (path, _) in enumerate(found):
            path = path.replace("attn1", "attn2")
            processor = model.get_submodule(path).processor
            self._layers.append((Layer(path, index, words, model), processor))
        self._caches: dict[str, list[Cache]] = {
            name: caches_of(policies, site, len(found)) for name in passes
        }
        self._now: tuple[str, range] | None = None

    @property
    def caches(self) -> list[Cache]:
        """All of them."""
        return [cache for caches in self._caches.values() for cache in caches]

    @property
    def num_tokens(self) -> int:
        """Keys that a query of the next chunk reads of the past, the most over layers."""
        return max(cache.num_tokens for cache in self.caches)

    @property
    def num_bytes(self) -> int:
        """Memory of all caches."""
        return sum(cache.num_bytes for cache in self.caches)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand between the layers and their attention in a with block."""
        done = []
        try:
            for layer, processor in self._layers:
                take(processor, layer)
                done.append((processor, layer))
            yield
        finally:
            for processor, layer in done:
                give_back(processor, layer)

    @contextmanager
    def at(self, name: str, frames: range, words: Words, kind: Kind) -> Iterator[None]:
        """One forward pass, of some frames; what is clean becomes part of the past."""
        self._now, self._words.weight = (name, frames), words.weight
        try:
            yield
        finally:
            self._now, self._words.weight = None, None
        if kind == CLEAN:
            for cache in self._caches[name]:
                cache.commit()

    def reset(self) -> None:
        """Forget the video."""
        for cache in self.caches:
            cache.reset()

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, ring: Ring | None = None
    ) -> Tensor:
        """(B, H, S, D) attention of a layer to its cache."""
        assert self._now is not None and mask is None and ring is None
        name, frames = self._now
        cache = self._caches[name][layer.index]
        parts = cache.append(q, k, v, frames)
        return read(q, parts, k.shape[1], scale, self._policies.queries)


def caches_of(policies: Policies, site: Site, num_layers: int) -> list[Cache]:
    """A cache for each layer."""
    return [policies.cache.build(replace(site, layer=layer)) for layer in range(num_layers)]


def fingerprint(model: nn.Module) -> str:
    """What tells the weights of a transformer from those of others, however they are kept.

    It reads the norms of the keys, which stay as they are where others are quantised.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.named_parameters()):
        if "attn1" in name and "norm_k" in name:
            if weight.is_meta:
                return ""
            digest.update(weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy())
    return digest.hexdigest()[:16]


def site_of(
    model: nn.Module,
    size: tuple[int, int],
    chunk: int,
    device: torch.device,
    dtype: torch.dtype,
    num_passes: int,
) -> Site:
    """What a cache is told of the layers of a transformer.

    Args:
        size: rows and columns of tokens.
        chunk: the most latent frames of one.
    """
    config = model.config
    return Site(
        batch=1,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        frame_tokens=size[0] * size[1],
        chunk=chunk,
        dtype=dtype,
        device=device,
        rotation=rotation_of(model),
        num_caches=config.num_layers * num_passes,
        model=fingerprint(model),
    )
