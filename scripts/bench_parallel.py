"""Bytes and work of attention that is spread over processes: python scripts/bench_parallel.py.

Measured with processes on this machine, in a layer of Wan under diffusers' context parallelism;
modelled for more processes at the size of Wan 2.1 14B, 720p. Writes parallel.json and parallel.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.parallel_counts import balance, bytes_sent, pairs_of_ranks, shares
from benchmarks.parallel_layer import Case, Spread, measure

from vidattn.choice import parse_choice
from vidattn.grid import Grid
from vidattn.pipelines.hooks.ring import turns
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json

MEASURED = Case(
    ("radial", "neighborhood:window=5,9,9", "sliding_tile", "topk:density=0.25"),
    size=(10, 20, 20),
    num_heads=4,
    head_dim=64,
)
MODELLED = Case(("radial", "neighborhood", "sliding_tile"), (21, 45, 80), 40, 128)
COUNTS = (1, 2, 4, 8, 16, 32, 64)
# bytes of a bfloat16
ITEMSIZE = 2
MIB = 2**20
INTRODUCTION = """\
# Attention over several processes

Processes of one thread each on {cpu}, {num_cores} cores; {system}, torch {torch}. `{command}`

sent: what one process sends to others in the forward pass of one attention call, the largest. Work
is the pairs of queries and keys in the blocks that an engine visits: busiest is that of the busiest
process over the mean, all that of all processes together over that of one process alone. Where both
are 1, nobody waits and nothing is computed twice.

Ulysses hands every process some heads of all tokens: its work is even where the number of processes
divides that of heads. In a ring every process gets all queries, keys and values, and query blocks
are dealt in turn, so that none is computed twice; outputs go to the process whose tokens they are
of. A ring sends more: let Ulysses have as many processes as divide the heads, and a ring the rest.
"""
MEASURED_NOTES = """\

## Measured

One layer of Wan, {tokens:,} tokens ({grid}), {heads} heads of {dim}, float32; Gloo connects the
processes. error: of the output, relative to that of one process. Wall time is that of the slowest
process, CPU time that of the busiest, both of a second call, projections included; more processes
than cores take turns.
"""
MODELLED_NOTES = """\

## Modelled

The same counts for Wan 2.1 14B at 720p: {tokens:,} tokens ({grid}), {heads} heads of {dim},
bfloat16, one sample.
"""


def main() -> None:
    """Measure, model, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--processes", type=int, nargs="+", choices=(2, 4), default=(2, 4), help="to measure"
    )
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    args = parser.parse_args()
    out = writable_folder(args.out, "--out")
    report: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/bench_parallel.py", *sys.argv[1:]]),
        "hardware": hardware() | {"torch": torch.__version__},
        "modelled": model(MODELLED, COUNTS),
        "measured": measure(MEASURED, (1, *args.processes)),
    }
    write_json(out / "parallel.json", report)
    with write_atomically(out / "parallel.md") as partial:
        partial.write_text(to_markdown(report), encoding="utf-8")
    print(f"wrote {out / 'parallel'}.json and .md")


def model(case: Case, counts: Sequence[int]) -> dict:
    """The counts of every process of a call that is not made."""
    grid = Grid(*case.size)
    plans = {label: parse_choice(label).create().plan(grid) for label in case.methods}
    rows = []
    for num in counts:
        lengths = shares(grid.num_tokens, num)
        for spread in _spreads(num):
            sent, pairs = {}, {}
            for label, plan in plans.items():
                sent[label] = bytes_sent(
                    lengths,
                    spread.ulysses,
                    num_heads=case.num_heads,
                    head_dim=case.head_dim,
                    itemsize=ITEMSIZE,
                    owner=turns(plan.layout, spread.ring),
                )
                pairs[label] = pairs_of_ranks(plan, spread.ring, spread.ulysses, case.num_heads)
            rows.append(spread._asdict() | {"sent": sent, "pairs": pairs})
    return case._asdict() | {"rows": rows}


def _spreads(num: int) -> list[Spread]:
    """Ulysses alone, a ring alone, and a ring of groups of eight."""
    spreads = [Spread(num, 1), Spread(1, num)]
    if num > 8:
        spreads.append(Spread(8, num // 8))
    return list(dict.fromkeys(spreads))


def to_markdown(report: dict) -> str:
    """What was measured, and what was modelled."""
    measured, modelled = report["measured"], report["modelled"]
    lines = [
        INTRODUCTION.format(**report["hardware"], command=report["command"])
        + MEASURED_NOTES.format(**_sizes(measured)),
        *_measured_lines(measured),
        MODELLED_NOTES.format(**_sizes(modelled)),
        *_modelled_lines(modelled),
    ]
    return "\n".join(lines) + "\n"


def _measured_lines(measured: dict) -> list[str]:
    rows = measured["rows"]
    lines = [
        "| plan | spread | sent MiB | busiest | all | wall s | CPU s | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    alone = {row["method"]: sum(row["pairs"]) for row in rows if len(row["pairs"]) == 1}
    for row in sorted(rows, key=lambda row: measured["methods"].index(row["method"])):
        busiest, every = _work(row["pairs"], alone[row["method"]])
        lines.append(
            f"| `{row['method']}` | {Spread(row['ulysses'], row['ring'])} | "
            f"{max(row['sent']) / MIB:.1f} | {busiest} | {every} | {max(row['seconds']):.2f} | "
            f"{max(row['cpu_seconds']):.2f} | {max(row['error']):.0g} |"
        )
    return lines


def _modelled_lines(modelled: dict) -> list[str]:
    methods, rows = modelled["methods"], modelled["rows"]
    plans = " | ".join(f"`{name}` busiest | all" for name in methods)
    lines = [
        f"| processes | spread | sent MiB | {plans} |",
        f"| ---: | --- | ---: |{' ---: |' * 2 * len(methods)}",
    ]
    for row in rows:
        figures = [_work(row["pairs"][name], sum(rows[0]["pairs"][name])) for name in methods]
        sent = max(map(max, row["sent"].values())) / MIB
        lines.append(
            f"| {row['ulysses'] * row['ring']} | {Spread(row['ulysses'], row['ring'])} | "
            f"{sent:,.0f} | {' | '.join(x for pair in figures for x in pair)} |"
        )
    return lines


def _sizes(case: dict) -> dict:
    t, h, w = case["size"]
    return {
        "tokens": t * h * w,
        "grid": f"{t}x{h}x{w}",
        "heads": case["num_heads"],
        "dim": case["head_dim"],
    }


def _work(pairs: Sequence[int], alone: int) -> tuple[str, str]:
    """The busiest process over the mean, and all over one process alone."""
    return f"{balance(pairs):.3f}", f"{sum(pairs) / alone:.3f}"


if __name__ == "__main__":
    main()
