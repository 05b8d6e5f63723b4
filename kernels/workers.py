"""Threads that each run a whole share of the work, so that they meet once, not at every step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# above this the interpreter lock costs more than the meetings do
MAX_WORKERS = 8


def num_workers(device: torch.device) -> int:
    """How many workers are worth having at most."""
    return min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" else 1


def run(work: Callable[[int], None], count: int) -> None:
    """``work(0)`` to ``work(count - 1)``, each in a thread with its share of this one's threads."""
    if count == 1:
        work(0)
        return
    total, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def start(worker: int) -> None:
        torch.set_num_threads(max(1, total // count))
        with torch.inference_mode(inference), torch.no_grad():
            work(worker)

    try:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(start, worker) for worker in range(count)]:
                done.result()
    finally:
        # the number is kept for each thread, but threads yet to come take the one set last
        torch.set_num_threads(total)
