"""Functions are timed in turns."""

import torch

from vidattn.kernels.timing import interleaved_ms


def test_functions_are_timed_in_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved_ms(functions, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert times.keys() == functions.keys() and all(ms >= 0 for ms in times.values())


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Events of the GPU that was asked for, and no wait for the one that is at hand."""
    clock, entered = iter([3.0, 5.0, 4.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            """As much as a GPU would do here."""

        def synchronize(self):
            """The time is known at once."""

        def elapsed_time(self, end):
            return next(clock)

    class Device:
        def __init__(self, device):
            entered.append(device)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)
    times = interleaved_ms({"a": lambda: None}, rounds=3, device="cuda:1")
    assert times == {"a": 4.0} and entered == ["cuda:1"]
