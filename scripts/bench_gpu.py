"""Check and time everything on an NVIDIA GPU: python scripts/bench_gpu.py [--quick].

Checks every engine and kernel against float64, then times attention at the sizes of video models:
dense attention of PyTorch, our engines, compiled FlexAttention and, where installed, NATTEN, all in
turns. Writes assets/benchmarks/GPU.json and GPU.md after every case, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import torch
from gpu_checks import Check, checks
from gpu_times import Case, cases, measure
from tqdm import tqdm

from vidattn.gpus import find_gpu
from vidattn.measure import hardware

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Check, time, write; exit with 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="all checks, one short timing")
    parser.add_argument("--rounds", type=int, default=5, help="times each call is timed")
    parser.add_argument("--fresh", action="store_true", help="do not go on from an earlier run")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the program, tiny"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "benchmarks")
    args = parser.parse_args()
    require(args.device)
    path = args.out / f"{file_name(args.device)}{'_quick' if args.quick else ''}.json"
    report = {} if args.fresh else earlier(path, args.rounds)
    report |= {"source": source(), "rounds": args.rounds, "torch": torch.__version__}
    report |= {"hardware": hardware(), "checks": report.get("checks", {})}
    report["times"] = report.get("times", {})
    todo = [*checks(args.device), *cases(args.device, quick=args.quick)]
    for job in (bar := tqdm(todo, unit="case")):
        bar.set_description(job.name)
        part, run = part_of(job, args)
        if job.name not in report[part]:
            torch.manual_seed(0)
            report[part][job.name] = run()
            write(path, report)
    write(path, report)
    failed = [name for name, row in report["checks"].items() if not row["passed"]]
    print(f"{len(report['checks']) - len(failed)} checks passed, wrote {path} and .md")
    if failed:
        raise SystemExit(f"{len(failed)} checks failed: {'; '.join(failed)}")


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


def source() -> str:
    """What the results depend on beside the GPU: our kernels and PyTorch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def earlier(path: Path, rounds: int) -> dict:
    """What an interrupted run of the same kernels wrote."""
    report = json.loads(path.read_text()) if path.exists() else {}
    same = (report.get("source"), report.get("rounds")) == (source(), rounds)
    return report if same else {}


def part_of(job: Check | Case, args: argparse.Namespace):
    """Where the result of a job goes, and what makes it."""
    if isinstance(job, Check):
        return "checks", lambda: checked(job)
    return "times", lambda: measure(job, args.device, args.rounds)


def checked(check: Check) -> dict:
    """The errors of a check, and whether all are small; a failure to run is one too."""
    # one kernel that does not compile must not hide what the others do
    try:
        errors = check.run()
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return {"passed": False, "limit": check.limit, "raised": said}
    # written so that NaN does not pass
    passed = all(error <= check.limit for error in errors.values())
    return {"passed": passed, "limit": check.limit, "errors": errors}


def write(path: Path, report: dict) -> None:
    """Both files, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown(report))):
        part = path.with_suffix(suffix + ".part")
        part.write_text(text)
        part.replace(path.with_suffix(suffix))


def markdown(report: dict) -> str:
    """The report for people."""
    machine = report["hardware"]
    lines = [
        f"# Attention on {machine['gpu'] or machine['cpu']}",
        "",
        f"torch {report['torch']}, {machine['system']}. `python scripts/bench_gpu.py`. "
        f"Times in ms, medians of {report['rounds']} rounds in which all is called in turns; "
        "train is forward and backward. Visited are the pairs in the blocks computed; a kernel as "
        "fast as the fastest dense one has share 1.",
        "",
        "| case | visited | call | ms | times as fast as dense | share of dense x visited |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, row in report["times"].items():
        for call, ms in row["ms"].items():
            ratios = row["ratios"].get(call, {})
            shown = " | ".join(f"{ratios[x]:.2f}" if ratios else "" for x in ("speedup", "share"))
            lines.append(f"| {name} | {row['visited']:.3f} | {call} | {ms:.3f} | {shown} |")
        lines += [f"| {name} | | {call} | {why} | | |" for call, why in row["left out"].items()]
    lines += ["", "| check | passed | largest error | limit |", "|---|---|---:|---:|"]
    for name, row in report["checks"].items():
        largest = row.get("raised") or f"{max(row['errors'].values()):.1e}"
        passed = "yes" if row["passed"] else "NO"
        lines.append(f"| {name} | {passed} | {largest} | {row['limit']:.0e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
