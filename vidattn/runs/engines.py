"""What runs attention on this machine."""

from __future__ import annotations

import torch

from vidattn.kernels.cpp.processor import instruction_set
from vidattn.kernels.engines import block_sparse_cpu, flash
from vidattn.kernels.engines.block_sparse_triton import missing

DTYPES = ("float32", "bfloat16")


def states() -> dict[str, str]:
    """Of each engine that "auto" may choose, what it runs on here, or why it does not run."""
    why = block_sparse_cpu.missing(torch.float32)
    sets = ", ".join(f"{instruction_set(getattr(torch, name))} for {name}" for name in DTYPES)
    found = {"cpp": f"runs on {sets}" if why is None else why}
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        for engine, obstacle in (("triton", missing(device)), ("flash", flash.missing(device))):
            found[engine] = f"runs on {name}" if obstacle is None else obstacle
    else:
        found |= dict.fromkeys(("triton", "flash"), "there is no NVIDIA GPU")
    return found | {"torch": "runs everywhere"}
