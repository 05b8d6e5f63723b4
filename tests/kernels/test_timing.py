"""Functions are timed in turns."""

from vidattn.kernels.timing import interleaved_ms


def test_functions_are_timed_in_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved_ms(functions, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert times.keys() == functions.keys() and all(ms >= 0 for ms in times.values())
