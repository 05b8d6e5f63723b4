"""Check and time everything on an NVIDIA GPU: python scripts/bench_gpu.py [--seconds 330].

Runs from a checkout, with nothing but PyTorch, Triton and NumPy. Every kernel is compared with
float64; then the machine's ceilings, dense attention, ours, planning, FlexAttention and a step of
the shape of Wan 2.1 14B are timed. A part has its share of the time, and what fails costs its row
alone. Writes assets/benchmarks/GPU.json and GPU.md after every row.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

# nothing is installed on such a machine
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.gpu_checks import Check, checks
from benchmarks.gpu_peers import peers, tiles, windows
from benchmarks.gpu_planning import planning
from benchmarks.gpu_step import step
from benchmarks.gpu_times import Row, Sizes, ceilings, dense, sparse

from vidattn.runs.hardware import hardware
from vidattn.simulation.gpus import find_gpu

ROOT = Path(__file__).resolve().parents[1]
# parts in their order, with the share of all time at which the next one begins at the latest
PARTS: dict[str, tuple[Callable[[Sizes], Iterator[Row]], float]] = {
    "ceilings": (ceilings, 0.05),
    "checks": (lambda sizes: map(row_of, checks(sizes.device, sizes.engine)), 0.4),
    "dense": (dense, 0.5),
    "sparse": (sparse, 0.65),
    "planning": (planning, 0.75),
    "step": (step, 0.85),
    "peers": (peers, 0.92),
    "tiles": (tiles, 1.0),
    "windows": (windows, 1.0),
}
# of a row that did not run
RAISED, LEFT_OUT = "raised", "left out"


def main() -> None:
    """Check, time, write; exit with 1 where a check failed."""
    args = arguments()
    if args.prewarm:
        return prewarm(args.prewarm)
    require(args.device)
    path = args.out / f"{file_name(args.device)}.json"
    sizes = Sizes.of(args.device, "triton" if args.device == "cuda" else "torch")
    report = {"seconds": args.seconds, "versions": versions(), "hardware": hardware(), "parts": {}}
    measure(sizes, report, args.only, args.seconds, lambda: write(path, report))
    write(path, report)
    rows = report["parts"].get("checks", {})
    failed = [name for name, row in rows.items() if row.get("passed") is False]
    print(f"{sum(x.get('passed') is True for x in rows.values())} checks passed, wrote {path}")
    if failed:
        raise SystemExit(f"{len(failed)} checks failed: {'; '.join(failed)}")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=330, help="begin no row after so many")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"parts, with commas between them, of {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the program, tiny"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "benchmarks")
    parser.add_argument(
        "--prewarm",
        type=int,
        metavar="SM",
        help="without a GPU: compile for one, such as 90, what a run launches; the folder that "
        "TRITON_CACHE_DIR names then spares a run with the same Triton so many minutes",
    )
    args = parser.parse_args()
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    return args


def require(device: str) -> None:
    """Exit unless the device is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench_gpu.py needs an NVIDIA GPU, PyTorch sees none here: run it on a machine with "
            "one, or try the program with --device cpu"
        )


def file_name(device: str) -> str:
    """Of the report: the GPU as configs/gpus.yaml calls it, else as PyTorch does."""
    if device == "cpu":
        return "gpu_trial_on_cpu"
    name = torch.cuda.get_device_name()
    try:
        name = find_gpu(name).name
    except ValueError:
        pass
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def versions() -> dict[str, str]:
    """What the results depend on beside the kernels."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def row_of(check: Check) -> Row:
    """A check as a row: its largest error, and whether all are small."""

    def measure() -> dict:
        # the same numbers whatever ran before
        torch.manual_seed(0)
        errors = check.run()
        # written so that NaN does not pass
        passed = all(error <= check.limit for error in errors.values())
        worst = {name: float(f"{error:.2g}") for name, error in errors.items()}
        return {"passed": passed, "limit": check.limit} | worst

    return check.name, measure


def measure(
    sizes: Sizes, report: dict, only: list[str], seconds: float, save: Callable[[], None]
) -> None:
    """Fill the report, part by part."""
    begin = monotonic()
    for name, (part, share) in PARTS.items():
        if name not in only:
            continue
        rows = report["parts"][name] = {}
        torch.manual_seed(0)
        print(f"{name}, at {monotonic() - begin:.0f} s", flush=True)
        try:
            for row, run in part(sizes):
                if monotonic() - begin > share * seconds:
                    rows["the rest"] = {LEFT_OUT: f"from {row} on: no time"}
                    break
                rows[row] = tried(run, is_check=name == "checks")
                print(f"  {row}: {rows[row]}", flush=True)
                save()
        except Exception as error:
            rows["the rest"] = {RAISED: said(error)}
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        save()


def tried(run: Callable[[], dict], *, is_check: bool) -> dict:
    """What a row gives, or why it gives nothing: one kernel that fails must not hide the others."""
    try:
        return run()
    except Exception as error:
        failed = {"passed": False} if is_check else {}
        return failed | {RAISED: said(error)}


def said(error: Exception) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def prewarm(arch: int) -> None:
    """Compile what a run launches, for a GPU that is not here."""
    from benchmarks.fake_gpu import fake_gpu

    # as a run has them: whether a number is a multiple of 16 is compiled in
    sizes, count = replace(Sizes.of("cpu", "triton"), rounds=1), 0
    with fake_gpu(arch) as launches:
        for name in ("checks", "sparse", "tiles"):
            for row, run in PARTS[name][0](sizes):
                # it is the launches that count: what they leave behind is no result
                tried(run, is_check=False)
                print(f"{len(launches) - count} launches: {row}", flush=True)
                count = len(launches)


def write(path: Path, report: dict) -> None:
    """Both files, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown(report))):
        part = path.with_suffix(suffix + ".part")
        part.write_text(text)
        part.replace(path.with_suffix(suffix))


def markdown(report: dict) -> str:
    """The report for people: a table for each part."""
    machine = report["hardware"]
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# Attention on {machine['gpu'] or machine['cpu']}",
        "",
        f"{made}, {machine['system']}. `python scripts/bench_gpu.py --seconds "
        f"{report['seconds']:.0f}`. Times in ms are medians; train is forward and backward; "
        "TFLOP/s are of the pairs in the blocks visited. Checks give distances to float64.",
    ]
    for name, rows in report["parts"].items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += [
            "",
            f"## {name}",
            "",
            f"| | {' | '.join(columns)} |",
            "|---|" + "---|" * len(columns),
        ]
        for row, values in rows.items():
            cells = (str(values.get(column, "")).replace("|", "/") for column in columns)
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
