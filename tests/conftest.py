"""Every test: one seed, the threads of this worker, and torch.empty poisoned with NaN."""

import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# A shell that runs the tests in the background may have made them deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def _poisoned(make):
    """Wrap an allocator so that what it leaves uninitialised is NaN, or the largest integer."""

    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        # What the compiler allocates while it traces holds no data to poison.
        traced = torch.compiler.is_compiling() or type(tensor) is not torch.Tensor
        if traced or kwargs.get("out") is not None:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype is not torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned


@pytest.fixture(scope="session", autouse=True)
def poison_empty():
    """Make memory that nobody wrote show up as NaN."""
    # a device that is set learns the allocators once: it must not take ours for them
    with torch.device("meta"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def seed():
    """Give every test the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """The folder of the tiny pipeline of the command line's tests; not to be changed."""
    from tests.commands.cli_cases import tiny_wan

    folder = tmp_path_factory.mktemp("tiny") / "wan"
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture
def model(original, tmp_path):
    """A copy of the folder, to be broken."""
    return Path(shutil.copytree(original, tmp_path / "model"))
