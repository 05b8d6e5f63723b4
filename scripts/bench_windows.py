"""Time windows of one to three axes against their bound: python scripts/bench_windows.py.

In turns: the cpp engine as it walks over windows, and over the blocks of the same plan. Writes
windows_<instruction set>.json and .md, a table to each instruction set.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from benchmarks.attention_bound import measured_rates, shares_of_bound
from benchmarks.instruction_sets import add_set_argument, limit_to
from torch import Tensor
from tqdm import tqdm

from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods import plan as plan_of
from vidattn.plan import Plan
from vidattn.runs.hardware import hardware

HEADS = 2
TRIES = 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WINDOWS = [
    (Grid(1, 1, 16384), (1, 1, 49)),
    (Grid(1, 1, 16384), (1, 1, 405)),
    (Grid(1, 128, 128), (1, 7, 7)),
    (Grid(1, 128, 128), (1, 13, 13)),
    (Grid(1, 128, 128), (1, 19, 19)),
    (Grid(8, 32, 32), (5, 7, 7)),
    (Grid(16, 32, 32), (5, 9, 9)),
]
# how time grows with threads and tokens
SCALED = [Grid(frames, 32, 32) for frames in (4, 16, 64, 128)]
COLUMNS = {
    "grid": "grid",
    "window": "window",
    "head_dim": "D",
    "dtype": "dtype",
    "threads": "threads",
    "blocks_ms": "by blocks ms",
    "blocks_share": "of bound",
    "cpp_ms": "ms",
    "cpp_share": "of bound",
    "train_blocks_ms": "fwd+bwd by blocks ms",
    "train_blocks_share": "of bound",
    "train_cpp_ms": "fwd+bwd ms",
    "train_cpp_share": "of bound",
}
NOTES = """\
Milliseconds of CPU time, of all threads together, medians of {rounds} rounds in which everything is
called in turns, for {heads} heads. By blocks is the engine for any plan, on blocks of 64 tokens;
fwd+bwd is forward and backward. Of bound is as in [attention_cpu_avx2](attention_cpu_avx2.md): the
least time for the pairs that windows keep, at {rates} of one thread.
"""


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="times each function is called")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    add_set_argument(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    sets = limit_to(args.set)
    threads = torch.get_num_threads()
    cases = [(grid, window, 64, True, 1) for grid, window in WINDOWS]
    cases += [(*WINDOWS[-1], 128, True, 1)]
    cases += [
        (grid, (3, 9, 9), 64, False, count) for grid in SCALED for count in sorted({1, threads})
    ]
    torch.set_num_threads(1)
    rates = {name: best_rates(dtype) for name, dtype in DTYPES.items()}
    rows = []
    for case in tqdm(cases, unit="case"):
        torch.set_num_threads(case[-1])
        for dtype in DTYPES:
            rows.append(measure(*case, dtype, args.rounds, rates[dtype]))
    torch.set_num_threads(threads)
    machine = hardware() | {"torch": torch.__version__, "date": str(date.today())}
    report = {"hardware": machine, "instruction_sets": sets, "rounds": args.rounds, "rows": rows}
    report["flops_and_exps_per_s"] = rates
    text = to_markdown(report)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"windows_{args.set}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"windows_{args.set}.md").write_text(text)
    print(f"wrote {args.out / f'windows_{args.set}'}.json and .md")


def best_rates(dtype: torch.dtype) -> tuple[float, float]:
    """The highest of some measured rates of products and exponentials: others run beside."""
    peaks, exps = zip(*(measured_rates(dtype) for _ in range(TRIES)))
    return max(peaks), max(exps)


def measure(
    grid: Grid,
    window: tuple[int, int, int],
    head_dim: int,
    trains: bool,
    threads: int,
    dtype: str,
    rounds: int,
    rates: tuple[float, float],
) -> dict:
    """Times of one window, and their shares of the bound."""
    plan = plan_of("neighborhood", grid, window=window)
    # lists that were changed are walked over block by block
    plans = {"blocks": replace(plan, lists=replace(plan.lists)), "cpp": plan}
    q, k, v, pull = (
        torch.randn(1, HEADS, grid.num_tokens, head_dim).to(DTYPES[dtype]) for _ in range(4)
    )
    calls: dict[str, Callable[[], object]] = {}
    for name, each in plans.items():
        calls[name] = lambda each=each: attend(q, k, v, each, backend="cpp")
        if trains:
            calls[f"train_{name}"] = lambda each=each: train(q, k, v, pull, each)
    seconds = in_turns(calls, rounds)
    row = {"grid": grid.size, "window": window, "head_dim": head_dim, "dtype": dtype}
    row |= {"threads": threads, "tokens": grid.num_tokens, "density": plan.density}
    for name in plans:
        ms = {"cpp_ms": 1e3 * seconds[name], "train_cpp_ms": None}
        if trains:
            ms["train_cpp_ms"] = 1e3 * seconds[f"train_{name}"]
        found = shares_of_bound(row | ms, HEADS, *rates)
        row |= {f"{name}_ms": ms["cpp_ms"], f"{name}_share": found["cpp_share_of_bound"]}
        row[f"train_{name}_ms"] = ms["train_cpp_ms"]
        row[f"train_{name}_share"] = found["train_cpp_share_of_bound"]
    return row


def train(q: Tensor, k: Tensor, v: Tensor, pull: Tensor, plan: Plan) -> None:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(attend(*leaves, plan, backend="cpp"), leaves, pull)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; first calls, which compile, are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def to_markdown(report: dict) -> str:
    """The table, with the machine above and notes below."""
    machine, sets = report["hardware"], report["instruction_sets"]
    head = (
        f"# Windows on {machine['cpu']}\n\n"
        f"{machine['date']}; {machine['num_cores']} cores, {machine['system']}, torch "
        f"{machine['torch']}; the cpp engine on "
        f"{', '.join(f'{name} for {dtype}' for dtype, name in sets.items())}. "
        "`python scripts/bench_windows.py`\n"
    )
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(show(row[key]) for key in COLUMNS) for row in report["rows"]]
    rates = ", ".join(
        f"{peak / 1e9:.0f} GFLOP/s and {exps / 1e9:.1f} G exp/s in {dtype}"
        for dtype, (peak, exps) in report["flops_and_exps_per_s"].items()
    )
    notes = NOTES.format(rounds=report["rounds"], heads=HEADS, rates=rates)
    return "\n".join([head, *(f"| {line} |" for line in lines), "", notes])


def show(value: object) -> str:
    """One cell."""
    if value is None:
        return "-"
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
