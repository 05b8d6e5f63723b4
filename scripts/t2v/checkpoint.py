"""Checkpoints of a module with its optimizers in one safetensors file, replaced atomically."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **facts: int | str) -> None:
    """Write the file with its facts, or leave the old one as it was.

    Raises:
        ValueError: the disk is full, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={k: json.dumps(v) for k, v in facts.items()})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
        raise ValueError(
            f"could not write {path} of {size:.0f} MiB ({error}); what was written before is kept: "
            "make room and start again"
        ) from error


def read_fact(path: Path, name: str) -> int | str | None:
    """One fact of a file; None where there is no such file or fact."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get(name)
    return None if found is None else json.loads(found)


def save_checkpoint(
    path: Path, parts: dict[str, torch.nn.Module | torch.optim.Optimizer], **facts: int
) -> None:
    """Write every part's state under its name, with the `step` and other facts."""
    tensors = {}
    for name, part in parts.items():
        state = part.state_dict()
        if isinstance(part, torch.optim.Optimizer):
            state = {
                f"{i}.{key}": torch.as_tensor(value)
                for i, slots in state["state"].items()
                for key, value in slots.items()
            }
        tensors |= {
            f"{name}/{key}": value.detach().clone().contiguous() for key, value in state.items()
        }
    write_tensors(path, tensors, **facts)


def load_step(path: Path) -> int:
    """The step of a checkpoint; 0 where there is none."""
    return read_fact(path, "step") or 0


def load_checkpoint(path: Path, parts: dict[str, torch.nn.Module | torch.optim.Optimizer]) -> int:
    """Fill every part from the file and return its step; 0 where there is no file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, part in parts.items():
        own = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/", 1)[0] == name}
        if not isinstance(part, torch.optim.Optimizer):
            _fill(part, own, path)
            continue
        state = part.state_dict()
        state["state"] = {}
        for key, value in own.items():
            index, slot = key.split(".", 1)
            state["state"].setdefault(int(index), {})[slot] = value
        part.load_state_dict(state)
    return load_step(path)


def _fill(module: torch.nn.Module, own: dict[str, torch.Tensor], path: Path) -> None:
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another model than the configuration asks for; delete it or choose "
            "another work folder"
        ) from error


def learning_rate(step: int, *, peak: float, total: float, warmup: int, decay: int) -> float:
    """Linear rise over `warmup`, flat, linear fall to 2 % over the last `decay` steps."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    fall = min(1.0, max(0.02, (total - step) / max(decay, 1)))
    return peak * rise * fall
