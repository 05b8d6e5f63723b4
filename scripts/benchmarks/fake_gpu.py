"""An NVIDIA GPU that is not there: Triton compiles every launch for it, and none runs.

With it the whole path to a launch is tried on a machine without a GPU, and a folder of compiled
kernels is made that a machine with one then finds: its keys hold no paths.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vidattn.kernels.engines import block_sparse_triton
from vidattn.kernels.scoring import block_mass_triton


@dataclass(frozen=True)
class Launch:
    """What would have run."""

    kernel: str
    num_programs: int
    shared_bytes: int
    warps: int


class Driver:
    """What Triton asks of the machine before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def fake_gpu(arch: int = 90) -> Iterator[list[Launch]]:
    """Compile what the Triton engines launch on tensors of the CPU; gives the launches.

    What they return is memory that nobody wrote.
    """
    launches: list[Launch] = []

    def launch(kernel: Any, num_programs: int, **arguments: Any) -> None:
        made = kernel.run(grid=(num_programs,), warmup=True, **arguments, enable_fp_fusion=True)
        found = (made.metadata.shared, made.metadata.num_warps)
        launches.append(Launch(kernel.__name__, num_programs, *found))

    with ExitStack() as stack:
        patches = {
            (block_sparse_triton, "launch"): launch,
            (block_mass_triton, "launch"): launch,
            (block_sparse_triton, "_is_interpreted"): lambda: True,
            (block_sparse_triton, "INTERPRETED_AS"): arch,
        }
        for (owner, name), value in patches.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        # as it was afterwards: without a GPU Triton has no driver to go back to
        stack.enter_context(mock.patch.dict(vars(driver)))
        driver.set_active(Driver(arch))
        yield launches
