"""Quality against density for every method: python scripts/bench_quality.py.

Each held-out prompt and seed is generated densely, and again with every method at every density,
from the same latents. A line is written for each finished clip, so a run that was stopped goes on
where it was. Writes quality.json, quality.md and two plots; --redraw makes the last three anew from
the first. The full run is --prompts 16 --seeds 3 at 33 frames; --minutes makes as much of it as
fits.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from benchmarks.density_choices import add_density_arguments, choices_at, plain_label
from benchmarks.quality_plot import draw_frontier, draw_methods
from benchmarks.quality_report import Compared, summarize, to_markdown
from safetensors.torch import load_file, save_file
from t2v.data import held_out_prompts

from vidattn.choice import Choice
from vidattn.commands.compare import plan_density
from vidattn.flags.values import positive_int
from vidattn.flags.video import add_model_arguments
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.pipelines.hooks.watch import Sight, watching
from vidattn.quality.fidelity import fidelity
from vidattn.quality.fvd import video_features
from vidattn.quality.measures import Measure, choose_measures
from vidattn.runs.choices import ScheduleChoice
from vidattn.runs.clip import Clip, Guards, make_clip
from vidattn.runs.folder import find_model
from vidattn.runs.hardware import hardware
from vidattn.runs.model import load_pipeline
from vidattn.runs.output import writable_folder, write_atomically, write_json
from vidattn.runs.request import Request, resolve
from vidattn.schedule_file import load_schedule

QUICK = {"prompts": 1, "seeds": 1, "frames": 9, "side": 64, "steps": 2, "densities": (0.5,)}


def main() -> None:
    """Generate what is missing, then write the report."""
    args = parse()
    out = writable_folder(args.out, "--out")
    if args.redraw:
        report = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    else:
        report = make_report(args)
        write_json(out / "quality.json", report)
    with write_atomically(out / "quality.md") as partial:
        partial.write_text(to_markdown(report), encoding="utf-8")
    for name, draw in (("quality", draw_frontier), ("quality_methods", draw_methods)):
        with write_atomically(out / f"{name}.png") as partial:
            draw(report).savefig(partial)
    print(f"wrote {out / 'quality'}.json, .md and .png, and {out / 'quality_methods.png'}")


def make_report(args: argparse.Namespace) -> dict[str, object]:
    """Generate what is missing, and sum all of it up."""
    work, setting = writable_folder(args.work, "--work"), setting_of(args)
    choices = choices_at(args.densities, grid_of(args), args.methods, args.plain)
    choices += args.schedule
    check_setting(work, setting)
    prompts = [(i, scene.caption) for i, scene in enumerate(held_out_prompts(args.prompts))]
    deadline = time.time() + 60 * args.minutes if args.minutes else float("inf")
    methods = [choice for _, choice in choices if isinstance(choice, Choice)]
    measure_attention(args, methods, prompts[0][1], work)
    # all prompts once before any twice: prompts differ more than seeds do
    pairs = product(range(args.seeds), prompts)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run_pair, args, choices, x, seed, deadline) for seed, x in pairs]
        for job in jobs:
            job.result()
    report = summarize(read_lines(work), [Compared(x, y.label, plain_label(y)) for x, y in choices])
    report |= {"setting": setting, "asked": [args.prompts, args.seeds]}
    report["command"] = shlex.join(["python", "scripts/bench_quality.py", *sys.argv[1:]])
    report["hardware"] = hardware() | {"torch": torch.__version__}
    return report


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=positive_int, default=16, help="held-out prompts")
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds of each prompt")
    add_density_arguments(parser)
    parser.add_argument(
        "--schedule", type=parse_schedule, action="append", default=[], metavar="DENSITY=FILE",
        help="what vidattn tune wrote, among the methods of that density; may be repeated",
    )  # fmt: skip
    parser.add_argument("--frames", type=positive_int, default=33)
    parser.add_argument("--side", type=positive_int, default=128, help="height and width")
    parser.add_argument("--steps", type=positive_int, default=12)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dense-layers", type=int, default=1)
    parser.add_argument("--dense-steps", type=float, default=0.1)
    parser.add_argument("--metrics", help="as in vidattn compare, fvd and warp if named")
    parser.add_argument("--minutes", type=float, help="begin no clip after that")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="one short clip of each")
    parser.add_argument("--redraw", action="store_true", help="table and plots of quality.json")
    add_model_arguments(parser)
    parser.set_defaults(threads=1)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def parse_schedule(text: str) -> tuple[float, ScheduleChoice]:
    """A schedule and the density it is compared at, from ``density=file``."""
    density, _, where = text.partition("=")
    try:
        load_schedule(where)
        return float(density), ScheduleChoice(where)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no DENSITY=FILE: {error}") from error


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    """What clips must share to stand in one table, the weights of the model among them."""
    names = ("frames", "side", "steps", "guidance", "dense_layers", "dense_steps", "dtype")
    digest = hashlib.sha256()
    folder = Path(find_model(args.model))
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return {name: getattr(args, name) for name in names} | {"model": digest.hexdigest()[:16]}


def check_setting(work: Path, setting: dict[str, object]) -> None:
    """Refuse to mix clips of two settings in one folder.

    Raises:
        ValueError: the folder holds clips of another setting.
    """
    path = work / "setting.json"
    if not path.is_file():
        write_json(path, setting)
    elif (before := json.loads(path.read_text())) != setting:
        differ = {
            name: (before.get(name), x) for name, x in setting.items() if before.get(name) != x
        }
        raise ValueError(
            f"'{work}' holds clips of another setting, {differ} (there, now): give another --work, "
            "or remove it"
        )


def grid_of(args: argparse.Namespace) -> Grid:
    """The token grid of a clip of the bundled model: 4 frames of 8x8 pixels to a token."""
    return Grid((args.frames - 1) // 4 + 1, args.side // 8, args.side // 8)


def request_of(args: argparse.Namespace, prompt: str, seed: int) -> Request:
    """The clip of a prompt and a seed."""
    return Request(
        prompt=prompt,
        num_frames=args.frames,
        height=args.side,
        width=args.side,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        seed=seed,
    )


@lru_cache(maxsize=1)
def _pipeline(flags: tuple[tuple[str, object], ...]) -> object:
    # progress bars of several processes would run into one another
    os.environ["TQDM_DISABLE"] = "1"
    return load_pipeline(argparse.Namespace(**dict(flags)))


def pipeline(args: argparse.Namespace) -> object:
    """The pipeline, loaded once in each process."""
    names = ("model", "dtype", "device", "offload", "threads", "vae_tiling")
    return _pipeline(tuple((name, getattr(args, name)) for name in names))


def run_pair(
    args: argparse.Namespace,
    choices: Sequence[tuple[float, Choice | ScheduleChoice]],
    prompt: tuple[int, str],
    seed: int,
    deadline: float,
) -> None:
    """The clips of one prompt and seed that are not there yet, a line for each."""
    (number, caption), guards = prompt, Guards(args.dense_layers, args.dense_steps)
    place = {"kind": "clip", "prompt": number, "seed": seed}
    done = {line["label"] for line in read_lines(args.work) if line.items() >= place.items()}
    todo = [choice for _, choice in choices if choice.label not in done]
    if not todo or time.time() > deadline:
        return
    pipe = pipeline(args)
    request = resolve(pipe, request_of(args, caption, seed))
    measures = choose_measures(args.metrics, side_px=args.side, num_clips=2)
    dense = dense_frames(args.work / f"dense-{number}-{seed}.safetensors", pipe, request, guards)
    for choice in todo:
        if time.time() > deadline:
            return
        line = place | {"label": choice.label, "method": "schedule", "rectify": False}
        if isinstance(choice, Choice):
            line["method"] = choice.name
            line["rectify"] = bool(choice.options.get("rectify", False))
        try:
            clip = make_clip(pipe, request, choice, guards)
        except ValueError as error:
            # what a method cannot do it says before the first step
            line["error"] = str(error)
        else:
            line |= figures_of(clip, dense, measures)
        append(args.work, line)
        print(f"prompt {number} seed {seed} {choice.label}: {line.get('psnr_db', 'no clip')}")


def dense_frames(path: Path, pipe: object, request: Request, guards: Guards) -> torch.Tensor:
    """(F, 3, H, W) of the dense clip, kept in a file."""
    if not path.is_file():
        clip = make_clip(pipe, request, Choice("dense"), guards)
        with write_atomically(path) as partial:
            save_file({"frames": clip.frames.contiguous()}, partial)
    return load_file(path)["frames"]


def figures_of(clip: Clip, dense: torch.Tensor, measures: Sequence[Measure]) -> dict[str, object]:
    """Densities and likeness of a clip; for FVD, which is of many clips, its features."""
    figures = {"density": plan_density(clip), "density_in_all": clip.report.density}
    for measure in measures:
        if measure.key == "fvd":
            pair = {"features": clip.frames, "dense_features": dense}
            figures |= {key: video_features(x).tolist() for key, x in pair.items()}
        else:
            figures[measure.key] = measure.compute([clip.frames], [dense])
    return figures


def measure_attention(
    args: argparse.Namespace, choices: Sequence[Choice], prompt: str, work: Path
) -> None:
    """Recall and output error of every method, layer by layer, on attention of a dense clip."""
    done = {line["label"] for line in read_lines(work) if line["kind"] == "attention"}
    todo = [choice for choice in choices if choice.label not in done]
    if not todo:
        return
    pipe = pipeline(args)
    steps, sights = {args.steps // 4, args.steps // 2, args.steps - 1}, []

    def keep(sight: Sight) -> None:
        if sight.step in steps and sight.layer >= args.dense_layers:
            sights.append(sight)

    with watching(pipe, keep):
        pipe(
            **request_of(args, prompt, 0).arguments(), output_type="latent", generator=generator(0)
        )
    for choice in todo:
        try:
            line = {"layers": attention_figures(choice, sights)}
        except ValueError as error:
            line = {"error": str(error)}
        append(work, {"kind": "attention", "label": choice.label} | line)


def generator(seed: int) -> torch.Generator:
    """The source of the latents, as ``vidattn compare`` makes it."""
    return torch.Generator("cpu").manual_seed(seed)


def attention_figures(choice: Choice, sights: Sequence[Sight]) -> list[dict[str, float]]:
    """Recall and output error of a method in each layer, mean over steps, passes and heads."""
    layers: dict[int, list[tuple[float, float]]] = {}
    for x in sights:
        method = create_method(choice.name, **choice.options).at(x.layer)
        plan = method.plan(x.grid, x.reading)
        found = fidelity(x.q, x.k, x.v, plan, scale=x.scale, key_mask=x.key_mask)
        figures = (found.recall.mean(), found.output_error.mean())
        layers.setdefault(x.layer, []).append(figures)
    return [
        {"layer": layer, "recall": float(recall), "output_error": float(error)}
        for layer, pairs in layers.items()
        for recall, error in [torch.tensor(pairs).mean(0).tolist()]
    ]


def append(work: Path, line: dict[str, object]) -> None:
    """Add one line to the results, at once: several processes write there."""
    with (work / "clips.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(work: Path) -> Iterator[dict[str, object]]:
    """The results so far; the last line of a run that was killed may be cut."""
    path = work / "clips.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(text)
        except ValueError:
            continue


if __name__ == "__main__":
    main()
