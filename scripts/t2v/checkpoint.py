"""Checkpoints of a module with its optimizers in one safetensors file, replaced atomically."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def save_checkpoint(
    path: Path, step: int, parts: dict[str, torch.nn.Module | torch.optim.Optimizer]
) -> None:
    """Write every part's state under its name, or leave the old file as it was."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": json.dumps(step)})
    os.replace(partial, path)


def load_checkpoint(path: Path, parts: dict[str, torch.nn.Module | torch.optim.Optimizer]) -> int:
    """Fill every part from the file and return its step; 0 where there is no file."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["step"])
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
    return step


def _fill(module: torch.nn.Module, own: dict[str, torch.Tensor], path: Path) -> None:
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another model than the configuration asks for; delete it or choose "
            "another work folder"
        ) from error


def learning_rate(step: int, *, peak: float, total: int, warmup: int, decay: int) -> float:
    """Linear rise over `warmup`, flat, linear fall to 2 % over the last `decay` steps."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    fall = min(1.0, max(0.02, (total - step) / max(decay, 1)))
    return peak * rise * fall
