"""What a run goes on from: the weights that move, the state of the optimizers, and the step."""

import json
from pathlib import Path

import torch
from runs.checkpoints import find_checkpoint, new_checkpoint, require_same
from runs.settings_file import flat
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from video_training.settings import FREE
from video_training.trainee import Expert, Trainee

FOLDER = "checkpoints"


def save_checkpoint(trainee: Trainee) -> None:
    """Write a checkpoint, then delete the ones before it.

    Raises:
        OSError: it cannot be written; the one before it is whole.
    """
    accelerator = trainee.accelerator
    folder, is_main = _folder(trainee), accelerator.is_main_process
    # every process takes part in this
    states = {name: _state(expert) for name, expert in trainee.experts.items()}
    try:
        with new_checkpoint(
            folder,
            trainee.step,
            _record(trainee),
            is_main=is_main,
            wait=accelerator.wait_for_everyone,
        ) as partial:
            if is_main:
                for name, (weights, rest) in states.items():
                    save_file(weights, partial / f"{name}.safetensors")
                    torch.save(rest, partial / f"{name}.pt")
                progress = {"step": trainee.step, "seconds": trainee.seconds}
                (partial / "progress.json").write_text(json.dumps(progress))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {trainee.step} cannot be written ({error}); the last whole "
            f"one is {find_checkpoint(folder)}. Make room, then the same command goes on from there"
        ) from error


def load_newest(trainee: Trainee) -> Path | None:
    """Go on from the newest checkpoint, which is returned; None where there is none.

    Raises:
        ValueError: it was written with other settings, or is damaged.
    """
    path = find_checkpoint(_folder(trainee))
    if path is None:
        return None
    require_same(path, _record(trainee), FREE)
    try:
        progress = json.loads((path / "progress.json").read_text())
        for name, expert in trainee.experts.items():
            weights = load_file(path / f"{name}.safetensors")
            rest = torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)
            _load_state(expert, weights, rest)
    except (OSError, KeyError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint '{path}' is damaged ({error}): delete it") from error
    trainee.step, trainee.seconds = progress["step"], progress["seconds"]
    return path


def _folder(trainee: Trainee) -> Path:
    return Path(trainee.settings.run.output) / FOLDER


def _record(trainee: Trainee) -> dict[str, object]:
    return flat(trainee.settings) | {"processes": trainee.accelerator.num_processes}


def _state(expert: Expert) -> tuple[dict[str, Tensor], dict]:
    """The weights of an expert that move, and what else it takes to move them on."""
    weights = {name: whole(parameter) for name, parameter in expert.trained.items()}
    optimizer = expert.optimizer.state_dict()
    state = {
        index: {key: whole(x) if isinstance(x, Tensor) else x for key, x in slots.items()}
        for index, slots in optimizer["state"].items()
    }
    rest = {"optimizer": {**optimizer, "state": state}}
    if expert.average:
        rest["average"] = expert.average.state_dict()
    return weights, rest


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, also where every process holds a part of it."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _load_state(expert: Expert, weights: dict[str, Tensor], rest: dict) -> None:
    trained = expert.trained
    if trained.keys() != weights.keys():
        raise ValueError("it holds other weights than this run trains")
    for name, parameter in trained.items():
        parameter.copy_(_as_part(weights[name], parameter))
    # in the order in which the optimizer numbers them
    parameters = [p for group in expert.optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            key: _as_part(x, parameters[index])
            if isinstance(x, Tensor) and x.shape == parameters[index].shape
            else x
            for key, x in slots.items()
        }
        for index, slots in rest["optimizer"]["state"].items()
    }
    expert.optimizer.load_state_dict({**rest["optimizer"], "state": state})
    if expert.average:
        expert.average.load_state_dict(rest["average"])
        expert.average.to(next(iter(trained.values())).device)


def _as_part(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as the part of it that this process holds."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        value = distribute_tensor(value, like.device_mesh, like.placements)
    return value
