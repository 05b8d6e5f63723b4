"""Score the bundled model: python scripts/judge_t2v.py --model assets/tiny-t2v --out scores.json.

Real clips of the held-out prompts come first, to show what the judge itself gets right.
"""

import argparse
import functools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from t2v.data import NUM_PROMPTS, Clips, Scene, fetch_items, held_out_prompts
from t2v.measure import (
    Classifier,
    colour_of,
    direction_of,
    load_classifier,
    train_classifier,
    wilson,
)
from tqdm import tqdm

ASPECTS = ("direction", "item", "colour")
SETTINGS = ("frames", "height", "width", "steps", "guidance", "seed", "dtype")


def judge(video: np.ndarray, scene: Scene, classifier: Classifier) -> dict[str, str]:
    """What the judge sees in a (T, H, W, 3) video of a scene."""
    seen = (direction_of(video), classifier.name(video), colour_of(video))
    return {"prompt": scene.caption} | dict(zip(ASPECTS, seen, strict=True))


def summary(rows: list[dict[str, str]], scenes: list[Scene]) -> dict[str, dict]:
    """Share right with its 95 % Wilson interval, for each aspect."""
    result = {}
    for aspect in ASPECTS:
        pairs = zip(rows, scenes, strict=True)
        right = sum(row[aspect] == getattr(scene, aspect) for row, scene in pairs)
        low, high = wilson(right, len(rows))
        interval = [round(low, 3), round(high, 3)]
        share = round(right / len(rows), 4)
        result[aspect] = {"right": right, "of": len(rows), "share": share, "interval": interval}
    return result


def to_video(clip: torch.Tensor) -> np.ndarray:
    """A (3, T, H, W) clip in [-1, 1] as a (T, H, W, 3) array in [0, 1]."""
    return (clip.clamp(-1, 1).permute(1, 2, 3, 0).float().numpy() + 1) / 2


def save_sheet(path: Path, videos: list[np.ndarray], columns: int = 5) -> None:
    """One row of evenly spaced frames per video, two videos side by side."""
    strips = []
    for video in videos:
        picks = np.linspace(0, len(video) - 1, columns).round().astype(int)
        strips.append(
            np.concatenate([np.pad(video[t], ((1, 1), (1, 1), (0, 0))) for t in picks], 1)
        )
    if len(strips) % 2:
        strips.append(np.zeros_like(strips[0]))
    rows = [np.concatenate(strips[i : i + 2], 1) for i in range(0, len(strips), 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


@functools.lru_cache(maxsize=1)
def tools(model: str, classifier: str, dtype: str):
    """The pipeline with the classifier, loaded once in each process."""
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_classifier(Path(classifier))


@torch.no_grad()
def score_real(index: int, scene: Scene, arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Judge one real test-split clip of a prompt, plain and through the autoencoder."""
    pipe, classifier = tools(arguments.model, arguments.classifier, arguments.dtype)
    size = (arguments.frames, arguments.height, arguments.width)
    clip, _ = unseen_clips(arguments.data).sample(index, size, scene)
    latents = pipe.vae.encode(clip[None].to(pipe.vae.dtype)).latent_dist.mode()
    decoded = to_video(pipe.vae.decode(latents).sample[0])
    return judge(to_video(clip), scene, classifier), judge(decoded, scene, classifier)


@functools.lru_cache(maxsize=1)
def unseen_clips(folder: str) -> Clips:
    """Clips of images no training has seen."""
    return Clips(folder, "test", 1)


def score_generated(index: int, scene: Scene, arguments: argparse.Namespace):
    """Generate one prompt; gives what the judge sees, the video as bytes and the seconds."""
    pipe, classifier = tools(arguments.model, arguments.classifier, arguments.dtype)
    begin = time.perf_counter()
    video = pipe(
        scene.caption,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.frames,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        generator=torch.Generator().manual_seed(arguments.seed + index),
    ).frames[0]
    seconds = time.perf_counter() - begin
    return judge(video, scene, classifier), (video * 255).round().astype(np.uint8), seconds


def score(scenes: list[Scene], arguments: argparse.Namespace) -> tuple[dict, list[np.ndarray]]:
    """Judge real and generated clips of every scene; gives scores and generated videos."""
    context = torch.multiprocessing.get_context("spawn")
    numbers, given = range(len(scenes)), [arguments] * len(scenes)
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        bar = functools.partial(tqdm, total=len(scenes))
        real = list(bar(pool.map(score_real, numbers, scenes, given), desc="real clips"))
        made = []
        for outcome in bar(pool.map(score_generated, numbers, scenes, given), desc="generated"):
            made.append(outcome)
            tqdm.write("  ->  ".join((outcome[0]["prompt"], str([outcome[0][a] for a in ASPECTS]))))
    plain, through = zip(*real)
    rows, videos, seconds = zip(*made)
    scores = {
        "real": summary(plain, scenes),
        "real_through_vae": summary(through, scenes),
        "generated": summary(rows, scenes),
        "median_seconds_per_clip": round(float(np.median(seconds)), 1),
        "prompts": rows,
    }
    return scores, [video / 255 for video in videos]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="assets/tiny-t2v", help="a WanPipeline folder")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="how many, at most 40")
    parser.add_argument("--out", default="scores.json", help="where the scores go")
    parser.add_argument("--sheet", help="also save a PNG of frames of every clip")
    parser.add_argument("--data", default="runs/t2v/data", help="folder for the image package")
    parser.add_argument("--classifier", help="safetensors; default: judge.safetensors in the model")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    arguments = parser.parse_args()
    for name in ("frames", "height", "width", "steps", "processes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if not (Path(arguments.model) / "model_index.json").is_file():
        parser.error(f"{arguments.model} has no model_index.json; give a diffusers folder")
    try:
        held_out_prompts(arguments.prompts)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    """Judge real clips, then the model, and write the scores."""
    arguments = parse()
    scenes = held_out_prompts(arguments.prompts)
    path = Path(arguments.classifier or Path(arguments.model) / "judge.safetensors")
    arguments.classifier = str(path)
    if not path.exists():
        train_classifier(Clips(arguments.data, "train", 0), path)
    fetch_items(arguments.data)
    scores, videos = score(scenes, arguments)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    out, partial = Path(arguments.out), Path(arguments.out + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"settings": settings} | scores, indent=1) + "\n")
    os.replace(partial, out)
    if arguments.sheet:
        save_sheet(Path(arguments.sheet), videos)
    for kind in ("real", "real_through_vae", "generated"):
        for aspect, row in scores[kind].items():
            low, high = row["interval"]
            print(f"{kind:17} {aspect:9} {row['right']}/{row['of']}  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
