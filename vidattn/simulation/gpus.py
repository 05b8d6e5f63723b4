"""GPUs by name, with the figures that tell when a sparse kernel beats the best dense one."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import yaml

from vidattn.support.registry import unknown
from vidattn.support.resources import resource


@dataclass(frozen=True)
class Figure:
    """A number, what it rests on (datasheet, published, static or assumed) and its source."""

    value: float
    basis: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """One GPU; the figures are explained in configs/gpus.yaml."""

    name: str
    device: str
    architecture: str
    peak_tflops: Figure
    dense_tflops: Figure
    triton_tflops: Figure
    masked_ratio: Figure
    linear_tflops: Figure
    memory_tb_s: Figure
    cache_tb_s: Figure

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Figure)}


@lru_cache
def _gpus() -> dict[str, Gpu]:
    text = resource("configs/gpus.yaml").read_text(encoding="utf-8")
    gpus = {}
    for name, entry in yaml.safe_load(text).items():
        known: dict[str, Any] = {
            key: Figure(*x) if isinstance(x, list) else x for key, x in entry.items()
        }
        gpus[name] = Gpu(name, **known)
    return gpus


def list_gpus() -> list[str]:
    """Names of the GPUs whose figures are known."""
    return list(_gpus())


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, or by the name PyTorch gives its device.

    Raises:
        ValueError: no such GPU; the nearest names are listed.

    >>> find_gpu("NVIDIA H100 80GB HBM3").name
    'H100'
    """
    said = re.split(r"[^a-z0-9]+", name.lower())
    for gpu in _gpus().values():
        words = gpu.name.lower().split()
        if words[-1] in said or "".join(said) == "".join(words):
            return gpu
    raise unknown("GPU", name, list_gpus())


def break_even(gpu: Gpu | str) -> float:
    """The density above which the best dense kernel is faster than a sparse Triton kernel.

    A model, not a measurement: the ratio of the two kernels' rates in whole blocks. Blocks with a
    predicate, and what a method spends beside attention, lower it further.

    Raises:
        ValueError: no such GPU.

    >>> round(break_even("H100"), 2)
    0.7
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    return gpu.triton_tflops.value / gpu.dense_tflops.value
