"""Figures of this machine that are measured once and kept, so that it always decides alike."""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from vidattn.kernels.cpp.compiler import cache_folder

log = logging.getLogger("vidattn")
_lock = threading.Lock()


def kept(name: str, measure: Callable[[], float | None]) -> float | None:
    """The figure of a name: the one that is kept, or a new one, which then is, unless it is None.

    Figures lie in ``figures.json`` beside the compiled libraries, under a name that must hold all
    they depend on but the processor and the version of PyTorch, which are added. What cannot be
    read is measured again; delete the file to measure anew.
    """
    with _lock:
        path, key = cache_folder() / "figures.json", f"{name}, {_machine()}"
        found = _read(path).get(key)
        if not isinstance(found, float):
            found = measure()
            if found is None:
                return None
            found = float(found)
            _write(path, _read(path) | {key: found})
            log.info("measured once on this machine: %s: %.3f", key, found)
        return found


def _machine() -> str:
    return f"{cpu_name()}, torch {torch.__version__}"


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, figures: dict[str, object]) -> None:
    try:
        handle, made = tempfile.mkstemp(dir=path.parent, suffix=".json")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1, sort_keys=True)
        os.replace(made, path)
    except OSError as error:
        log.warning("figures of this machine cannot be kept in %s: %s", path, error)
