"""Brings the softmax attention of one layer into our hands, whatever code leads to it.

The processor of the layer gets a subclass of its own class that runs inside a function mode; the
mode catches scaled_dot_product_attention, where every processor of diffusers arrives. Under
torch.compile the call becomes an operator (see ``operators``).

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidattn.kernels.engines.dense import dense_attention
from vidattn.kernels.engines.exact import exact_attention, exact_engine
from vidattn.pipelines.family import family_of
from vidattn.pipelines.heads import context_parallel
from vidattn.pipelines.hooks import masks, parallel
from vidattn.pipelines.hooks.operators import numbered
from vidattn.pipelines.hooks.ring import Ring
from vidattn.pipelines.hooks.swap import MARK, swap_in, swap_out

NATIVE = attention_dispatch.AttentionBackendName.NATIVE


class Owner(Protocol):
    """What a layer hands its calls to."""

    def attend(
        self, layer: Layer, q, k, v, mask: Tensor | None, scale, ring: Ring | None = None
    ) -> Tensor:
        """(B, H, S, D) attention of a layer; of this process's queries of a ring, or of all."""

    def skipped(self, layer: Layer, allowed: bool) -> None:
        """Told that a layer ran without attending, and whether it may."""

    def check_gradient(self, layer: Layer) -> None:
        """Told that the gradient of a call will be that of dense attention."""

    def cannot(self, layer: Layer, why: str) -> None:
        """Told that a call of a layer runs dense for a reason that nobody asked for."""


class Layer(TorchFunctionMode):
    """One self-attention over the video: catches its attention while its processor runs."""

    def __init__(self, name: str, index: int, owner: Owner, model: nn.Module):
        super().__init__()
        self.name, self.index, self.owner, self.model = name, index, owner, model
        family = family_of(model)
        self.paired_mask, self.text_first = family.paired_mask, family.beside == "before"
        self.prefix, self.joins = family.prefix, family.joins
        # for dense calls: what the user chose with set_attention_backend, else what the processor
        # would have run on
        self.chosen_backend = None
        self.usual_backend = None
        # diffusers' context parallelism of the running call, with the text tokens in it
        self.parallel: tuple[object, int] | None = None
        # whether a method has parameters here, and what it is given beside queries and keys
        self.is_learned = False
        self._given = threading.local()
        self.hits = 0
        self.number = numbered(self)

    @property
    def hidden(self) -> Tensor:
        """(B, S, C), what the running call makes queries, keys and values of.

        Raises:
            RuntimeError: it is compiled, and does not say.
        """
        hidden = getattr(self._given, "hidden", None)
        if hidden is None:
            raise RuntimeError(f"{self.name} has learned parameters: run it without torch.compile")
        return hidden

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
        if is_causal and self.prefix:
            return plain(scale=scale, enable_gqa=enable_gqa)
        self.hits += 1
        if _scores_are_skipped():
            self.owner.skipped(self, allowed=True)
            return plain(scale=scale, enable_gqa=enable_gqa)
        if dropout_p or is_causal:
            self.owner.cannot(self, f"it attends with dropout {dropout_p} and {is_causal=}")
            return plain(scale=scale, enable_gqa=enable_gqa)
        if self.parallel is None:
            return self.owner.attend(self, query, key, value, attn_mask, scale)
        return self._attend_in_parallel(query, key, value, attn_mask, scale)

    def _attend_in_parallel(self, query, key, value, mask, scale) -> Tensor:
        config, num_text = self.parallel
        if self.is_learned:
            raise ValueError(f"{self.name}: learned parameters are not spread over processes")
        if self.joins:
            raise ValueError(
                f"{self.name}: text that blocks join to the video is not told from it where "
                "processes share the sequence: run it in one process"
            )
        length, device = query.shape[2], query.device
        shards = parallel.find_shards(config, length, num_text, self.text_first, device)

        def attention(q, k, v, mask, ring):
            return self.owner.attend(self, q, k, v, mask, scale, ring)

        return parallel.attend(config, shards, attention, query, key, value, mask)

    @contextmanager
    def native(self) -> Iterator[None]:
        """Make the backend of the process native, if it is another."""
        self.usual_backend = _global_backend()
        if self.usual_backend == NATIVE:
            yield
            return
        with attention_dispatch.attention_backend(NATIVE):
            yield

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> tuple[Tensor, str]:
        """Attention to everything on the backend that the user chose, or the fastest; its name."""
        chosen = self.chosen_backend or self.usual_backend or _global_backend()
        if chosen == NATIVE and (engine := exact_engine(q, k, v)) != "pytorch":
            try:
                keys = masks.key_mask(mask, (q.shape[0], k.shape[2]), self.paired_mask)
            except ValueError:
                # one that only PyTorch's takes
                pass
            else:
                return exact_attention(q, k, v, key_mask=keys, scale=scale), engine
        if self.paired_mask:
            mask = masks.paired(mask)
        if chosen == NATIVE:
            return dense_attention(q, k, v, mask=mask, scale=scale), "pytorch"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attention_dispatch.dispatch_attention_fn(
            q, k, v, attn_mask=mask, scale=scale, backend=chosen
        )
        return out.transpose(1, 2), chosen.value


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
    names = list(inspect.signature(base.__call__).parameters)[1:]

    @functools.wraps(base.__call__)
    def __call__(self, *args, **kwargs):
        # read anew: others put functions of theirs into the class, and take them out again
        layer, call = owner(self), base.__call__
        if layer is None:
            return call(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            with layer:
                out = call(self, *args, **kwargs)
            config = context_parallel(self, layer.model)
            return out if config is None else _checked(out, layer, _num_text(names, args, kwargs))
        before, config = layer.hits, context_parallel(self, layer.model)
        layer.parallel = None if config is None else (config, _num_text(names, args, kwargs))
        layer._given.hidden = {**dict(zip(names, args)), **kwargs}.get("hidden_states")
        with layer.native() if _route(base) == "global" else nullcontext(), layer:
            out = call(self, *args, **kwargs)
        layer._given.hidden = None
        if layer.hits == before:
            layer.owner.skipped(layer, allowed=False)
        return out

    namespace = {"__call__": __call__}
    if hasattr(base, "_parallel_config"):
        namespace["_parallel_config"] = _hidden("_parallel_config")
    if _route(base) != "own":
        return namespace

    def read(self):
        # diffusers always sees the native backend, which leads to the function that we catch
        return self.__dict__.get("_attention_backend") if owner(self) is None else NATIVE

    def store(self, backend):
        if (layer := owner(self)) is None:
            self.__dict__["_attention_backend"] = backend
        else:
            layer.chosen_backend = backend

    return namespace | {"_attention_backend": property(read, store)}


def _checked(out: Tensor | tuple, layer: Layer, num_text: int) -> Tensor | tuple:
    """What diffusers' own operators of context parallelism gave, which are compiled.

    Raises:
        RuntimeError: with text in the sequence, which they leave beside each part of the video; and
            when it runs, for a gradient of a sparse call, as theirs is that of dense attention.
    """
    first = out[0] if isinstance(out, tuple) else out
    if num_text:
        raise RuntimeError(
            f"{layer.name} joins text to the video, which is wrong when it is compiled under "
            "context parallelism: run it without torch.compile"
        )
    if not first.requires_grad:
        return out
    first = torch.ops.vidattn.check_gradient(first, layer.number)
    return (first, *out[1:]) if isinstance(out, tuple) else first


def _hidden(name: str) -> property:
    """An attribute that diffusers sees only where we are not at work, or where a compiler is."""

    def read(self):
        is_ours = owner(self) is not None and not torch.compiler.is_compiling()
        return None if is_ours else self.__dict__.get(name)

    def store(self, value):
        self.__dict__[name] = value

    return property(read, store)


def _num_text(names: list[str], args: tuple, kwargs: dict) -> int:
    """Text tokens that a processor is given to join to those of the video."""
    text = {**dict(zip(names, args)), **kwargs}.get("encoder_hidden_states")
    return 0 if text is None else text.shape[1]


def _scores_are_skipped() -> bool:
    """Whether a guidance that replaces attention by its values is at work around us."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


def _global_backend() -> attention_dispatch.AttentionBackendName:
    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
