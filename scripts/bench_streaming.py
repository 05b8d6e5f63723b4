"""How fast a stream is, how much it keeps and how close it stays, for every policy.

python scripts/bench_streaming.py makes one video for each policy from the same seed, and writes
streaming.json, streaming.md and streaming.png. Policies that are in the JSON file already, of the
same model and sizes, are not run again. With --minutes each gets a share of that time, and its
video may end sooner; the next run makes those that are missing, then those that were cut short.
With --world the judge of scripts/judge_t2v.py scores the last clips of each video.
"""

import argparse
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from t2v.worlds import WORLDS, load_witness, load_world
from torch import Tensor
from tqdm import tqdm

import vidattn
from vidattn.pipelines.streaming.policies import find_policies
from vidattn.quality.likeness import psnr, ssim
from vidattn.runs.folder import find_causal_model
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json

PROMPT = "a red boot moving right over a dark background"
WHOLE = "full"
POLICIES = (
    WHOLE,
    "rolling:window=12",
    "ema_sink:window=12",
    "head_classes:window=12",
    "tempcache:window=12",
    "tempcache:window=12,quantise=int8",
    "tempcache:window=12+annca",
)
INTRODUCTION = """\
# Streaming

`python scripts/bench_streaming.py` on {cpu}, {num_cores} cores, {num_threads} in use,
torch {torch}. {model}, up to {latents} latent frames of {height}x{width}, but {full} of `full`. The
time of a chunk is the median of {tail}, after {warm_up} that warm up and at the end. Drift is how
much longer a chunk takes in the last third than in the middle one. Likeness is that to `full`, as
far as it goes. The judge says how much of what it sees in the last clips is in the prompt.

| policy | latents | ms a chunk, first | last | drift | frames/s | tokens kept | MiB | PSNR | \
SSIM | judge |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""
# chunks before caches have their size, and chunks of a median
WARM_UP, TAIL = 8, 10
# chunks of the shortest video
LEAST = 2
# clips that are judged at the end of a video, and their frames
CLIPS, CLIP_FRAMES = 4, 33


def main() -> None:
    """Make the videos, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: the bundled causal model")
    parser.add_argument("--recipe", metavar="NAME", help="of a model that does not say its own")
    parser.add_argument("--latents", type=int, default=2000, help="latent frames, at least")
    parser.add_argument("--full", type=int, default=240, help="the same of full, at most")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--minutes", type=float, help="for all policies together, at most")
    parser.add_argument("--world", choices=WORLDS, help="whose judge scores the ends")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="default: that in the model")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"), metavar="FOLDER")
    args = parser.parse_args()
    folder = writable_folder(args.out)
    for policy in args.policies:
        find_policies(policy, WHOLE)
    model = find_causal_model(args.model)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    names = ("recipe", "latents", "full", "prompt", "world")
    settings = {name: getattr(args, name) for name in names}
    args.judge = args.judge or Path(model) / "judge.safetensors"
    facts = hardware() | {"torch": torch.__version__, "model": Path(model).name} | settings
    found = measure(pipe, args, folder / "streaming.json", facts)
    with write_atomically(folder / "streaming.md") as path:
        path.write_text(to_markdown(found["rows"], found["facts"]), encoding="utf-8")
    with write_atomically(folder / "streaming.png") as path:
        draw(found["rows"], path)
    print(to_markdown(found["rows"], found["facts"]))


def measure(pipe: DiffusionPipeline, args: argparse.Namespace, path: Path, facts: dict) -> dict:
    """What the JSON file holds, which is written after each policy."""
    done: dict[str, dict] = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before["facts"].get(key) == value for key, value in facts.items())
        done = {row["policy"]: row for row in before["rows"]} if same else {}
    wanted = [WHOLE, *(x for x in args.policies if x != WHOLE)]
    todo = [policy for policy in wanted if policy not in done]
    todo += [policy for policy in wanted if policy in done and done[policy]["is_cut"]]
    todo = [WHOLE, *(x for x in todo if x != WHOLE)] if todo else []
    minutes = math.inf if args.minutes is None else args.minutes
    reference, end = None, time.monotonic() + 60 * minutes
    for i, policy in enumerate(todo):
        now = time.monotonic()
        if i and now >= end:
            print(f"no time left for {', '.join(todo[i:])}: run the same command again")
            break
        row, frames, size = run(pipe, policy, args, now + (end - now) / (len(todo) - i))
        reference = frames if policy == WHOLE else reference
        row["psnr"], row["ssim"] = likeness(frames, reference)
        done[policy] = row
        facts |= {"height": size[0], "width": size[1], "tail": TAIL, "warm_up": WARM_UP}
        write_json(path, {"facts": facts, "rows": [done[x] for x in wanted if x in done]})
    return json.loads(path.read_text(encoding="utf-8"))


def run(
    pipe: DiffusionPipeline, policy: str, args: argparse.Namespace, end: float
) -> tuple[dict, Tensor, tuple[int, int]]:
    """A row, the first frames as far as ``full`` goes, and their size.

    Args:
        end: of the time that there is, by the monotonic clock.
    """
    latents = min(args.full, args.latents) if policy == WHOLE else args.latents
    first: list[Tensor] = []
    last: deque[Tensor] = deque(maxlen=CLIPS * CLIP_FRAMES)
    with (
        vidattn.stream(pipe, policy, prompt=args.prompt, recipe=args.recipe) as video,
        tqdm(total=latents, desc=policy) as bar,
    ):
        while video.frame < latents and (len(video.chunks) < LEAST or time.monotonic() < end):
            made = next(video).mul(255).round().byte().cpu()
            if video.frame <= args.full:
                first.append(made)
            last.extend(made)
            bar.update(video.frame - bar.n)
        chunks, num_latents = video.chunks, video.frame
    row = {
        "policy": policy,
        "latents": num_latents,
        "is_cut": num_latents < latents,
        "judge": judge(torch.stack([*last]), args),
        "first_frame": [chunk.first_frame for chunk in chunks],
        "ms": [1e3 * chunk.seconds for chunk in chunks],
        "num_frames": [chunk.num_frames for chunk in chunks],
        "tokens": [chunk.cache_tokens for chunk in chunks],
        "mib": [chunk.cache_bytes / 2**20 for chunk in chunks],
    }
    return row, torch.cat(first), (made.shape[-2], made.shape[-1])


def judge(frames: Tensor, args: argparse.Namespace) -> float | None:
    """How much of what a judge sees in clips of (T, 3, H, W) bytes is what the prompt says.

    Raises:
        ValueError: a prompt that is none of the world.
    """
    if args.world is None or len(frames) < CLIP_FRAMES:
        return None
    world, witness = load_world(args.world), load_witness(args.world)
    scenes = {scene.caption: scene for scene in world.held_out_prompts()}
    if args.prompt not in scenes:
        known = ", ".join([*scenes][:5])
        raise ValueError(f"--prompt must be one of the world's, such as {known}")
    scene, classifier = scenes[args.prompt], witness.load_classifier(args.judge)
    clips = frames[-(len(frames) // CLIP_FRAMES * CLIP_FRAMES) :].split(CLIP_FRAMES)
    seen = [witness.look(x.permute(0, 2, 3, 1).numpy() / 255.0, classifier) for x in clips]
    right = [witness.right(scene, name, look[name]) for look in seen for name in witness.ASPECTS]
    return sum(right) / len(right)


def likeness(frames: Tensor, reference: Tensor) -> tuple[float, float]:
    """PSNR and SSIM of the frames that both have."""
    shared = min(len(frames), len(reference))
    one, other = (x[:shared].float() / 255 for x in (frames, reference))
    return psnr(one, other), ssim(one, other)


def drift(times: Sequence[float]) -> float:
    """How much longer the last third takes than the middle one, as a share; NaN of too few."""
    third = len(times) // 3
    if not third:
        return math.nan
    middle, last = (statistics.median(x) for x in (times[-2 * third : -third], times[-third:]))
    return last / middle - 1


def to_markdown(rows: Sequence[dict], facts: dict) -> str:
    """The page: a line for each row."""
    lines = []
    for row in rows:
        times = row["ms"]
        warm_up = min(facts["warm_up"], len(times) - 1)
        first, last = times[warm_up : warm_up + facts["tail"]], times[-facts["tail"] :]
        speed = 1e3 * sum(row["num_frames"][-len(last) :]) / sum(last)
        is_whole = row["policy"] == WHOLE
        cells = (
            f"`{row['policy']}`",
            f"{row['latents']:,}",
            f"{statistics.median(first):.0f}",
            f"{statistics.median(last):.0f}",
            f"{drift(times[warm_up:]):+.0%}".replace("+nan%", ""),
            f"{speed:.1f}",
            f"{row['tokens'][-1]:,}",
            f"{row['mib'][-1]:.1f}",
            "" if is_whole else f"{row['psnr']:.1f} dB",
            "" if is_whole else f"{row['ssim']:.3f}",
            "" if row["judge"] is None else f"{row['judge']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION.format(**facts) + "\n".join(lines) + "\n"


def draw(rows: Sequence[dict], path: Path) -> None:
    """Speed and memory against the latent frame."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row in rows:
        rates = [1e3 * n / ms for n, ms in zip(row["num_frames"], row["ms"])]
        speed.plot(row["first_frame"][1:], rates[1:], label=row["policy"], linewidth=1)
        memory.plot(row["first_frame"], row["mib"], label=row["policy"], linewidth=1)
    speed.set(xlabel="latent frame", ylabel="frames in a second", ylim=(0, None))
    memory.set(xlabel="latent frame", ylabel="cache, MiB", yscale="log")
    memory.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
