"""Brings the softmax attention of one layer into our hands, whatever code leads to it.

The processor of the layer gets a subclass of its own class that runs inside a function mode; the
mode catches scaled_dot_product_attention, where every processor of diffusers arrives. Under
torch.compile the call becomes an operator (see ``operators``).

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vidattn.kernels.dense import dense_attention
from vidattn.pipelines import masks
from vidattn.pipelines.heads import context_parallel
from vidattn.pipelines.operators import numbered
from vidattn.pipelines.swap import MARK, swap_in, swap_out

NATIVE = attention_dispatch.AttentionBackendName.NATIVE


class Owner(Protocol):
    """What a layer hands its calls to."""

    def attend(self, layer: Layer, q, k, v, mask: Tensor | None, scale: float | None) -> Tensor:
        """(B, H, S, D) attention of a layer."""

    def skipped(self, layer: Layer, allowed: bool) -> None:
        """Told that a layer ran without attending, and whether it may."""

    def check_gradient(self, layer: Layer) -> None:
        """Told that the gradient of a call will be that of dense attention."""

    def cannot(self, layer: Layer, why: str) -> None:
        """Told that a call of a layer runs dense for a reason that nobody asked for."""


class Layer(TorchFunctionMode):
    """One self-attention over the video: catches its attention while its processor runs."""

    def __init__(self, name: str, index: int, owner: Owner, paired_mask: bool):
        super().__init__()
        self.name, self.index, self.owner = name, index, owner
        self.paired_mask = paired_mask
        # for dense calls: what the user chose with set_attention_backend, else what the processor
        # would have run on
        self.chosen_backend = None
        self.usual_backend = None
        self.hits = 0
        self.number = numbered(self)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self._catch(*args, **(kwargs or {}))
        if self.paired_mask and (mask := masks.unpaired(func, args)) is not None:
            return mask
        return func(*args, **(kwargs or {}))

    def _catch(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        plain = functools.partial(
            F.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal
        )
        if torch.compiler.is_compiling():
            if dropout_p or is_causal:
                return plain(scale=scale, enable_gqa=enable_gqa)
            return torch.ops.vidattn.attend(query, key, value, attn_mask, scale, self.number)
        self.hits += 1
        if _scores_are_skipped():
            self.owner.skipped(self, allowed=True)
            return plain(scale=scale, enable_gqa=enable_gqa)
        if dropout_p or is_causal:
            self.owner.cannot(self, f"it attends with dropout {dropout_p} and {is_causal=}")
            return plain(scale=scale, enable_gqa=enable_gqa)
        return self.owner.attend(self, query, key, value, attn_mask, scale)

    @contextmanager
    def native(self) -> Iterator[None]:
        """Make the backend of the process native, if it is another."""
        self.usual_backend = _global_backend()
        if self.usual_backend == NATIVE:
            yield
            return
        with attention_dispatch.attention_backend(NATIVE):
            yield

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None):
        """The attention that runs without us, on the backend that the user chose."""
        if self.paired_mask:
            mask = masks.paired(mask)
        chosen = self.chosen_backend or self.usual_backend or _global_backend()
        if chosen == NATIVE:
            return dense_attention(q, k, v, mask=mask, scale=scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attention_dispatch.dispatch_attention_fn(
            q, k, v, attn_mask=mask, scale=scale, backend=chosen
        )
        return out.transpose(1, 2)


def take(processor: object, layer: Layer) -> None:
    """Have the attention of a processor go through ``layer``."""
    layer.chosen_backend = processor.__dict__.pop("_attention_backend", None)
    layer.usual_backend = None if _route(type(processor)) != "direct" else NATIVE
    swap_in(processor, _namespace, layer)


def give_back(processor: object, layer: Layer) -> None:
    """Undo ``take``; a backend chosen meanwhile stays."""
    swap_out(processor, layer)
    keep_choice(processor, layer)


def keep_choice(processor: object, layer: Layer) -> None:
    """Put the backend that the user chose where diffusers keeps it."""
    if layer.chosen_backend is not None:
        processor._attention_backend = layer.chosen_backend


def owner(processor: object) -> Layer | None:
    """The layer that a processor attends for, None for one of nobody's."""
    found = getattr(processor, MARK, ())
    return found[-1] if found else None


def _route(base: type) -> str:
    """Whether processors attend by a backend of their "own", by the "global" one, or "direct"."""
    if hasattr(base, "_attention_backend"):
        return "own"
    code = getattr(inspect.unwrap(base.__call__), "__code__", None)
    return "global" if code and "dispatch_attention_fn" in code.co_names else "direct"


def _namespace(base: type) -> dict[str, object]:
    """What the subclass of a processor class has of its own."""
    call, route = base.__call__, _route(base)

    @functools.wraps(call)
    def __call__(self, *args, **kwargs):
        layer = owner(self)
        if layer is None:
            return call(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            with layer:
                out = call(self, *args, **kwargs)
            return _checked_when_it_runs(out, layer) if _loses_gradient(self, out) else out
        before = layer.hits
        with layer.native() if route == "global" else nullcontext(), layer:
            out = call(self, *args, **kwargs)
        if layer.hits == before:
            layer.owner.skipped(layer, allowed=False)
        if _loses_gradient(self, out):
            layer.owner.check_gradient(layer)
        return out

    if route != "own":
        return {"__call__": __call__}

    def read(self):
        # diffusers always sees the native backend, which leads to the function that we catch
        return self.__dict__.get("_attention_backend") if owner(self) is None else NATIVE

    def store(self, backend):
        if (layer := owner(self)) is None:
            self.__dict__["_attention_backend"] = backend
        else:
            layer.chosen_backend = backend

    return {"__call__": __call__, "_attention_backend": property(read, store)}


def _loses_gradient(processor: object, out: Tensor | tuple) -> bool:
    """Whether the gradient of what a processor gave is that of dense attention in any case."""
    first = out[0] if isinstance(out, tuple) else out
    return first.requires_grad and context_parallel(processor) is not None


def _checked_when_it_runs(out: Tensor | tuple, layer: Layer) -> Tensor | tuple:
    """The same, but whether the call was sparse is known at every step anew."""
    if isinstance(out, tuple):
        return torch.ops.vidattn.check_gradient(out[0], layer.number), *out[1:]
    return torch.ops.vidattn.check_gradient(out, layer.number)


def _scores_are_skipped() -> bool:
    """Whether a guidance that replaces attention by its values is at work around us."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


def _global_backend() -> attention_dispatch.AttentionBackendName:
    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
