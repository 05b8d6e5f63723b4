"""How long a run of the bundled model takes in every type, and how close its clips stay.

python scripts/bench_types.py makes clips with the transformer and the autoencoder in float32 and
bfloat16, by dense, exact and radial attention, in turns, and writes types_cpu.json and .md. A table
of another instruction set is written beside the ones that are there.
"""

import argparse
import statistics
from pathlib import Path

import torch
from benchmarks.instruction_sets import sets_in_use
from diffusers import DiffusionPipeline
from tqdm import tqdm

from vidattn.choice import parse_choice
from vidattn.kernels.cpp.processor import instruction_set
from vidattn.pipelines.quick_layers import quicken
from vidattn.quality.likeness import psnr
from vidattn.runs.clip import Clip, Guards, make_clip, warm_up
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json
from vidattn.runs.request import Request
from vidattn.support.resources import resource

# type of the transformer and of the autoencoder, norms and convolutions, and the method; the first
# is what others are compared with
SETTINGS = [
    ("float32", "float32", "usual", "dense"),
    ("float32", "bfloat16", "usual", "dense"),
    ("float32", "bfloat16", "quick", "dense"),
    ("float32", "bfloat16", "quick", "exact"),
    ("float32", "bfloat16", "quick", "radial:density=0.3"),
    ("bfloat16", "bfloat16", "usual", "dense"),
    ("bfloat16", "bfloat16", "quick", "dense"),
    ("bfloat16", "bfloat16", "quick", "exact"),
    ("bfloat16", "bfloat16", "quick", "radial:density=0.3"),
]
PROMPT = "a blue bag moving left over a light background"
PARTS = ("total_ms", "transformer_ms", "attention_ms", "vae_ms")
INTRODUCTION = """\
# A run of the bundled model by type, on {sets}

`python scripts/bench_types.py` on {cpu}, {num_cores} cores, {num_threads} in use, torch {torch}.
Clips of {frames} frames of {size}x{size} in {steps} steps; seconds of the whole run, of the
transformer, of self-attention in it, and of the autoencoder, medians of {rounds} in turns after a
step that warms up. Quick layers are those of the command line: norms and convolutions of the
autoencoder, and norms, rotary embeddings, gates and GELU of the transformer, computed faster from
the same parameters (`pipelines/quick_layers.py`, `pipelines/quick_blocks.py`). The engines are
those of sparse and of dense calls. Likeness is that to the first row; the sparse rows have one
dense layer and a tenth of the steps dense.

| transformer | autoencoder | layers | method | seconds | transformer | attention | autoencoder \
| speed-up | engines | PSNR |
|---|---|---|---|---:|---:|---:|---:|---:|---|---:|
"""


def main() -> None:
    """Make the clips, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--size", type=int, default=128, help="height and width of the clips")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    folder = writable_folder(args.out)
    rows = measure(args)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    facts = hardware() | {"torch": torch.__version__, "sets": sets_in_use()} | settings
    name = f"types_{instruction_set(torch.bfloat16)}"
    write_json(folder / f"{name}.json", {"facts": facts, "rows": rows})
    with write_atomically(folder / f"{name}.md") as path:
        path.write_text(to_markdown(rows, facts), encoding="utf-8")
    print(to_markdown(rows, facts))


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each of ``SETTINGS``: the times of every run, and likeness to the first."""
    request = Request(PROMPT, num_frames=args.frames, height=args.size, width=args.size)
    request = Request(**vars(request) | {"num_inference_steps": args.steps})
    pipes = {kind: pipeline(*kind) for kind in dict.fromkeys(x[:3] for x in SETTINGS)}
    clips: dict[tuple, list[Clip]] = {setting: [] for setting in SETTINGS}
    for *kind, method in SETTINGS:
        warm_up(pipes[tuple(kind)], request, parse_choice(method))
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for setting in SETTINGS:
            pipe, choice = pipes[setting[:3]], parse_choice(setting[3])
            clips[setting].append(make_clip(pipe, request, choice, Guards(None, None)))
    first = clips[SETTINGS[0]][0].frames
    return [row_of(setting, made, psnr(made[0].frames, first)) for setting, made in clips.items()]


def row_of(setting: tuple[str, ...], clips: list[Clip], likeness: float) -> dict[str, object]:
    """The figures of the clips of a setting."""
    reports = [clip.report for clip in clips]
    times = {part: [getattr(report, part) for report in reports] for part in PARTS}
    engines = {"sparse": reports[0].engines, "dense": reports[0].dense_engines}
    row = dict(zip(("transformer", "autoencoder", "layers", "method"), setting))
    return row | times | {"engines": engines, "psnr": likeness}


def pipeline(transformer: str, autoencoder: str, layers: str) -> DiffusionPipeline:
    """The bundled model in two types, with "usual" or "quick" layers."""
    dtypes = {"default": getattr(torch, transformer), "vae": getattr(torch, autoencoder)}
    pipe = DiffusionPipeline.from_pretrained(resource("assets/tiny-t2v"), dtype=dtypes)
    pipe.set_progress_bar_config(disable=True)
    if layers == "quick":
        quicken(pipe)
    return pipe


def to_markdown(rows: list[dict], facts: dict[str, object]) -> str:
    """The page: a line for each row."""
    usual, lines = statistics.median(rows[0]["total_ms"]), []
    for row in rows:
        ms = [statistics.median(row[part]) for part in PARTS]
        engines = [f"{kind} on {name}" for kind, found in row["engines"].items() for name in found]
        cells = (
            *(row[name] for name in ("transformer", "autoencoder", "layers")),
            f"`{row['method']}`",
            *(f"{x / 1e3:.1f}" for x in ms),
            f"{usual / ms[0]:.2f}x",
            ", ".join(engines),
            "the same" if row["psnr"] >= 100 else f"{row['psnr']:.1f} dB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION.format(**facts) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
