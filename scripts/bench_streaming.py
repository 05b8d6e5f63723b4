"""How fast a stream is, how much it keeps and how close it stays, for every policy.

python scripts/bench_streaming.py --model FOLDER makes one video for each policy from the same
seed, and writes streaming.json, streaming.md and streaming.png. Policies that are in the JSON
file already, of the same model and sizes, are not run again.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
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
torch {torch}. {model}, {latents} latent frames of {height}x{width}, but {full} of `full`. The time
of a chunk is the median of {tail}, after {warm_up} that warm up and at the end. Drift is how much
longer a chunk takes in the last third than in the middle one. Likeness is that to `full`, as far as
it goes.

| policy | ms a chunk, first | last | drift | frames/s | tokens kept | MiB | PSNR | SSIM |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""
# chunks before caches have their size, and chunks of a median
WARM_UP, TAIL = 8, 10


def main() -> None:
    """Make the videos, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: the bundled causal model")
    parser.add_argument("--recipe", metavar="NAME", help="of a model that does not say its own")
    parser.add_argument("--latents", type=int, default=2000, help="latent frames, at least")
    parser.add_argument("--full", type=int, default=240, help="the same of full, at most")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"), metavar="FOLDER")
    args = parser.parse_args()
    folder = writable_folder(args.out)
    for policy in args.policies:
        find_policies(policy, WHOLE)
    model = find_causal_model(args.model)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = {name: getattr(args, name) for name in ("recipe", "latents", "full", "prompt")}
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
    missing = [policy for policy in wanted if policy not in done]
    reference = None
    for policy in [WHOLE, *(x for x in missing if x != WHOLE)] if missing else []:
        row, frames, size = run(pipe, policy, args)
        reference = frames if policy == WHOLE else reference
        row["psnr"], row["ssim"] = likeness(frames, reference)
        done[policy] = row
        facts |= {"height": size[0], "width": size[1], "tail": TAIL, "warm_up": WARM_UP}
        write_json(path, {"facts": facts, "rows": [done[x] for x in wanted if x in done]})
    return json.loads(path.read_text(encoding="utf-8"))


def run(
    pipe: DiffusionPipeline, policy: str, args: argparse.Namespace
) -> tuple[dict, Tensor, tuple[int, int]]:
    """A row, the first frames as far as ``full`` goes, and their size."""
    latents = min(args.full, args.latents) if policy == WHOLE else args.latents
    frames: list[Tensor] = []
    with (
        vidattn.stream(pipe, policy, prompt=args.prompt, recipe=args.recipe) as video,
        tqdm(total=latents, desc=policy) as bar,
    ):
        while video.frame < latents:
            made = next(video)
            if video.frame <= args.full:
                frames.append(made.mul(255).round().byte().cpu())
            bar.update(video.frame - bar.n)
        chunks = video.chunks
    row = {
        "policy": policy,
        "first_frame": [chunk.first_frame for chunk in chunks],
        "ms": [1e3 * chunk.seconds for chunk in chunks],
        "num_frames": [chunk.num_frames for chunk in chunks],
        "tokens": [chunk.cache_tokens for chunk in chunks],
        "mib": [chunk.cache_bytes / 2**20 for chunk in chunks],
    }
    size = tuple(made.shape[-2:])
    return row, torch.cat(frames), (size[0], size[1])


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
            f"{statistics.median(first):.0f}",
            f"{statistics.median(last):.0f}",
            f"{drift(times[warm_up:]):+.0%}".replace("+nan%", ""),
            f"{speed:.1f}",
            f"{row['tokens'][-1]:,}",
            f"{row['mib'][-1]:.1f}",
            "" if is_whole else f"{row['psnr']:.1f} dB",
            "" if is_whole else f"{row['ssim']:.3f}",
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
