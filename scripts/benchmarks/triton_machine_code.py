"""Compiles one of the Triton kernels for a GPU that is not here and reads what it needs.

The tools that take machine code apart come with Triton. A multiprocessor is to hold 8 warps, not
two programs: those wait at barriers of their own, but the gradients of 64 keys of head dim 128 take
the registers of a whole multiprocessor for one program of 8 warps.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
from benchmarks.triton_loops import turns_ahead
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidattn.kernels.triton import block_mass as triton_block_mass
from vidattn.kernels.triton import forward as triton_forward
from vidattn.kernels.triton import key_gradient as triton_key_gradient
from vidattn.kernels.triton import quantise as triton_quantise
from vidattn.kernels.triton import quantised as triton_quantised
from vidattn.kernels.triton import query_gradient as triton_query_gradient
from vidattn.kernels.triton import tiles as triton_tiles
from vidattn.kernels.triton.configs import (
    QUANTISING,
    SHARED_BYTES,
    Tile,
    padded_head_dim,
    quantising_tile,
    tile,
)

TOOLS = Path(nvidia.__file__).parent / "bin"
REGISTERS = 65536
# of one thread
MOST_REGISTERS = 255
# two programs of 4 warps, or one of 8: one of 4 leaves a multiprocessor idle at every wait
LEAST_WARPS = 8
# the tensor-core instructions of each architecture, for floating point and for 8-bit integers
FLOAT_OPCODE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
INTEGER_OPCODE = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
OPCODES = {"int8_qk": (INTEGER_OPCODE, FLOAT_OPCODE), "int8": (INTEGER_OPCODE,)}
# arguments that are 8-bit integers
INTEGERS = {"int8_qk": ("q", "k"), "int8": ("q", "k", "v")}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
FUNCTIONS = {
    "forward": triton_forward.forward_kernel,
    "query_gradient": triton_query_gradient.query_gradient_kernel,
    "key_gradient": triton_key_gradient.key_gradient_kernel,
    "key_gradient_bias": triton_key_gradient.key_gradient_kernel,
    "block_mass": triton_block_mass.block_mass_kernel,
    "int8_qk": triton_quantised.quantised_kernel,
    "int8": triton_quantised.quantised_kernel,
    "quantise_queries": triton_quantise.quantise_blocks_kernel,
    "quantise_keys": triton_quantise.quantise_blocks_kernel,
    "quantise_values": triton_quantise.quantise_channels_kernel,
}
# arguments that are tensors but not of the dtype of q
POINTERS = {
    **dict.fromkeys(("order", "key_order", "num_clear", "num_whole", "listed", "mask_id"), "*i32"),
    **dict.fromkeys(("key_code", "low", "high"), "*i32"),
    **dict.fromkeys(
        ("lse", "slot_lse", "delta", "mass", "key_bias", "d_bias", "gain", "shift"), "*fp32"
    ),
    **dict.fromkeys(("query_scales", "key_scales", "value_scales"), "*fp32"),
    **dict.fromkeys(("mean", "along", "scales", "factors"), "*fp32"),
    "codes": "*i8",
    "row_start": "*i64",
    "masks": "*u8",
    "readable": "*u8",
}
TABLE_ARGUMENTS = ("mask_id", "masks")
BOX_ARGUMENTS = ("key_code", "low", "high")
BIAS_ARGUMENTS = ("key_bias", "d_bias")  # in the order in which they are asked for


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched."""

    kernel: str
    arch: int
    head_dim: int
    dtype: str = "bf16"
    block: int = 128
    rule: str = "BOX"
    has_bias: bool = False

    @property
    def tile(self) -> Tile:
        """What it is launched with."""
        if self.kernel in QUANTISING:
            return quantising_tile(self.head_dim)
        size = (ITEMSIZE[self.dtype], self.head_dim, self.block)
        extras = {"has_masks": self.rule == "TABLE", "has_bias": self.has_bias}
        return tile(self.kernel, self.arch, *size, **extras)


@dataclass(frozen=True)
class Resources:
    """What a kernel needs, compiled with one version of Triton."""

    triton: str
    tile: Tile
    registers: int
    spilled_bytes: int
    shared_bytes: int
    opcodes: dict[str, int]
    slots: list[float]  # warp instructions x 32 for a score, in tiles without a test and with one
    ahead: list[int]  # turns of each loop with products from the copy of a tile to the wait for it
    is_serial: bool  # whether each product of warp groups is waited for before the next is issued


def measure(case: Case, launch: Tile | None = None) -> Resources:
    """Compile a kernel as it ships, or with another tile."""
    shipped = launch or case.tile
    compiled = _compile(case, shipped)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    opcodes, loops = _read_code(code)
    counts = Counter(opcodes)
    per_score = 32 * shipped.warps / (shipped.rows * shipped.columns)
    # the passes over keys or queries are the loops with an exponential, innermost ones first
    sizes = sorted(len(loop) for loop in loops if "MUFU" in loop)[:2]
    return Resources(
        triton=triton.__version__,
        tile=shipped,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled_bytes=sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        opcodes={name: counts[name] for name in sorted(counts) if _is_noted(name)},
        slots=[round(size * per_score, 1) for size in sizes],
        ahead=turns_ahead(compiled.asm["ttgir"]),
        is_serial="HGMMA" in counts and _is_serial(compiled.asm["ptx"]),
    )


def complaints(case: Case, found: Resources) -> list[str]:
    """What keeps a compiled kernel from running well on its architecture."""
    wrong = []
    # a tile without tensor cores takes a thousand instructions: ten numbers more are nothing; and
    # older compilers put two aside, once, to keep to a number of registers below the limit
    allowed = 40 if ITEMSIZE[case.dtype] != 2 else 8 if found.registers < MOST_REGISTERS else 0
    if found.spilled_bytes > allowed:
        wrong.append(f"spills {found.spilled_bytes} bytes")
    if found.shared_bytes > SHARED_BYTES[case.arch]:
        wrong.append(f"{found.shared_bytes} bytes of shared memory, {SHARED_BYTES[case.arch]} fit")
    if found.registers * found.tile.warps * 32 > REGISTERS:
        wrong.append(f"{found.registers} registers for {found.tile.warps} warps")
    elif (warps := warps_at_once(case.arch, found)) < LEAST_WARPS:
        wrong.append(f"{warps} warps fit a multiprocessor, {LEAST_WARPS} keep it busy")
    if case.kernel in QUANTISING:
        # no products, and so no copies made ahead of them
        return wrong
    if ITEMSIZE[case.dtype] == 2:
        wrong += _tensor_complaints(case, found)
    if not found.ahead or min(found.ahead) < 1:
        wrong.append(f"loops that wait for their own copies: tiles are {found.ahead} turns ahead")
    if found.is_serial:
        wrong.append("products of warp groups that wait for one another")
    return wrong


def warps_at_once(arch: int, found: Resources) -> int:
    """Warps of a kernel that a multiprocessor holds, in whole programs."""
    # registers are given out 8 at a time, and every program takes 1 KiB of shared memory more
    registers = -(-found.registers // 8) * 8 * 32 * found.tile.warps
    shared = (SHARED_BYTES[arch] + 1024) // (found.shared_bytes + 1024)
    return min(shared, REGISTERS // registers) * found.tile.warps


def _tensor_complaints(case: Case, found: Resources) -> list[str]:
    # the newer units take tiles from 64 queries on
    large = min(found.tile.rows, found.tile.columns) >= 64 and found.tile.warps >= 4
    wrong = []
    for opcodes in OPCODES.get(case.kernel, (FLOAT_OPCODE,)):
        oldest, expected = opcodes[80], opcodes[case.arch]
        # Triton 3.5 and 3.6 multiply integers on sm_100 as on sm_80
        is_old = opcodes is INTEGER_OPCODE and found.triton.startswith(("3.5.", "3.6."))
        if (is_old or not large) and not found.opcodes.get(expected):
            expected = oldest
        if not found.opcodes.get(expected):
            wrong.append(f"no {expected}")
        elif expected != oldest and found.opcodes.get(oldest):
            wrong.append(f"{oldest}, the tensor-core instruction of an older architecture")
    return wrong


def _is_serial(ptx: str) -> bool:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)[1]
        return "serialized" in _tool(
            "ptxas", "-v", "--gpu-name", target, file.name, "-o", "/dev/null"
        )


def _is_noted(opcode: str) -> bool:
    return "MMA" in opcode or opcode in ("LDGSTS", "UTMALDG", "LDL", "STL", "BAR")


def _compile(case: Case, shipped: Tile) -> Any:
    function = FUNCTIONS[case.kernel]
    constants = {
        "D": case.head_dim,
        "BD": padded_head_dim(case.head_dim),
        "BLOCK": case.block,
        "BM": shipped.rows,
        "BN": shipped.columns,
        "R": shipped.rows,
        "RULE": getattr(triton_tiles, case.rule).value,
        "STAGES": shipped.stages,
        "ROUNDED": case.kernel == "int8",
        **dict.fromkeys(("gain", "shift")),
    }
    if case.kernel == "int8_qk":
        constants["value_scales"] = None
    if case.kernel != "quantise_queries":
        constants["along"] = None
    if case.rule != "TABLE":
        constants |= dict.fromkeys(TABLE_ARGUMENTS)
    if case.rule != "BOX":
        constants |= dict.fromkeys(BOX_ARGUMENTS)
    if case.kernel != "key_gradient_bias":
        constants |= dict.fromkeys(BIAS_ARGUMENTS[case.has_bias :])
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
            continue
        signature[name] = (
            "*i8" if name in INTEGERS.get(case.kernel, ()) else _type(name, case.dtype)
        )
        # strides of tokens and addresses are multiples of 16, and are compiled as such at run time
        per_row = name.startswith(("stride_row", "stride_bias", "stride_readable"))
        if signature[name][0] == "*" or (name.startswith("stride") and not per_row):
            attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": shipped.warps, "enable_fp_fusion": True}
    if case.kernel in QUANTISING:
        # the others name the stages of each loop
        options["num_stages"] = shipped.stages
    return triton.compile(
        ASTSource(function, signature, fixed, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options=options,
    )


def _type(name: str, dtype: str) -> str:
    if name in POINTERS:
        return POINTERS[name]
    if name == "scale":
        return "fp32"
    is_integer = name.startswith(("stride", "num_")) or name in ("guard", "group")
    return "i32" if is_integer else f"*{dtype}"


def _tool(name: str, *arguments: str) -> str:
    ran = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


def _read_code(code: str) -> tuple[list[str], list[list[str]]]:
    """Opcodes of a disassembly in order, and those of every loop."""
    opcodes, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line):
            opcodes.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2]) if found[1] == "BRA" else None
            if target and target[0] in labels:
                loops.append(opcodes[labels[target[0]] :])
    return opcodes, loops
