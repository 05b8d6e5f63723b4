"""Peak resident memory of a call, as Linux tells it."""

import ctypes
from collections.abc import Callable
from pathlib import Path


def extra_mib(function: Callable[[], object]) -> float | None:
    """Peak resident memory of a call beyond what was there; None where the system does not say."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # give freed memory back first, or the call would seem to need none
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_kib("VmRSS")
    reset.write_text("5")
    function()
    return (resident_kib("VmHWM") - before) / 1024


def resident_kib(field: str) -> int:
    """A memory figure of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])
