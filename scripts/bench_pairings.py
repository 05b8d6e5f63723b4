"""What step caches, 8-bit weights and compilation add to sparse attention.

python scripts/bench_pairings.py makes clips of the bundled model with each of them beside radial
attention, in turns, and writes pairings.json and pairings.md.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

import vidattn
from vidattn.quality.likeness import psnr
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json
from vidattn.runs.pairings import Pairings, put_beside
from vidattn.support.resources import resource

BESIDE = {
    "nothing": {},
    "--cache first-block": {"cache": "first-block"},
    "--cache taylorseer": {"cache": "taylorseer"},
    "--quantize int8": {"quantize": "int8"},
    "--compile": {"compile": True},
}
PROMPT = "a blue bag moving left over a light background"
INTRODUCTION = """\
# What works beside sparse attention, and what it adds

`python scripts/bench_pairings.py` on {cpu}, {num_cores} cores, {num_threads} in use, torch {torch}.
Clips of the bundled model, {frames} frames of {size}x{size} in {steps} steps, float32, all with
`radial:density={density}`; the whole run, medians of {rounds} in turns, after one that warms up.
Likeness is that to the clip with nothing beside it.

| beside the patch | seconds | least to most | speed-up | PSNR |
|---|---:|---:|---:|---:|
"""


def main() -> None:
    """Make the clips, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=128, help="height and width of the clips")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--only", nargs="+", choices=BESIDE, default=list(BESIDE))
    args = parser.parse_args()
    folder = writable_folder(args.out)
    found = measure(args)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    facts = hardware() | {"torch": torch.__version__} | settings
    write_json(folder / "pairings.json", {"facts": facts, "rows": found})
    with write_atomically(folder / "pairings.md") as path:
        path.write_text(to_markdown(found, facts), encoding="utf-8")
    print(to_markdown(found, facts))


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each of ``args.only``: the seconds of every run, and likeness to the first."""
    pipes = {name: pipeline(name) for name in args.only}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    clips = {}
    for turn in tqdm(range(args.rounds + 1), desc="rounds"):
        for name, pipe in pipes.items():
            clips[name], took = clip(pipe, args)
            seconds[name] += [took] * (turn > 0)
    first = clips[args.only[0]]
    return [
        {"beside": name, "seconds": times, "psnr": psnr(clips[name], first)}
        for name, times in seconds.items()
    ]


def pipeline(name: str) -> DiffusionPipeline:
    """The bundled model with something beside it."""
    pipe = DiffusionPipeline.from_pretrained(resource("assets/tiny-t2v"))
    pipe.set_progress_bar_config(disable=True)
    put_beside(pipe, Pairings(**BESIDE[name]))
    return pipe


def clip(pipe: DiffusionPipeline, args: argparse.Namespace) -> tuple[Tensor, float]:
    """(T, 3, H, W) frames in 0 to 1, and the seconds that they took."""
    with vidattn.patch(pipe, "radial", density=args.density):
        begin = time.perf_counter()
        frames = pipe(
            PROMPT,
            num_frames=args.frames,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames[0]
        return frames, time.perf_counter() - begin


def to_markdown(rows: list[dict], facts: dict[str, object]) -> str:
    """The page: a line for each row."""
    usual = statistics.median(rows[0]["seconds"])
    lines = []
    for row in rows:
        times = row["seconds"]
        middle, likeness = statistics.median(times), row["psnr"]
        cells = (
            row["beside"],
            f"{middle:.1f}",
            f"{min(times):.1f} to {max(times):.1f}",
            f"{usual / middle:.2f}x",
            "the same" if likeness >= 100 else f"{likeness:.1f} dB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION.format(**facts) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
