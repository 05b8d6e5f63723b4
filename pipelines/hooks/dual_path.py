"""FreeSwim's second path: attention to everything decides what is asked of the text.

A pass of the model is run twice: once with attention to everything, of which the outputs of the
cross-attentions are kept, and once with the plans of a patch, which takes those in place of its
own. They serve the steps that follow as well.

Letters: B batch, S tokens, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.pipelines.site import Site
from vidattn.pipelines.steps import Run
from vidattn.streaming.codec import CODECS, Planes

# of diffusers' cache_context: what is asked without the prompt
WITHOUT_PROMPT = "uncond"


class Store:
    """The (B, S, C) outputs of the cross-attentions of a model, by layer.

    Args:
        quantise: "none", "int8" or "int4", as caches of streams keep their keys.
        device: where they are kept; None for where they are made.
    """

    def __init__(self, quantise: str, device: torch.device | None):
        self.codec, self.device = CODECS[quantise], device
        self._held: dict[int, Planes] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(x.nbytes for held in self._held.values() for x in held)

    def clear(self) -> None:
        """Keep nothing."""
        self._held.clear()

    def put(self, layer: int, out: Tensor) -> None:
        """Keep an output."""
        planes = self.codec.encode(out)
        self._held[layer] = tuple(x.to(self.device or out.device) for x in planes)

    def get(self, layer: int, like: Tensor) -> Tensor:
        """An output on the device and in the dtype of ``like``."""
        planes = tuple(x.to(like.device) for x in self._held[layer])
        return self.codec.decode(planes, like.shape[-1], like.dtype)


class DualPath:
    """The second path of one patched Wan transformer, until ``remove``.

    Args:
        site: the transformer with its patch.
        sharpness: factor of the scale of the scores in attention to everything.
        num_steps: how many steps a full path serves.
        store: for what it gave.
    """

    def __init__(self, site: Site, sharpness: float, num_steps: int, store: Store):
        self.site, self.sharpness, self.num_steps, self.store = site, sharpness, num_steps, store
        self._is_full = self._is_replaced = False
        self._run: Run | None = None
        self._undo: list[Callable[[], None]] = []
        blocks: Any = site.model.blocks
        self._swap(site.model, self._forward)
        for layer, block in enumerate(blocks):
            self._swap(block.attn2, functools.partial(self._cross, layer))
        # its output ends the full path, where nobody reads on
        self._swap(blocks[-1].ffn, self._last)

    def remove(self) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.store.clear()

    def _swap(self, module: nn.Module, make: Callable[[Callable], Callable]) -> None:
        before = module.__dict__.get("forward")
        module.forward = make(module.forward)

        def undo() -> None:
            del module.forward
            if before is not None:
                module.forward = before

        self._undo.append(undo)

    def _forward(self, inner: Callable) -> Callable:
        def forward(*args, **kwargs):
            if self.site.context.now.name == WITHOUT_PROMPT:
                return inner(*args, **kwargs)
            if self._is_due():
                self.site.full_sharpness, self._is_full = self.sharpness, True
                try:
                    inner(*args, **kwargs)
                finally:
                    self.site.full_sharpness, self._is_full = None, False
            self._is_replaced = True
            try:
                return inner(*args, **kwargs)
            finally:
                self._is_replaced = False

        return forward

    def _is_due(self) -> bool:
        current = self.site.passes.current()
        is_new, self._run = current.run is not self._run, current.run
        return is_new or current.step % self.num_steps == 0

    def _cross(self, layer: int, inner: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args, **kwargs):
            if self._is_replaced:
                return self.store.get(layer, hidden_states)
            out = inner(hidden_states, *args, **kwargs)
            if self._is_full:
                self.store.put(layer, out)
            return out

        return forward

    def _last(self, inner: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args, **kwargs):
            return hidden_states if self._is_full else inner(hidden_states, *args, **kwargs)

        return forward
