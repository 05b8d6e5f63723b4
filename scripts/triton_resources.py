"""What the shipped Triton kernels need, read off machine code compiled here, without a GPU.

Per shipped launch and version of Triton: registers, spilled bytes, shared memory, tensor-core and
copy instructions, and warp instructions issued for each score (times 32 lanes), in tiles that need
no test and in tiles that do. ``python scripts/triton_resources.py`` adds the version that is
installed to assets/benchmarks/triton_resources.{json,md}, and fails where a kernel does not fit.
Rows of kernels and tiles that are as they were stay, delete the files to measure all anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import triton
from benchmarks.triton_machine_code import FUNCTIONS, INTEGERS, Case, Resources, complaints, measure

from vidattn.kernels.triton import tiles as triton_tiles
from vidattn.kernels.triton.configs import ARCHITECTURES, HEAD_DIMS, KERNELS, QUANTISING, Tile

# by version of Triton
Rows = dict[str, dict[Case, Resources]]
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "assets" / "benchmarks" / "triton_resources"


def shipped_cases() -> list[Case]:
    """Every row of the table of tiles and what derives from it; the most used head dim first."""
    by_use = sorted(HEAD_DIMS, key=lambda n: abs(n - 128))
    half = [
        Case(kernel, arch, head_dim)
        for head_dim in by_use
        for kernel in (*KERNELS, *QUANTISING)
        for arch in ARCHITECTURES
    ]
    newest = [(kernel, arch) for kernel in KERNELS for arch in (80, 90, 100)]
    blocks = [(*one, block) for one in newest for block in (64, 32, 16)]
    # integers are multiplied 32 at a time
    blocks = [x for x in blocks if x[0] not in INTEGERS or x[2] >= 32]
    small = [Case(kernel, arch, 128, block=block) for kernel, arch, block in blocks]
    small += [Case(kernel, 90, 64, block=64) for kernel in KERNELS]
    masks = [Case(*one, 128, rule="TABLE") for one in newest if one[0] != "block_mass"]
    plain = ("forward", "query_gradient", "key_gradient", *INTEGERS)
    bias = [Case(*one, 128, has_bias=True) for one in newest if one[0] in plain]
    floats = [kernel for kernel in KERNELS if kernel not in INTEGERS]
    single = [Case(kernel, 80, head_dim, "fp32") for head_dim in by_use for kernel in floats]
    first, rest = half[: len(half) // 4], half[len(half) // 4 :]
    return first + small + bias + masks + rest + single


def recorded() -> Iterator[tuple[str, Case, Resources]]:
    """The rows of the file, each with the hash of the sources it was compiled from."""
    path = OUTPUT.with_suffix(".json")
    names = [field.name for field in fields(Case)]
    for row in json.loads(path.read_text())["kernels"] if path.exists() else ():
        source, case = row.pop("source"), Case(*map(row.pop, names))
        yield source, case, Resources(**row | {"tile": Tile(**row["tile"])})


def _kept() -> Rows:
    """What the file of an earlier, perhaps interrupted, run still says rightly."""
    rows: Rows = {}
    for source, case, found in recorded():
        if source == _source(case.kernel) and found.tile == case.tile:
            rows.setdefault(found.triton, {})[case] = found
    return rows


@cache
def _source(kernel: str) -> str:
    """What the figures of a kernel depend on, beside its tile and Triton: code, not its imports."""
    files = (FUNCTIONS[kernel].fn.__code__.co_filename, triton_tiles.__file__)
    text = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    imports = r"^(?:from|import) (?:[^(\n]*\([^)]*\)|[^\n]*)\n"
    code = re.sub(imports, "", text, flags=re.MULTILINE)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _write(rows: Rows) -> None:
    table = [
        json.dumps({"source": _source(case.kernel)} | asdict(case) | asdict(found))
        for version in _newest_first(rows)
        for case in shipped_cases()
        if (found := rows[version].get(case))
    ]
    OUTPUT.with_suffix(".json").write_text('{"kernels": [\n' + ",\n".join(table) + "\n]}\n")
    OUTPUT.with_suffix(".md").write_text(_markdown(rows))


def _newest_first(rows: Rows) -> list[str]:
    return sorted(rows, key=lambda version: [*map(int, version.split(".")[:2])], reverse=True)


def _markdown(rows: Rows) -> str:
    versions = _newest_first(rows)
    columns = [f"Triton {version}" for version in versions]
    lines = [
        "# What the Triton kernels need",
        "",
        "Compiled without a GPU by `scripts/triton_resources.py`. Under each version of Triton: "
        "registers, and what keeps the kernel from running well; - was not compiled. The rest is "
        "of the newest version: slots are warp instructions x 32 for a score, in tiles without a "
        "test and with one; ahead are the turns of the loop from the copy of a tile to its use.",
        "",
        "| kernel | sm | dtype | head dim | block | rule | tile | warps | stages | shared KiB "
        f"| tensor | slots | ahead | {' | '.join(columns)} |",
        "|---" * (13 + len(columns)) + "|",
    ]
    for case in shipped_cases():
        compiled = [rows[version].get(case) for version in versions]
        if found := next(filter(None, compiled), None):
            cells = (*_cells(case, found), *(_verdict(case, x) for x in compiled))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _cells(case: Case, found: Resources) -> tuple:
    shipped = found.tile
    tensor = [f"{name} {n}" for name, n in found.opcodes.items() if "MMA" in name]
    return (
        *(case.kernel, case.arch, case.dtype, case.head_dim, case.block),
        case.rule.lower() + (" with bias" if case.has_bias else ""),
        *(f"{shipped.rows}x{shipped.columns}", shipped.warps, shipped.stages),
        f"{found.shared_bytes / 1024:.0f}",
        ", ".join(tensor) or "none",
        *(" / ".join(map(str, x)) or "-" for x in (found.slots, found.ahead)),
    )


def _verdict(case: Case, found: Resources | None) -> str:
    return "-" if found is None else "; ".join([str(found.registers), *complaints(case, found)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    rows, bad = _kept(), 0
    own = rows.setdefault(triton.__version__, {})
    for case in shipped_cases():
        if case not in own:
            own[case] = measure(case)
            # what an earlier run found stays, wherever this one stops
            _write(rows)
        wrong = complaints(case, own[case])
        bad += bool(wrong)
        print(case, *(wrong or ["fits"]), sep="; ", flush=True)
    if bad:
        raise SystemExit(f"{bad} of {len(own)} kernels do not fit with Triton {triton.__version__}")


if __name__ == "__main__":
    main()
