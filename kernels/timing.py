"""How long functions take on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch


def interleaved_ms(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Median time of each function in ms, called in turns so that a slow minute hits all alike.

    Args:
        rounds: times that each is timed.
        warmup: times that each is called before.
        device: what they run on; on a GPU its own clock is read, which leaves out what the host
            takes to launch. By default the clock of the host, with waits for the GPU in use.
    """
    on_gpu = device is not None and torch.device(device).type == "cuda"
    timed = _gpu_ms if on_gpu else _host_ms
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for function in [*functions.values()] * warmup:
            function()
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(timed(function))
    return {name: statistics.median(values) for name, values in times.items()}


def _gpu_ms(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _host_ms(function: Callable[[], object]) -> float:
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - begin)


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
