"""Time planning on this machine: python scripts/bench_planning.py.

Radial and neighborhood plans for 118,800 and 1,000,000 tokens, each in a process of its own so that
the memory is its own too; then the pairs that radial attention visits as a video gets longer, with
the exponent of their growth; then what methods that read content spend on searching, as a share of
dense attention over a generation. All on one thread. Writes planning.json and planning.md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from vidattn.commands.draw import smooth_reading
from vidattn.grid import Grid
from vidattn.methods import create_method, label, list_methods
from vidattn.methods import plan as plan_of
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading
from vidattn.runs.hardware import hardware

# HunyuanVideo at 129x720x1280, and a round million
GRIDS = ((33, 45, 80), (250, 50, 80))
# names of plans, with the method and its options
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
# VMoBA cuts the video in three ways, in turn from layer to layer
LAYERS = range(3)
PARTS = ("plans", "growth", "searches")
PLANS = """
## Plans

CPU time is the median of {rounds} plans, after one that is not counted. Held is the memory of the
plan; peak is what the process needed at most while making it, beyond what it had before.

{table}
"""
GROWTH = """
## Growth

Radial with its defaults, as a video of one frame size gets longer. Once all windows have halved,
every doubling adds the same number of keys to a query: that is N log N. Few frames are read nearly
whole, so the exponent, fitted over the whole range, is larger the larger the frames.

{table}
"""
SEARCHES = """
## Searches

Methods that read content, with their defaults or rectified, on one head of {tokens:,} tokens and
{dim} dimensions in float32; medians of {rounds} searches. A generation of {steps} steps, none of
them dense, searches as often as the method says; overhead is the CPU time of these searches over
that of dense attention, {dense_s:.2f} s a step. A later search may take something over from the one
before. `paro` is not here: with a calibration it searches for nothing, without one it calibrates
itself, which takes many times as long.

{table}
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="plans that are timed")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--part", action="append", choices=PARTS, help="others stay as they are")
    parser.add_argument("--one", nargs=2, metavar=("PLAN", "GRID"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        name, grid = args.one[0], tuple(map(int, args.one[1].split("x")))
        print(json.dumps(measure(name, grid, args.rounds)))
        return
    measured = {
        "plans": lambda: [in_own_process(x, grid, args.rounds) for grid in GRIDS for x in METHODS],
        "growth": lambda: [growth(frame) for frame in FRAMES],
        "searches": lambda: searches(args.rounds),
    }
    path = args.out / "planning.json"
    report = json.loads(path.read_text()) if args.part and path.exists() else {}
    report |= {"hardware": hardware() | {"torch": torch.__version__}, "rounds": args.rounds}
    report |= {part: measured[part]() for part in args.part or PARTS}
    text = to_markdown(report)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"wrote {args.out / 'planning'}.json and .md")
    if excess := over_limit(report):
        sys.exit(excess)


def over_limit(report: dict) -> str | None:
    """What took more than it may, None where nothing did."""
    for row in report.get("plans", []):
        if not row["within_limits"]:
            return f"{row['plan']} on {row['tokens']:,} tokens is over its limit"
    for row in report.get("searches", {}).get("rows", []):
        if row["overhead"] > MOST:
            return f"{row['method']} searches for {row['overhead']:.1%} of dense attention"
    return None


def in_own_process(name: str, grid: Sequence[int], rounds: int) -> dict:
    """The figures of one plan, measured in a process that makes no other."""
    words = [sys.executable, __file__, "--rounds", str(rounds)]
    words += ["--one", name, "x".join(map(str, grid))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(name: str, size: Sequence[int], rounds: int) -> dict:
    """Time and memory of making one plan."""
    grid, (method, options) = Grid(*size), METHODS[name]
    # what the first plan of any process loads is not this one's
    plan_of(method, Grid(2, 8, 8))
    before = resident_mib("VmRSS")
    plan = plan_of(method, grid, **options)
    time_s = cpu_seconds(lambda: plan_of(method, grid, **options), rounds)
    peak = resident_mib("VmHWM") - before
    figures = plan.summary()
    row = {"plan": name, "grid": list(size), "tokens": grid.num_tokens, "time_s": time_s}
    row |= {"held_mib": figures["memory_mib"], "peak_mib": peak}
    row |= {"num_blocks": figures["num_blocks"], "density": figures["density"]}
    row["within_limits"] = is_within(row)
    return row


def cpu_seconds(function: Callable[[], object], rounds: int) -> float:
    """Median time that this process computes; other programs do not count."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


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
    # the shorter videos in blocks as large as those of the longest
    tile = create_method("radial").tile_of(Grid(LENGTHS[-1] // math.prod(frame), *frame))
    for num_tokens in LENGTHS:
        grid = Grid(num_tokens // math.prod(frame), *frame)
        pairs = round(plan_of("radial", grid, tile=tile).visited_density * num_tokens**2)
        rows.append({"tokens": num_tokens, "frames": grid.t, "visited_pairs": pairs})
    points = [(row["tokens"], row["visited_pairs"]) for row in rows]
    frames = [(row["tokens"], row["tokens"] * math.log2(row["frames"])) for row in rows]
    return {
        "frame": list(frame),
        "rows": rows,
        "exponent": exponent(points),
        "n_log_n_exponent": exponent([(n, n * math.log2(n)) for n in LENGTHS]),
        "n_log_frames_exponent": exponent(frames),
    }


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of log y over log x, by least squares."""
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points)))[0]


def content_methods() -> list[Method]:
    """The methods that read content, with their defaults, and rectified ones beside them.

    Not among them is paro, which reads content where it has to calibrate itself alone.
    """
    made = []
    for name in list_methods():
        plain = create_method(name)
        if "rectify" in plain.options():
            made += [plain] if plain.rectify else [plain, replace(plain, rectify=True)]
    return [method for method in made if method.reads_content]


def searches(rounds: int) -> dict:
    """What searching takes, and what dense attention does."""
    grid = Grid(*SEARCHED)
    reading = smooth_reading(grid, HEAD_DIM)
    q = reading.q
    dense_s = cpu_seconds(lambda: F.scaled_dot_product_attention(q, q, q), 1)
    rows = [search(method, grid, reading, dense_s, rounds) for method in content_methods()]
    facts = {"tokens": grid.num_tokens, "steps": NUM_STEPS, "dense_s": dense_s, "rounds": rounds}
    return facts | {"rows": rows}


def search(method: Method, grid: Grid, reading: Reading, dense_s: float, rounds: int) -> dict:
    """The time of a first and a later search, and of all those of a generation."""
    found = []
    for layer in dict.fromkeys(map(method.at, LAYERS)):
        # this also makes what serves all searches on a grid, such as its blocks
        plan, memory = layer.plan_with_memory(grid, reading)
        again = replace(reading, last=memory)
        first, later = (cpu_seconds(partial(layer.plan, grid, x), rounds) for x in (reading, again))
        found.append((plan.density, first, later))
    density, first_s, later_s = (statistics.mean(x) for x in zip(*found))
    count = len(search_steps(method, NUM_STEPS))
    overhead = (first_s + (count - 1) * later_s) / (NUM_STEPS * dense_s)
    row = {"method": label(method), "density": density, "num_searches": count}
    return row | {"first_s": first_s, "later_s": later_s, "overhead": overhead}


def search_steps(method: Method, num_steps: int) -> list[int]:
    """The steps at which a method plans anew."""
    steps = [0]
    for step in range(1, num_steps):
        if not method.keeps(steps[-1], step, num_steps):
            steps.append(step)
    return steps


def to_markdown(report: dict) -> str:
    """The tables of the parts there are, with the machine above."""
    machine = report["hardware"]
    text = (
        f"# Planning on one thread of {machine['cpu']}\n\n"
        f"{machine['system']}, torch {machine['torch']}. `python scripts/bench_planning.py`\n"
    )
    if rows := report.get("plans"):
        text += PLANS.format(rounds=report["rounds"], table=plan_table(rows))
    if found := report.get("growth"):
        text += GROWTH.format(table="\n\n".join(map(growth_table, found)))
    if found := report.get("searches"):
        text += SEARCHES.format(**found, dim=HEAD_DIM, table=search_table(found["rows"]))
    return text


def plan_table(rows: Sequence[dict]) -> str:
    """The table of methods that read no content."""
    lines = [
        "| plan | tokens | CPU s | held MiB | peak MiB | listed blocks | density |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['plan']} | {row['tokens']:,} | {row['time_s']:.3f} | {row['held_mib']:.1f} | "
            f"{row['peak_mib']:.0f} | {row['num_blocks']:,} | {row['density']:.4f} |"
        )
    return "\n".join(lines)


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


def growth_table(growth: dict) -> str:
    """The table of one frame size."""
    lines = [
        "Frames of {}x{} tokens: visited pairs grow as N^{:.2f}; N log N as N^{:.2f}, "
        "N log(frames) as N^{:.2f}, dense attention as N^2.\n".format(
            *growth["frame"],
            *(growth[f"{name}exponent"] for name in ("", "n_log_n_", "n_log_frames_")),
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
