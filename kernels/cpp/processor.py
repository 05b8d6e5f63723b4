"""The instruction sets that the C++ engines are compiled for, and those of this processor."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch

from vidattn.kernels.cpp.compiler import CompileError, load

# what is compiled to see whether a compiler knows a set
SOURCE = Path(__file__).with_name("block_sparse_cpu.cpp")
# best first, with what the compiler is told; bfloat16 products take no float32
_AVX512 = ("-DVIDATTN_WIDTH=16", *(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq")), "-mfma")
SETS = {
    "amx_bf16": (
        *(*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        *("-DVIDATTN_PAIRS=1", "-DVIDATTN_AMX=1"),
    ),
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-DVIDATTN_PAIRS=1"),
    "avx512": (*_AVX512, "-DVIDATTN_PAIRS=0"),
    "avx2": ("-DVIDATTN_WIDTH=8", "-mavx2", "-mfma", "-DVIDATTN_PAIRS=0"),
    "portable": ("-DVIDATTN_WIDTH=4", "-DVIDATTN_PAIRS=0"),
}
log = logging.getLogger("vidattn")


@lru_cache
def instruction_sets() -> tuple[str, ...]:
    """Those of ``SETS`` that this processor has, best first."""
    level = torch.backends.cpu.get_cpu_capability()
    has = {"avx512": level == "AVX512", "avx2": level in ("AVX512", "AVX2"), "portable": True}
    has["avx512_bf16"] = has["avx512"] and torch.cpu._is_avx512_bf16_supported()
    # Linux hands the matrix registers to those that ask
    has["amx_bf16"] = has["avx512_bf16"] and torch.cpu._init_amx()
    return tuple(name for name in SETS if has[name])


@lru_cache
def instruction_set(dtype: torch.dtype) -> str:
    """The instruction set that runs a dtype on this processor."""
    names = [x for x in instruction_sets() if dtype == torch.bfloat16 or "bf16" not in x]
    if names[0] == "amx_bf16" and not _compiles("amx_bf16"):
        names = names[1:]
    return names[0]


def _compiles(name: str) -> bool:
    """Whether the compiler knows an instruction set, which older ones do not know AMX as."""
    try:
        load(SOURCE, SETS[name])
    except CompileError as error:
        log.info("the compiler does not know %s: %s", name, error)
        return False
    return True
