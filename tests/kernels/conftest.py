"""What tests of kernels share."""

import pytest

from vidattn.kernels.cpp.processor import instruction_sets
from vidattn.kernels.engines import block_sparse_cpu


@pytest.fixture
def use(monkeypatch):
    """Run the C++ engine on one instruction set."""

    def choose(name):
        if name not in instruction_sets():
            pytest.skip(f"this processor lacks {name}")
        monkeypatch.setattr(block_sparse_cpu, "instruction_set", lambda dtype: name)

    return choose
