"""Time sparse attention on this machine: python scripts/bench_attention.py [--quick].

In turns: dense attention of PyTorch, and the "cpp" and "torch" engines and compiled FlexAttention
on the same block lists. Writes attention_cpu_<instruction set>.json and .md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks.attention_bound import measured_rates, shares_of_bound
from benchmarks.instruction_sets import add_set_argument, limit_to
from benchmarks.resident_memory import extra_mib
from torch import Tensor
from tqdm import tqdm

from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods import plan as plan_of
from vidattn.plan import Plan
from vidattn.planning.visible import visible_keys
from vidattn.runs.hardware import hardware

HEADS = 2
# a function slower than this is timed once
SLOW_S = 4.0
SAMPLED_QUERIES = 64
# dense attention of more tokens is timed on one head
FEW_TOKENS = 10_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RADIAL = {"density": 0.2, "tile": (1, 8, 16)}
# per grid, methods with their options
FULL = {
    Grid(32, 16, 16): [("radial", RADIAL), ("radial", RADIAL | {"density": 0.12, "near": 0})],
    Grid(16, 32, 32): [("neighborhood", {"window": (5, 9, 9), "tile": (4, 4, 4)})],
    Grid(8, 32, 32): [("neighborhood", {"window": (5, 7, 7), "tile": (4, 4, 4)})],
}
QUICK = {
    Grid(8, 16, 16): [
        ("radial", {"density": 0.3, "near": 0, "tile": (1, 8, 8)}),
        ("neighborhood", {"window": (5, 10, 10)}),
    ]
}
COLUMNS = (
    ("method", "method"),
    ("tokens", "tokens"),
    ("head_dim", "D"),
    ("dtype", "dtype"),
    ("density", "density"),
    ("visited", "visited"),
    ("dense_ms", "dense ms"),
    ("flex_ms", "flex ms"),
    ("cpp_ms", "cpp ms"),
    ("cpp_times_dense", "x dense"),
    ("cpp_times_flex", "x flex"),
    ("cpp_share_of_bound", "of bound"),
    ("torch_ms", "torch ms"),
    ("torch_times_dense", "x dense"),
    ("torch_times_flex", "x flex"),
    ("train_dense_ms", "dense fwd+bwd ms"),
    ("train_cpp_ms", "cpp fwd+bwd ms"),
    ("train_cpp_times_dense", "x dense"),
    ("train_cpp_share_of_bound", "of bound"),
    ("train_torch_ms", "torch fwd+bwd ms"),
    ("train_torch_times_dense", "x dense"),
    ("error", "error"),
    ("extra_mib", "extra MiB"),
    ("train_extra_mib", "extra MiB fwd+bwd"),
)
NOTES = """\
Times in ms for {heads} heads, forward, medians of {rounds} rounds in which everything is called in
turns; fwd+bwd is forward and backward. Dense is `scaled_dot_product_attention` of the same dtype,
flex is compiled FlexAttention on the same block lists; FlexAttention has no backward on a CPU.
Dense at over {few:,} tokens is timed on one head and multiplied; what takes over {slow:.0f} s is
timed once. density counts pairs of tokens, visited those in the blocks computed. of bound is the
least time for the pairs that are kept over the time of the cpp engine: forward 4 D products and
sums and an exponential to a pair, backward 10 D and one, at the rates that its instruction set
reaches on all threads in registers and the first cache: {rates}. These rates are of vectors; the
matrix registers of AMX multiply faster, which can take the share above 1. error is the relative RMS
distance to float64 attention on {queries} queries, extra the peak of resident memory during a call,
beyond what was there before it, both of the cpp engine.
"""


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2,048 tokens only, under a minute")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument(
        "--backward-up-to", type=int, default=32768, help="time no backward for more tokens"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each function is called")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    add_set_argument(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    sets = limit_to(args.set)
    grids = QUICK if args.quick else FULL
    cases = [
        (grid, head_dim, dtype) for grid in grids for head_dim in (64, 128) for dtype in DTYPES
    ]
    rows = []
    for grid, head_dim, dtype in (bar := tqdm(cases, unit="case", smoothing=0)):
        bar.set_description(f"{grid.num_tokens} tokens, D {head_dim}, {dtype}")
        # the window, whose cost is that of its predicate too, is timed for one head dim
        methods = [x for x in grids[grid] if head_dim == 64 or x[0] == "radial"]
        if not methods:
            continue
        kinds = ["cpp", "torch"] + ["flex"] * (not args.no_flex)
        kinds += ["train cpp", "train torch"] * (grid.num_tokens <= args.backward_up_to)
        rows += measure(grid, head_dim, dtype, methods, args.rounds, kinds)
    rows.sort(key=lambda row: (row["method"] != "radial", row["method"]))
    machine = hardware() | {"torch": torch.__version__, "date": str(date.today())}
    machine["instruction_sets"] = sets
    rates = {name: measured_rates(dtype) for name, dtype in DTYPES.items()}
    for row in rows:
        row |= shares_of_bound(row, HEADS, *rates[row["dtype"]])
    text = to_markdown(rows, machine, args.rounds, rates)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"attention_{'quick' if args.quick else 'cpu'}_{args.set}"
    report = {"hardware": machine, "heads": HEADS, "rounds": args.rounds}
    report |= {"flops_and_exps_per_s": rates, "rows": rows}
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(text)
    print(f"wrote {args.out / name}.json and .md")


def measure(
    grid: Grid, head_dim: int, dtype: str, methods: list, rounds: int, kinds: list[str]
) -> list[dict]:
    """One row of figures for each method; ``kinds`` are keys of ``engine_calls``."""
    shape = (1, HEADS, grid.num_tokens, head_dim)
    q, k, v, d_out = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(4))
    dense_heads = 1 if grid.num_tokens > FEW_TOKENS else HEADS
    few = [x[:, :dense_heads] for x in (q, k, v, d_out)]
    functions = {"dense": lambda: F.scaled_dot_product_attention(*few[:3])}
    if "train cpp" in kinds:
        functions["train dense"] = lambda: train(F.scaled_dot_product_attention, *few)
    plans = [plan_of(name, grid, **options) for name, options in methods]
    for index, plan in enumerate(plans):
        calls = engine_calls(plan, q, k, v, d_out)
        functions |= {f"{index} {kind}": calls[kind] for kind in kinds}
    seconds = in_turns(functions, rounds)
    for name in seconds.keys() & {"dense", "train dense"}:
        seconds[name] *= HEADS / dense_heads
    rows = []
    for index, plan in enumerate(plans):
        name, options = methods[index]
        row = {"method": name, "options": options, "grid": str(grid.size)}
        row |= {"tokens": grid.num_tokens, "head_dim": head_dim, "dtype": dtype}
        row |= {"block": plan.layout.block, "density": plan.density}
        row |= {"visited": plan.visited_density} | figures(index, seconds)
        row["error"] = error(attend(q, k, v, plan, backend="cpp"), q, k, v, plan)
        row["extra_mib"] = extra_mib(functions[f"{index} cpp"])
        trained = functions.get(f"{index} train cpp")
        row["train_extra_mib"] = extra_mib(trained) if trained else None
        rows.append(row)
    return rows


def engine_calls(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor
) -> dict[str, Callable[[], object]]:
    """What can be timed for one plan."""
    cpp, torch_, flex = (
        partial(attend, plan=plan, backend=backend) for backend in ("cpp", "torch", "flex")
    )
    return {
        "cpp": lambda: cpp(q, k, v),
        "torch": lambda: torch_(q, k, v),
        "flex": lambda: flex(q, k, v),
        "train cpp": lambda: train(cpp, q, k, v, d_out),
        "train torch": lambda: train(torch_, q, k, v, d_out),
    }


def train(attention: Callable, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> None:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(attention(*leaves), leaves, d_out)


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; first calls are left out, but for slow functions."""
    times = {}
    for name, function in functions.items():
        first = seconds_of(function)
        again = first < SLOW_S or name.endswith("flex")
        times[name] = [] if again else [first]
    slow = {name for name, values in times.items() if values}
    for _ in range(rounds):
        for name in functions.keys() - slow:
            times[name].append(seconds_of(functions[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def figures(index: int, seconds: dict[str, float]) -> dict[str, float | None]:
    """Times in ms of one method, and ratios; None for what was not timed."""
    ms = {key: 1e3 * value for key, value in seconds.items()}

    def ratio(slow: str, fast: str) -> float | None:
        return ms[slow] / ms[fast] if slow in ms and fast in ms else None

    flex = f"{index} flex"
    found = {
        "dense_ms": ms["dense"],
        "flex_ms": ms.get(flex),
        "train_dense_ms": ms.get("train dense"),
    }
    for engine in ("cpp", "torch"):
        own, trained = f"{index} {engine}", f"{index} train {engine}"
        found |= {
            f"{engine}_ms": ms[own],
            f"{engine}_times_dense": ratio("dense", own),
            f"{engine}_times_flex": ratio(flex, own),
            f"train_{engine}_ms": ms.get(trained),
            f"train_{engine}_times_dense": ratio("train dense", trained),
        }
    return found


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> float:
    """Relative RMS distance to float64 masked attention on some queries."""
    tokens = torch.randperm(plan.grid.num_tokens)[:SAMPLED_QUERIES]
    visible = visible_keys(plan, tokens)
    scores = q[:, :, tokens].double() @ k.double().mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    exact = weights @ v.double()
    return ((out[:, :, tokens] - exact).norm() / exact.norm()).item()


def to_markdown(rows: list[dict], machine: dict, rounds: int, rates: dict) -> str:
    """The table, with the machine above and notes below."""
    sets = ", ".join(f"{name} for {x}" for x, name in machine["instruction_sets"].items())
    head = (
        f"# Attention on {machine['num_threads']} threads of {machine['cpu']}\n\n"
        f"{machine['date']}; {machine['num_cores']} cores, {machine['system']}, torch "
        f"{machine['torch']}; the cpp engine on {sets}. "
        "`python scripts/bench_attention.py`\n"
    )
    lines = [" | ".join(title for _, title in COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(show(key, row[key]) for key, _ in COLUMNS) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    reached = ", ".join(
        f"{peak / 1e9:.0f} GFLOP/s and {exps / 1e9:.1f} G exp/s in {dtype}"
        for dtype, (peak, exps) in rates.items()
    )
    notes = NOTES.format(
        heads=HEADS,
        rounds=rounds,
        few=FEW_TOKENS,
        slow=SLOW_S,
        queries=SAMPLED_QUERIES,
        rates=reached,
    )
    return f"{head}\n{table}\n\n{notes}"


def show(key: str, value: object) -> str:
    """One cell."""
    if value is None:
        return "-"
    if key == "error":
        return f"{value:.1e}"
    if key in ("density", "visited") or "times" in key or "share" in key:
        return f"{value:.2f}"
    if key == "tokens":
        return f"{value:,}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
