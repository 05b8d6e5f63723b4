"""What the shipped Triton kernels need, read off machine code compiled here, without a GPU.

Per shipped launch: registers, spilled bytes, shared memory, tensor-core and copy instructions, and
warp instructions issued for each score (times 32 lanes), in tiles that need no test and in tiles
that do. ``python scripts/triton_resources.py`` writes assets/benchmarks/triton_resources.{json,md}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path

import triton
from triton_machine_code import FUNCTIONS, Case, Resources, complaints, measure

from vidattn.kernels.triton_configs import ARCHITECTURES, HEAD_DIMS, KERNELS, Tile

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "assets" / "benchmarks" / "triton_resources"


def shipped_cases() -> list[Case]:
    """Every row of the table of tiles and what derives from it; the most used head dim first."""
    half = [
        Case(kernel, arch, head_dim)
        for head_dim in sorted(HEAD_DIMS, key=lambda n: abs(n - 128))
        for kernel in KERNELS
        for arch in ARCHITECTURES
    ]
    newest = [(kernel, arch) for kernel in KERNELS for arch in (80, 90, 100)]
    small = [Case(*one, 128, block=block) for one in newest for block in (64, 32, 16)]
    masks = [Case(*one, 128, rule="TABLE") for one in newest if one[0] != "block_mass"]
    plain = ("forward", "query_gradient", "key_gradient")
    bias = [Case(*one, 128, has_bias=True) for one in newest if one[0] in plain]
    single = [Case(kernel, 80, head_dim, "fp32") for head_dim in HEAD_DIMS for kernel in KERNELS]
    return half[: len(half) // 4] + bias + masks + small + half[len(half) // 4 :] + single


def _markdown(rows: list[tuple[Case, Resources]]) -> str:
    lines = [
        "# What the Triton kernels need",
        "",
        f"Compiled with Triton {triton.__version__} and no GPU by `scripts/triton_resources.py`. "
        "Slots are warp instructions x 32 for a score, in tiles without a test and with one.",
        "",
        "| kernel | sm | dtype | head dim | block | rule | tile | warps | stages | registers "
        "| spilled | shared KiB | tensor | slots |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in rows:
        shipped = found.tile
        tensor = [f"{name} {n}" for name, n in found.opcodes.items() if "MMA" in name]
        cells = (
            *(case.kernel, case.arch, case.dtype, case.head_dim, case.block),
            case.rule.lower() + (" with bias" if case.has_bias else ""),
            *(f"{shipped.rows}x{shipped.columns}", shipped.warps, shipped.stages),
            *(found.registers, found.spilled_bytes, f"{found.shared_bytes / 1024:.0f}"),
            *(", ".join(tensor) or "none", " / ".join(map(str, found.slots))),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    kept = _kept()
    rows = []
    for case in shipped_cases():
        found = kept.get(case) or measure(case)
        rows.append((case, found))
        print(case, *(complaints(case, found) or ["fits"]), sep="; ", flush=True)
        _write(rows)


def _source(kernel: str) -> str:
    """What the figures of a kernel depend on, beside its tile."""
    text = triton.__version__ + FUNCTIONS[kernel].cache_key
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept() -> dict[Case, Resources]:
    """What the file of an earlier, perhaps interrupted, run still says rightly."""
    path = OUTPUT.with_suffix(".json")
    written = json.loads(path.read_text())["kernels"] if path.exists() else []
    names = [field.name for field in fields(Case)]
    kept = {}
    for row in written:
        source, case = row.pop("source"), Case(*map(row.pop, names))
        found = Resources(**row | {"tile": Tile(**row["tile"])})
        if source == _source(case.kernel) and found.tile == case.tile:
            kept[case] = found
    return kept


def _write(rows: list[tuple[Case, Resources]]) -> None:
    table = [{"source": _source(c.kernel)} | asdict(c) | asdict(found) for c, found in rows]
    written = {"triton": triton.__version__, "kernels": table}
    OUTPUT.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    OUTPUT.with_suffix(".md").write_text(_markdown(rows))


if __name__ == "__main__":
    main()
