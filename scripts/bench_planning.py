"""Time planning on this machine: python scripts/bench_planning.py.

Radial and neighborhood plans for 118,800 and 1,000,000 tokens, each in a process of its own so that
the memory is its own too; then the pairs that radial attention visits as a video gets longer, with
the exponent of their growth; then what methods that read content spend on searching, as a share of
dense attention over a generation. Writes planning.json and planning.md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.commands.draw import smooth_content
from vidattn.content import ContentMethod
from vidattn.grid import Grid
from vidattn.measure import hardware
from vidattn.methods import create_method, list_methods, method_class
from vidattn.methods import plan as plan_of

# HunyuanVideo at 129x720x1280, and a round million
GRIDS = ((33, 45, 80), (250, 50, 80))
# labels, with the method and its options
METHODS = {
    "radial": ("radial", {}),
    "radial, density 0.3": ("radial", {"density": 0.3}),
    "neighborhood": ("neighborhood", {}),
    "neighborhood, window 9x21x41": ("neighborhood", {"window": (9, 21, 41)}),
}
# what a plan may take at most: seconds, and MiB it holds
LIMITS = {118_800: (1.0, 64.0), 1_000_000: (10.0, 1024.0)}
FRAMES = ((16, 16), (32, 32))
LENGTHS = tuple(2**i for i in range(12, 18))
# one head of a generation: tokens, steps, and the share of dense attention that searches may take
SEARCHED, NUM_STEPS, HEAD_DIM, MOST = (16, 32, 64), 50, 64, 0.05
NOTES = """\
Time is the median of {rounds} plans, after one that is not counted, for each the lesser of wall
clock and CPU time. Held is the memory of the plan; peak is what the process needed at most while
making it, beyond what it had before.

## Growth

Radial with its defaults, as a video of one frame size gets longer. Once all windows have halved,
every doubling adds the same number of keys to a query: that is N log N. Few frames are read nearly
whole, so the exponent, fitted over the whole range, is larger the larger the frames.

{growth}

## Searching

Methods that read content, with their defaults, on one head of {tokens:,} tokens and {dim}
dimensions in float32, on one thread. A generation of {steps} steps, none of them dense, searches as
often as the method says; overhead is the time of these searches over that of dense attention,
{dense_s:.2f} s a step. A later search may take something over from the one before.

{searches}
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="plans that are timed")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--method", action="append", help="search with this method alone")
    parser.add_argument("--one", nargs=2, metavar=("PLAN", "GRID"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        label, grid = args.one[0], tuple(map(int, args.one[1].split("x")))
        print(json.dumps(measure(label, grid, args.rounds)))
        return
    plans = [in_own_process(label, grid, args.rounds) for grid in GRIDS for label in METHODS]
    report = {
        "hardware": hardware() | {"torch": torch.__version__},
        "rounds": args.rounds,
        "plans": plans,
        "growth": [growth(frame) for frame in FRAMES],
        "n_log_n_exponent": exponent([(n, n * math.log2(n)) for n in LENGTHS]),
        "searches": searches(args.method or content_methods(), args.rounds),
    }
    text = to_markdown(report)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "planning.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "planning.md").write_text(text)
    print(f"wrote {args.out / 'planning'}.json and .md")
    for row in plans:
        if not row["within_limits"]:
            sys.exit(f"{row['plan']} on {row['tokens']:,} tokens is over its limit")
    for row in report["searches"]["rows"]:
        if row["overhead"] > MOST:
            sys.exit(f"{row['method']} searches for {row['overhead']:.1%} of dense attention")


def in_own_process(label: str, grid: Sequence[int], rounds: int) -> dict:
    """The figures of one plan, measured in a process that makes no other."""
    words = [sys.executable, __file__, "--one", label, "x".join(map(str, grid))]
    done = subprocess.run(
        [*words, "--rounds", str(rounds)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def measure(label: str, size: Sequence[int], rounds: int) -> dict:
    """Time and memory of making one plan."""
    grid, (name, options) = Grid(*size), METHODS[label]
    # what the first plan of any process loads is not this one's
    plan_of(name, Grid(2, 8, 8))
    before = resident_mib("VmRSS")
    seconds = []
    for _ in range(rounds + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        plan = plan_of(name, grid, **options)
        # other programs add to the first, further threads to the second
        seconds.append(min(time.perf_counter() - wall, time.process_time() - cpu))
    peak = resident_mib("VmHWM") - before
    begin = time.perf_counter()
    figures = plan.summary()
    time_s = statistics.median(seconds[1:])
    row = {"plan": label, "grid": list(size), "tokens": grid.num_tokens, "time_s": time_s}
    row |= {"summary_s": time.perf_counter() - begin, "held_mib": figures["memory_mib"]}
    row |= {"peak_mib": peak, "num_blocks": figures["num_blocks"], "density": figures["density"]}
    row["within_limits"] = is_within(row)
    return row


def is_within(row: dict) -> bool:
    """Whether a plan kept to the limits of its number of tokens; where there are none it did."""
    seconds, mib = LIMITS.get(row["tokens"], (math.inf, math.inf))
    return row["time_s"] <= seconds and row["held_mib"] <= mib


def resident_mib(field: str) -> float:
    """A memory figure of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def growth(frame: tuple[int, int]) -> dict:
    """The pairs that radial attention visits as a video gets longer, and their exponent."""
    rows = []
    for num_tokens in LENGTHS:
        grid = Grid(num_tokens // math.prod(frame), *frame)
        pairs = round(plan_of("radial", grid).visited_density * num_tokens**2)
        rows.append({"tokens": num_tokens, "frames": grid.t, "visited_pairs": pairs})
    points = [(row["tokens"], row["visited_pairs"]) for row in rows]
    frames = [(row["tokens"], row["tokens"] * math.log2(row["frames"])) for row in rows]
    return {
        "frame": list(frame),
        "rows": rows,
        "exponent": exponent(points),
        "n_log_frames_exponent": exponent(frames),
    }


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of log y over log x, by least squares."""
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points)))[0]


def content_methods() -> list[str]:
    """The methods that read content, but for those that may read a file instead."""
    return [name for name in list_methods() if issubclass(method_class(name), ContentMethod)]


def searches(names: Sequence[str], rounds: int) -> dict:
    """What searching takes, and what dense attention does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    grid = Grid(*SEARCHED)
    q = smooth_content(grid, HEAD_DIM)
    dense_s = thread_seconds(lambda: F.scaled_dot_product_attention(q, q, q), rounds)
    rows = [search(name, grid, q, dense_s, rounds) for name in names]
    torch.set_num_threads(threads)
    return {"tokens": grid.num_tokens, "steps": NUM_STEPS, "dense_s": dense_s, "rows": rows}


def search(name: str, grid: Grid, q: Tensor, dense_s: float, rounds: int) -> dict:
    """The time of a first and a later search, and of all those of a generation."""
    method, found = create_method(name), []
    # its blocks are laid out once
    method.layout(grid, q.device)
    first_s = thread_seconds(lambda: found.append(method.plan(grid, q, q)), rounds)
    later_s = thread_seconds(lambda: method.plan(grid, q, q, last=found[-1]), rounds)
    count = len(search_steps(method, NUM_STEPS))
    overhead = (first_s + (count - 1) * later_s) / (NUM_STEPS * dense_s)
    row = {"method": name, "density": found[-1].density, "num_searches": count}
    return row | {"first_s": first_s, "later_s": later_s, "overhead": overhead}


def search_steps(method: ContentMethod, num_steps: int) -> list[int]:
    """The steps at which a method plans anew."""
    steps = [0]
    for step in range(1, num_steps):
        if not method.keeps(steps[-1], step, num_steps):
            steps.append(step)
    return steps


def thread_seconds(function: Callable[[], object], rounds: int) -> float:
    """Median time that this thread computes; other programs do not count."""
    seconds = []
    for _ in range(rounds):
        begin = time.thread_time()
        function()
        seconds.append(time.thread_time() - begin)
    return statistics.median(seconds)


def to_markdown(report: dict) -> str:
    """The tables, with the machine above."""
    machine = report["hardware"]
    head = (
        f"# Planning on {machine['num_threads']} threads of {machine['cpu']}\n\n"
        f"{machine['system']}, torch {machine['torch']}. `python scripts/bench_planning.py`\n"
    )
    titles = ("plan", "tokens", "time s", "held MiB", "peak MiB", "listed blocks", "density")
    lines = [titles, ["---"] * len(titles)]
    for row in report["plans"]:
        figures = [f"{row['time_s']:.3f}", f"{row['held_mib']:.1f}", f"{row['peak_mib']:.0f}"]
        counts = [f"{row['num_blocks']:,}", f"{row['density']:.4f}"]
        lines.append([row["plan"], f"{row['tokens']:,}", *figures, *counts])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    grown = "\n\n".join(growth_table(x, report["n_log_n_exponent"]) for x in report["growth"])
    found = report["searches"]
    facts = {"tokens": found["tokens"], "steps": found["steps"], "dense_s": found["dense_s"]}
    facts |= {"rounds": report["rounds"], "dim": HEAD_DIM, "searches": search_table(found["rows"])}
    return f"{head}\n{table}\n\n{NOTES.format(growth=grown, **facts)}"


def search_table(rows: Sequence[dict]) -> str:
    """The table of the methods that read content."""
    lines = [
        "| method | density | searches | first s | later s | overhead |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['density']:.4f} | {row['num_searches']} | "
            f"{row['first_s']:.3f} | {row['later_s']:.3f} | {row['overhead']:.2%} |"
        )
    return "\n".join(lines)


def growth_table(growth: dict, n_log_n: float) -> str:
    """The table of one frame size."""
    lines = [
        "Frames of {}x{} tokens: visited pairs grow as N^{:.2f}; N log N as N^{:.2f}, "
        "N log(frames) as N^{:.2f}, dense attention as N^2.\n".format(
            *growth["frame"], growth["exponent"], n_log_n, growth["n_log_frames_exponent"]
        ),
        "| tokens | frames | visited pairs | keys of a query | added by the doubling | density |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    before = None
    for row in growth["rows"]:
        keys = row["visited_pairs"] / row["tokens"]
        added = "-" if before is None else f"{keys - before:,.0f}"
        lines.append(
            f"| {row['tokens']:,} | {row['frames']} | {row['visited_pairs']:,} | {keys:,.0f} | "
            f"{added} | {keys / row['tokens']:.4f} |"
        )
        before = keys
    return "\n".join(lines)


if __name__ == "__main__":
    main()
