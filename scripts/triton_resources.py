"""What the shipped Triton kernels need, read off machine code compiled here, without a GPU.

Per shipped launch: registers, spilled bytes, shared memory, tensor-core and copy instructions, and
warp instructions issued for each score (times 32 lanes), in tiles that need no test and in tiles
that do. ``python scripts/triton_resources.py`` writes assets/benchmarks/triton_resources.{json,md};
rows of kernels and tiles that are as they were stay, delete the files to measure all anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path

import triton
from triton_machine_code import FUNCTIONS, INTEGERS, Case, Resources, complaints, measure

from vidattn.kernels import triton_tiles
from vidattn.kernels.triton_configs import ARCHITECTURES, HEAD_DIMS, KERNELS, QUANTISING, Tile

# the version of Triton that compiled a kernel, and what it needs
Row = tuple[str, Resources]
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


def _markdown(rows: dict[Case, Row]) -> str:
    lines = [
        "# What the Triton kernels need",
        "",
        "Compiled without a GPU by `scripts/triton_resources.py`. "
        "Slots are warp instructions x 32 for a score, in tiles without a test and with one; ahead "
        "are the turns of the loop from the copy of a tile to its use.",
        "",
        "| kernel | sm | dtype | head dim | block | rule | tile | warps | stages | registers "
        "| spilled | shared KiB | tensor | slots | ahead | Triton |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, (version, found) in rows.items():
        shipped = found.tile
        tensor = [f"{name} {n}" for name, n in found.opcodes.items() if "MMA" in name]
        cells = (
            *(case.kernel, case.arch, case.dtype, case.head_dim, case.block),
            case.rule.lower() + (" with bias" if case.has_bias else ""),
            *(f"{shipped.rows}x{shipped.columns}", shipped.warps, shipped.stages),
            *(found.registers, found.spilled_bytes, f"{found.shared_bytes / 1024:.0f}"),
            ", ".join(tensor) or "none",
            *(" / ".join(map(str, x)) or "-" for x in (found.slots, found.ahead)),
            version,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    known, shipped = _kept(), shipped_cases()
    for case in shipped:
        if case not in known:
            known[case] = triton.__version__, measure(case)
            # what an earlier run found stays, wherever this one stops
            _write({case: known[case] for case in shipped if case in known})
        print(case, *(complaints(case, known[case][1]) or ["fits"]), sep="; ", flush=True)


def _source(kernel: str) -> str:
    """What the figures of a kernel depend on, beside its tile and Triton."""
    files = (FUNCTIONS[kernel].fn.__code__.co_filename, triton_tiles.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def _kept() -> dict[Case, Row]:
    """What the file of an earlier, perhaps interrupted, run still says rightly."""
    path = OUTPUT.with_suffix(".json")
    written = json.loads(path.read_text())["kernels"] if path.exists() else []
    names = [field.name for field in fields(Case)]
    kept = {}
    for row in written:
        version, source, case = row.pop("triton"), row.pop("source"), Case(*map(row.pop, names))
        found = Resources(**row | {"tile": Tile(**row["tile"])})
        if source == _source(case.kernel) and found.tile == case.tile:
            kept[case] = version, found
    return kept


def _write(rows: dict[Case, Row]) -> None:
    table = [
        {"triton": version, "source": _source(case.kernel)} | asdict(case) | asdict(found)
        for case, (version, found) in rows.items()
    ]
    OUTPUT.with_suffix(".json").write_text(json.dumps({"kernels": table}, indent=1) + "\n")
    OUTPUT.with_suffix(".md").write_text(_markdown(rows))


if __name__ == "__main__":
    main()
