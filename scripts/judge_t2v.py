"""Score the bundled model: python scripts/judge_t2v.py --model assets/tiny-t2v --out scores.json.

Real clips of the held-out prompts come first, to show what the judge itself gets right.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from t2v_data import NUM_PROMPTS, Clips, Scene, held_out_prompts
from t2v_measure import (
    Classifier,
    colour_of,
    direction_of,
    load_classifier,
    train_classifier,
    wilson,
)
from tqdm import tqdm

ASPECTS = ("direction", "item", "colour")


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


@torch.no_grad()
def score_real(clips: Clips, scenes: list[Scene], size: tuple, classifier: Classifier, vae) -> dict:
    """Judge real test-split clips of the prompts, plain and through the autoencoder."""
    plain, through = [], []
    for i, scene in enumerate(tqdm(scenes, desc="real clips")):
        clip, _ = clips.sample(i, size, scene)
        plain.append(judge(to_video(clip), scene, classifier))
        decoded = vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample[0]
        through.append(judge(to_video(decoded), scene, classifier))
    return {"real": summary(plain, scenes), "real_through_vae": summary(through, scenes)}


def score_model(pipe, scenes: list[Scene], arguments, classifier: Classifier) -> tuple[dict, list]:
    """Generate every prompt and judge it; gives scores and videos."""
    rows, videos, seconds = [], [], []
    for i, scene in enumerate(tqdm(scenes, desc="generated")):
        begin = time.perf_counter()
        video = pipe(
            scene.caption,
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.frames,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=torch.Generator().manual_seed(arguments.seed + i),
        ).frames[0]
        seconds.append(time.perf_counter() - begin)
        videos.append(video)
        rows.append(judge(video, scene, classifier))
        tqdm.write(f"{scene.caption}  ->  {' '.join(rows[-1][a] for a in ASPECTS)}")
    scores = {"generated": summary(rows, scenes), "prompts": rows}
    return scores | {"median_seconds_per_clip": round(float(np.median(seconds)), 1)}, videos


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
    arguments = parser.parse_args()
    for name in ("frames", "height", "width", "steps"):
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
    if not path.exists():
        train_classifier(Clips(arguments.data, "train", 0), path)
    classifier = load_classifier(path)
    pipe = DiffusionPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    size = (arguments.frames, arguments.height, arguments.width)
    real = score_real(Clips(arguments.data, "test", 1), scenes, size, classifier, pipe.vae)
    scores, videos = score_model(pipe, scenes, arguments, classifier)
    settings = {k: getattr(arguments, k) for k in ("frames", "height", "width", "steps")}
    settings |= {"guidance": arguments.guidance, "seed": arguments.seed}
    out, partial = Path(arguments.out), Path(arguments.out + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"settings": settings} | real | scores, indent=1) + "\n")
    os.replace(partial, out)
    if arguments.sheet:
        save_sheet(Path(arguments.sheet), videos)
    for kind in ("real", "real_through_vae", "generated"):
        for aspect, row in (real | scores)[kind].items():
            low, high = row["interval"]
            print(f"{kind:17} {aspect:9} {row['right']}/{row['of']}  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
