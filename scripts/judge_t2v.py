"""Score the bundled model: python scripts/judge_t2v.py --model assets/tiny-t2v --out scores.json.

Real clips of the held-out prompts come first, to show what the judge itself gets right.
"""

import argparse
import functools
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from t2v.worlds import WORLDS, load_witness, load_world
from tqdm import tqdm

SETTINGS = ("world", "tuning", "frames", "height", "width", "steps", "guidance", "seed", "dtype")


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of `right` out of `count`."""
    share, spread = right / count, z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(rows: list[dict[str, str]], scenes: list, world: str) -> dict[str, dict]:
    """Share right with its 95 % Wilson interval, for each aspect."""
    witness, result = load_witness(world), {}
    for aspect in witness.ASPECTS:
        pairs = zip(rows, scenes, strict=True)
        right = sum(witness.right(scene, aspect, row[aspect]) for row, scene in pairs)
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
def tools(model: str, classifier: str, dtype: str, world: str):
    """The pipeline with the classifier, loaded once in each process."""
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_witness(world).load_classifier(Path(classifier))


@functools.lru_cache(maxsize=1)
def unseen_clips(folder: str, world: str):
    """Clips that training does not have."""
    return load_world(world).unseen_clips(folder)


def judge(video: np.ndarray, scene, classifier, world: str) -> dict[str, str]:
    """What the witness sees in a (T, H, W, 3) video of a scene."""
    return {"prompt": scene.caption} | load_witness(world).look(video, classifier)


def noise_ratio(real: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio of a decoded video in dB."""
    return float(-10 * np.log10(np.square(real - decoded).mean()))


@torch.no_grad()
def score_real(index: int, scene, arguments: argparse.Namespace) -> tuple[dict, dict, float]:
    """Judge one unseen real clip of a prompt, plain and through the autoencoder."""
    world = arguments.world
    pipe, classifier = tools(arguments.model, arguments.classifier, arguments.dtype, world)
    size = (arguments.frames, arguments.height, arguments.width)
    clip, _ = unseen_clips(arguments.data, world).sample(index, size, scene)
    latents = pipe.vae.encode(clip[None].to(pipe.vae.dtype)).latent_dist.mode()
    real, decoded = to_video(clip), to_video(pipe.vae.decode(latents).sample[0])
    seen = [judge(video, scene, classifier, world) for video in (real, decoded)]
    return *seen, noise_ratio(real, decoded)


def score_generated(index: int, scene, arguments: argparse.Namespace):
    """Generate one prompt; gives what the judge sees, the video as bytes and the seconds."""
    world = arguments.world
    pipe, classifier = tools(arguments.model, arguments.classifier, arguments.dtype, world)
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
    seen = judge(video, scene, classifier, world)
    return seen, (video * 255).round().astype(np.uint8), seconds


def score(scenes: list, arguments: argparse.Namespace) -> tuple[dict, list[np.ndarray]]:
    """Judge real and generated clips of every scene; gives scores and generated videos."""
    context, world = torch.multiprocessing.get_context("spawn"), arguments.world
    numbers, given = range(len(scenes)), [arguments] * len(scenes)
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        bar = functools.partial(tqdm, total=len(scenes))
        real = list(bar(pool.map(score_real, numbers, scenes, given), desc="real clips"))
        made = []
        for outcome in bar(pool.map(score_generated, numbers, scenes, given), desc="generated"):
            made.append(outcome)
            tqdm.write(
                "  ->  ".join((outcome[0]["prompt"], ", ".join(list(outcome[0].values())[1:])))
            )
    plain, through, ratios = zip(*real)
    rows, videos, seconds = zip(*made)
    scores = {
        "real": summary(plain, scenes, world),
        "real_through_vae": summary(through, scenes, world),
        "generated": summary(rows, scenes, world),
        "vae_psnr_db": round(float(np.mean(ratios)), 2),
        "median_seconds_per_clip": round(float(np.median(seconds)), 1),
        "prompts": rows,
    }
    return scores, [video / 255 for video in videos]


def prompts_of(arguments: argparse.Namespace) -> list:
    """The scenes to score."""
    world = load_world(arguments.world)
    judged = world.held_out_prompts(arguments.prompts)
    return world.tuning_prompts(arguments.prompts) if arguments.tuning else judged


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="assets/tiny-t2v", help="a WanPipeline folder")
    parser.add_argument("--world", default="clothes", choices=WORLDS, help="what it shows")
    parser.add_argument("--prompts", type=int, default=40, help="how many, at most 40")
    parser.add_argument(
        "--tuning", action="store_true", help="other held-out prompts, to settle the guidance on"
    )
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
        prompts_of(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    """Judge real clips, then the model, and write the scores."""
    arguments = parse()
    world, witness = load_world(arguments.world), load_witness(arguments.world)
    scenes = prompts_of(arguments)
    path = Path(arguments.classifier or Path(arguments.model) / "judge.safetensors")
    arguments.classifier = str(path)
    if not path.exists():
        witness.train_classifier(world.Clips(arguments.data, 0), path)
    world.fetch_items(arguments.data)
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
