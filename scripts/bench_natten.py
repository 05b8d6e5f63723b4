"""Time neighborhood attention beside NATTEN on a CPU: python scripts/bench_natten.py.

Needs ``pip install --no-build-isolation natten==0.21.7``, which there is no wheel of. Forward, as
NATTEN has no backward on a CPU; on one thread, by CPU time. Writes natten_SET.json and
natten_SET.md, SET being the instruction set that bfloat16 runs on here, so that the tables of other
processors stay.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks.instruction_sets import sets_in_use
from benchmarks.resident_memory import extra_mib
from torch import Tensor

from vidattn.kernels.cpp.processor import instruction_set
from vidattn.neighborhood import neighborhood_attention
from vidattn.runs.hardware import hardware

SIZE, WINDOW = (8, 32, 32), (5, 7, 7)
NATTEN, OURS = "NATTEN", "vidattn, cpp"
NOTES = """\
CPU time of one call, forward, float32, one head of dimension 64; everything is called in turns, and
the median taken of the rounds, {rounds} here. First calls, which trace, plan or compile, are left
out. On a CPU NATTEN runs PyTorch's FlexAttention as it is, which scores every pair, and makes its
mask anew at every call. Extra is the peak of resident memory during a call, beyond what was there
before it. The outputs of NATTEN and of vidattn differ by {error:.1e} of their root mean square.
"""


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="times each function is called")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    args = parser.parse_args()
    try:
        import natten
    except ImportError:
        sys.exit(
            "this times NATTEN, which is not installed: "
            "pip install --no-build-isolation natten==0.21.7"
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = measure(natten.na3d, SIZE, WINDOW, args.rounds)
    report = {"hardware": hardware(), "torch": torch.__version__} | report
    report |= {"natten": natten.__version__, "sets": sets_in_use()}
    text = to_markdown(report)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"natten_{instruction_set(torch.bfloat16)}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(text)
    print(f"wrote {args.out / name}.json and .md")


def measure(na3d: Callable, size: Sequence[int], window: Sequence[int], rounds: int) -> dict:
    """CPU time and memory of each attention, and how far the peer's output is from ours."""
    given = [torch.randn(1, *size, 1, 64) for _ in range(3)]
    calls = {
        NATTEN: lambda: na3d(*given, kernel_size=window),
        "dense": lambda: dense(*given),
        "vidattn, torch": lambda: ours(given, window, "torch"),
        OURS: lambda: ours(given, window, "cpp"),
    }
    # the first calls trace, plan and compile
    expected, *_, found = (call() for call in calls.values())
    rows = {name: {"extra_mib": extra_mib(call)} for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(cpu_seconds(call))
    for name, row in rows.items():
        row["cpu_ms"] = 1e3 * statistics.median(seconds[name])
        row["times_natten"] = statistics.median(seconds[NATTEN]) / statistics.median(seconds[name])
    error = ((found - expected).norm() / expected.norm()).item()
    return {"size": size, "window": window, "rounds": rounds, "rows": rows, "error": error}


def ours(given: Sequence[Tensor], window: Sequence[int], backend: str) -> Tensor:
    """(B, *size, H, D) by this library."""
    return neighborhood_attention(*given, window, layout="heads_last", backend=backend)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, S, D), every token attending to all."""
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of this process during a call, whatever else the machine does."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def to_markdown(report: dict) -> str:
    """The table, with the machine above and notes below."""
    machine = report["hardware"]
    size, window = ("x".join(map(str, report[name])) for name in ("size", "window"))
    head = (
        f"# Neighborhood attention beside NATTEN on one thread of {machine['cpu']}\n\n"
        f"{size} = {math.prod(report['size']):,} tokens, window {window}; {machine['system']}, "
        f"{report['sets']}, torch {report['torch']}, NATTEN {report['natten']}. "
        "`python scripts/bench_natten.py`\n"
    )
    lines = ["| | CPU ms | x NATTEN | extra MiB |", "| --- | ---: | ---: | ---: |"]
    for name, row in report["rows"].items():
        mib = "-" if row["extra_mib"] is None else f"{row['extra_mib']:,.0f}"
        lines.append(f"| {name} | {row['cpu_ms']:,.0f} | {row['times_natten']:,.1f} | {mib} |")
    table = "\n".join(lines)
    return f"{head}\n{table}\n\n{NOTES.format(rounds=report['rounds'], error=report['error'])}"


if __name__ == "__main__":
    main()
