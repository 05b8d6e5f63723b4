"""Processes that share one video, or a list of them: what torchrun and accelerate launch start.

Nothing at the top of this file needs PyTorch, so that flags are read without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidattn.grid import Grid

# what launchers tell each process
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among those that were started together.

    Args:
        rank: its number; local_rank is that on this machine, and of its device.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1


def find_processes() -> Processes:
    """What a launcher says, or one process alone."""
    if not all(name in os.environ for name in VARIABLES):
        return Processes()
    return Processes(*[int(os.environ[name]) for name in VARIABLES])


def check_alone(command: str) -> None:
    """Refuse to do the same, and write the same files, in each of several processes.

    Raises:
        ValueError: this process is one of several.
    """
    if (count := find_processes().count) > 1:
        raise ValueError(
            f"vidattn {command} runs in one process, and this is one of {count}: start it without "
            "torchrun or accelerate launch; `vidattn generate` can share videos"
        )


@dataclass(frozen=True)
class Degrees:
    """How the tokens of one video are spread over processes."""

    ulysses: int = 1
    ring: int = 1

    @property
    def count(self) -> int:
        """Processes that it takes."""
        return self.ulysses * self.ring

    def __str__(self):
        given = {name: degree for name, degree in vars(self).items() if degree > 1}
        return ",".join(f"{name}={degree}" for name, degree in given.items())


def parse_parallel(text: str) -> Degrees:
    """Degrees from ``ulysses=2``, ``ring=2`` or ``ulysses=2,ring=2``.

    Raises:
        ValueError: other words, or numbers that are not those of the processes.
    """
    pieces = [piece.partition("=")[::2] for piece in text.split(",")]
    names = [name.strip() for name, _ in pieces]
    fine = set(names) <= {"ulysses", "ring"} and len(set(names)) == len(names)
    if not fine or not all(number.strip().isdecimal() for _, number in pieces):
        raise ValueError(f"--parallel takes ulysses=N, ring=N or ulysses=N,ring=N, got '{text}'")
    degrees = Degrees(**{name: int(number) for name, (_, number) in zip(names, pieces)})
    if degrees.count < 2:
        raise ValueError(f"--parallel {text} is for two processes or more; leave it out for one")
    if (started := find_processes().count) != degrees.count:
        raise ValueError(
            f"--parallel {text} needs {degrees.count} processes, and this is one of {started}: "
            f"start it with torchrun --nproc-per-node {degrees.count} -m vidattn generate ..."
        )
    return degrees


def check_degrees(pipe: Any, degrees: Degrees, grid: Grid | None) -> None:
    """Compare the spread with a pipeline, or with its skeleton.

    Args:
        grid: the tokens of the video, where they are known.

    Raises:
        ValueError: a transformer that is not spread, or tokens or heads that do not divide.
    """
    from vidattn.pipelines.family import family_of, shape_of
    from vidattn.pipelines.models import find_transformers

    for model in find_transformers(pipe).values():
        kind, heads = type(model).__name__, shape_of(model).heads
        if getattr(model, "_cp_plan", None) is None:
            raise ValueError(f"diffusers does not spread {kind}; leave --parallel {degrees} out")
        if heads is not None and heads % degrees.ulysses:
            raise ValueError(
                f"--parallel {degrees} cannot share the {heads} heads of {kind} equally: take a "
                "number that divides them, or ring"
            )
        if grid is not None and family_of(model).beside == "nothing":
            if grid.num_video_tokens % degrees.count:
                raise ValueError(
                    f"--parallel {degrees} cannot share {grid.num_video_tokens} tokens "
                    f"({grid.t}x{grid.h}x{grid.w}) equally: change --frames, --height or --width, "
                    "or the number of processes"
                )


@contextmanager
def spread(pipe: Any, degrees: Degrees | None) -> Iterator[None]:
    """Have the processes share each video in the block; nothing happens without degrees."""
    if degrees is None:
        yield
        return
    import torch
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    from vidattn.pipelines.models import find_transformers

    device = pipe._execution_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo")
    try:
        with _a_device_to_count():
            for model in find_transformers(pipe).values():
                config = ContextParallelConfig(
                    ulysses_degree=degrees.ulysses, ring_degree=degrees.ring
                )
                model.enable_parallelism(config=config)
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _a_device_to_count() -> Iterator[None]:
    """Have a CPU count as a device: diffusers divides by the number of accelerators."""
    import torch

    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(1, count())
    try:
        yield
    finally:
        torch.accelerator.device_count = count
