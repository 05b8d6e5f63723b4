"""What a JSON report says beside the figures: enough to make the same video again."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
from dataclasses import asdict

from vidattn.runs.folder import is_bundled
from vidattn.runs.hardware import hardware
from vidattn.runs.pairings import Pairings
from vidattn.runs.request import Request

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy")


def record(pipe: object, args: argparse.Namespace, request: Request) -> dict[str, object]:
    """Command, versions, machine, model and request as plain types."""
    return {
        "command": ["vidattn", *args.argv],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "vidattn": args.version,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _packages(args.pairings)},
        },
        "hardware": hardware(),
        "model": {
            "name": "tiny-t2v, bundled" if is_bundled(args.model) else args.model,
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
            "dtypes": _dtypes(pipe),
            "device": str(pipe._execution_device),
            "offload": args.offload,
        },
        "beside": args.pairings.to_dict(),
        "request": asdict(request) | {"image": request.image and str(request.image)},
        "fps": args.fps,
    }


def _packages(pairings: Pairings) -> tuple[str, ...]:
    return (*PACKAGES, "torchao") if pairings.quantize is not None else PACKAGES


def _dtypes(pipe: object) -> dict[str, str]:
    parts = {name: getattr(part, "dtype", None) for name, part in pipe.components.items()}
    return {
        name: str(dtype).removeprefix("torch.")
        for name, dtype in parts.items()
        if dtype is not None
    }


def hardware_line() -> str:
    """The machine in one line."""
    machine = hardware()
    if machine["gpu"]:
        return f"{machine['gpu']}, torch {importlib.metadata.version('torch')}"
    plural = "s" * (machine["num_threads"] != 1)
    return (
        f"{machine['num_threads']} thread{plural} of {machine['cpu']}, "
        f"torch {importlib.metadata.version('torch')}, Python {sys.version.split()[0]}"
    )
