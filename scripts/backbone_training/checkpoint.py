"""Checkpoints that appear whole or not at all, averaged weights, and how far a run has come."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from backbone_training.settings import Settings
from runs.checkpoints import new_checkpoint, require_same
from runs.settings_file import flat
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# a run that is resumed may differ in these, for they change no number that is computed
FREE = ("data.workers", "run.output", "run.save_every", "run.log_every", "run.tensorboard")


class Average:
    """An exponential moving average of the weights of a model.

    Args:
        model: after it was prepared for training, so that its parameters are where they stay.
        decay: share of the old average in a step; smaller in the first steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a number of steps."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            slow = self.tensors[key]
            if slow.is_floating_point():
                slow.lerp_(value, 1 - keep)
            else:
                slow.copy_(value)

    @contextmanager
    @torch.no_grad()
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averaged weights inside the block."""
        own = {key: value.detach().clone() for key, value in model.state_dict().items()}
        try:
            _copy(self.tensors, model.state_dict())
            yield
        finally:
            _copy(own, model.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors, also where every process holds a part."""
        return {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in self.tensors.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        for key, slow in self.tensors.items():
            value = state[key].to(slow.device)
            if isinstance(slow, DTensor):
                value = distribute_tensor(value, slow.device_mesh, slow.placements)
            slow.copy_(value)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, value in target.items():
        value.copy_(source[key])


class Progress:
    """How far a run has come, how long that took, and what was found on the way."""

    def __init__(self):
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        # indices of training images that cannot be read
        self.unreadable = []

    def state_dict(self) -> dict:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Take what `state_dict` gave."""
        vars(self).update(state)


def save_checkpoint(accelerator: Accelerator, folder: Path, settings: Settings, step: int) -> None:
    """Write a checkpoint, then delete the ones before it; killed at any point, one stays whole."""
    is_main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    record = _record(accelerator, settings)
    with new_checkpoint(folder, step, record, is_main=is_main, wait=wait) as partial:
        accelerator.save_state(str(partial))


def load_checkpoint(accelerator: Accelerator, path: Path, settings: Settings) -> None:
    """Continue where a checkpoint was written.

    Raises:
        ValueError: it was written with other settings; they are listed.
    """
    require_same(path, _record(accelerator, settings), FREE)
    accelerator.load_state(str(path))


def _record(accelerator: Accelerator, settings: Settings) -> dict[str, object]:
    return flat(settings) | {"processes": accelerator.num_processes}
