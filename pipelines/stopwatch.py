"""Time spent in a piece of work that runs many times, on the CPU or on a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter

import torch


class Stopwatch:
    """Adds up spans of time; on a GPU between events, so that nothing has to wait for them."""

    _MAX_PENDING = 4096

    def __init__(self):
        self._done_ms = 0.0
        self._spans: list[float | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @staticmethod
    def now(device: torch.device) -> float | torch.cuda.Event:
        """A mark in time, for ``add``."""
        if device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, start: float | torch.cuda.Event, device: torch.device) -> None:
        """Count the time since ``start``."""
        stop = self.now(device)
        if isinstance(start, float):
            self._spans.append((stop - start) * 1e3)
        else:
            self._spans.append((start, stop))
        if len(self._spans) > self._MAX_PENDING:
            self.read_ms()

    @contextmanager
    def span(self, device: torch.device):
        """Count the time inside a with block."""
        start = self.now(device)
        try:
            yield
        finally:
            self.add(start, device)

    def read_ms(self) -> float:
        """Milliseconds so far; waits for a GPU to finish what was counted."""
        spans, self._spans = self._spans, []
        for span in spans:
            if isinstance(span, tuple):
                span[1].synchronize()
                span = span[0].elapsed_time(span[1])
            self._done_ms += span
        return self._done_ms
