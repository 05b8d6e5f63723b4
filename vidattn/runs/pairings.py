"""What runs beside sparse attention: weights in 8 bits, caches of steps, compiled blocks.

Nothing at the top of this file needs PyTorch, so that flags are read without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# what torchao calls them
QUANTIZERS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
CACHES = ("first-block", "taylorseer", "pyramid")


@dataclass(frozen=True)
class Pairings:
    """What is put on the transformers of a pipeline.

    Args:
        quantize: a name of ``QUANTIZERS``.
        cache: a name of ``CACHES``.
        compile: whether their blocks are compiled.
        offload: what of the pipeline is kept off the GPU.

    Raises:
        ValueError: torchao is needed and is not there, or two that exclude each other.
    """

    quantize: str | None = None
    cache: str | None = None
    compile: bool = False
    offload: str = "none"

    def __post_init__(self):
        if self.quantize is not None and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"--quantize {self.quantize} needs the package torchao: pip install torchao"
            )
        flag = f"--quantize {self.quantize}" if self.quantize is not None else "--compile"
        if self.offload == "sequential" and (self.quantize is not None or self.compile):
            raise ValueError(
                f"{flag} and --offload sequential exclude each other: the weights of a layer come "
                "and go; take --offload model"
            )

    def to_dict(self) -> dict[str, object]:
        """What a report says of them."""
        return {"quantize": self.quantize, "cache": self.cache, "compile": self.compile}


def check_pairings(pipe: Any, pairings: Pairings) -> None:
    """Compare what is asked for with a pipeline, or with its skeleton.

    Raises:
        ValueError: a transformer without it.
    """
    from vidattn.pipelines.models import find_transformers

    for model in find_transformers(pipe).values():
        if pairings.compile and not getattr(model, "_repeated_blocks", None):
            raise ValueError(
                f"diffusers does not say which blocks of {type(model).__name__} --compile is to "
                "compile; leave it out"
            )
        if pairings.cache is not None:
            _check_cache(pipe, model, pairings.cache)


def put_beside(pipe: Any, pairings: Pairings) -> None:
    """Put what is asked for on the transformers of a pipeline, after their low-rank updates.

    Raises:
        ValueError: a transformer without it.
    """
    from vidattn.pipelines.models import find_transformers

    check_pairings(pipe, pairings)
    for model in find_transformers(pipe).values():
        if pairings.quantize is not None:
            torchao: Any = importlib.import_module("torchao.quantization")
            config = getattr(torchao, QUANTIZERS[pairings.quantize])()
            torchao.quantize_(model, config, filter_fn=_quantized(model))
        if pairings.cache is not None:
            model.enable_cache(_cache_config(pipe, model, pairings.cache))
        if pairings.compile:
            model.compile_repeated_blocks()


def _quantized(model: Any) -> Callable[[Any, str], bool]:
    """Which layers get weights in 8 bits: not low-rank updates, nor what diffusers keeps exact."""
    from torch.nn import Linear

    exact = [*(getattr(model, "_keep_in_fp32_modules", None) or ()), "lora_A", "lora_B"]

    def is_quantized(module: Any, name: str) -> bool:
        return isinstance(module, Linear) and not set(exact) & set(name.split("."))

    return is_quantized


def _cache_config(pipe: Any, model: Any, cache: str) -> Any:
    """Diffusers' own settings, at the self-attentions over the video."""
    from diffusers.hooks import (
        FirstBlockCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )

    from vidattn.pipelines.family import family_of

    layers = family_of(model).layers
    if cache == "first-block":
        return FirstBlockCacheConfig()
    if cache == "taylorseer":
        return TaylorSeerCacheConfig(taylor_factors_dtype=model.dtype, cache_identifiers=[layers])
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=(f"^{layers}$",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _check_cache(pipe: Any, model: Any, cache: str) -> None:
    """Try a cache on, and take it off again.

    Raises:
        ValueError: it does not go with the pipeline or the transformer.
    """
    from vidattn.runs.skeleton import is_piecewise

    flag, kind = f"--cache {cache}", type(pipe).__name__
    if not hasattr(model, "enable_cache"):
        raise ValueError(f"diffusers has no caches for {type(model).__name__}; leave {flag} out")
    if is_piecewise(pipe):
        raise ValueError(
            f"{kind} makes a video piece by piece, and {flag} would carry over from one to the "
            "next; leave it out"
        )
    called = inspect.unwrap(type(pipe).__call__).__code__
    if "cache_context" not in called.co_names:
        raise ValueError(f"{kind} does not tell caches its passes apart; leave {flag} out")
    passes = [x for x in called.co_consts if re.fullmatch(r"(cond_)?uncond(_\w+)?", str(x))]
    if cache == "pyramid" and passes != ["cond_uncond"]:
        raise ValueError(
            f"{flag} mixes up the passes with and without the prompt, which {kind} makes one after "
            "the other; take --cache first-block or taylorseer"
        )
    try:
        model.enable_cache(_cache_config(pipe, model, cache))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{flag} does not know {type(model).__name__}: {error}") from error
    parts = [part for part in model.modules() if part is not model]
    is_on = any(part._diffusers_hook.hooks for part in parts if hasattr(part, "_diffusers_hook"))
    model.disable_cache()
    if not is_on:
        raise ValueError(f"{flag} finds nothing to cache in {type(model).__name__}; leave it out")
