"""Train small video models from scratch, dense and sparse: python scripts/bench_from_scratch.py.

Every method gets the same seeds, clips, noise and steps, on clips of so many tokens that attention
takes most of a step; the loss is that of clips which training does not have. Clips are those that
the bundled model was trained on, encoded by its autoencoder once. Runs that are finished are kept,
so that it goes on where it was stopped. Writes from_scratch.json and from_scratch.md.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.instruction_sets import sets_in_use
from diffusers import AutoencoderKLWan
from t2v.flow import FlowModel, TrainingAttention, flow_loss
from t2v.flow_stages import Batches, build_flow_model, flow_optimizers
from t2v.latents import LatentPool, Pools
from t2v.team import Team
from t2v.world import Clips
from torch import Tensor
from tqdm import tqdm

import vidattn
from vidattn.choice import Choice, parse_choice
from vidattn.kernels.timing import interleaved_ms
from vidattn.methods import create_method
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json
from vidattn.support.resources import resource

METHODS = (
    "dense",
    "vmoba:density=0.25",
    "radial:density=0.25",
    "neighborhood:window=5,11,11",
)
TEXT = """\
# Video models trained from scratch, dense and sparse

`python scripts/bench_from_scratch.py` on {cpu}, {num_cores} cores, {num_threads} in use, torch
{torch}; {sets}. Transformers of {layers} layers of {width} channels, {steps} steps
of {batch} clips of {tokens:,} tokens each, the same for all methods; flow matching, captions as the
bundled model has them. The loss is that of {held_out} clips which training does not have, with
noise that is the same for all, and each model reads them as it was trained: mean, and from the
least to the greatest of {seeds} seeds. Seconds of a step are medians in turns, "x" is how many
times as fast as dense it is, and density the share of the pairs of tokens that are read.

| method | density | loss | least to greatest | seconds | x |
|---|---:|---:|---:|---:|---:|
"""


class CaughtAttention(TrainingAttention):
    """Attention to the video where ``vidattn.patch`` catches it."""

    def over_video(self, attn, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention (B, H, S, D) of a layer."""
        return F.scaled_dot_product_attention(query, key, value)


class SparseModel(FlowModel):
    """A model whose layers each have a processor of their own for the video."""

    def use_training_attention(self) -> "SparseModel":
        """Switch to merged padding, float32 rotation tables, and attention that is caught."""
        super().use_training_attention()
        for block in self.transformer.blocks:
            block.attn1.processor = CaughtAttention()
        return self


class Run:
    """One model in training with one method and seed."""

    def __init__(self, choice: Choice, seed: int, config: dict, pool: LatentPool, batch: int):
        torch.manual_seed(seed)
        self.seed, self.batch, self.pool = seed, batch, pool
        is_dense = choice.name == "dense"
        self.model = build_flow_model(config, FlowModel if is_dense else SparseModel)
        self.model.use_training_attention()
        self.handle = None
        if not is_dense:
            method = create_method(choice.name, **choice.options)
            self.handle = vidattn.patch(self.model.transformer, method, dense_layers=0)
        self.optimizers = flow_optimizers(self.model, Team())
        self.read = Batches(config, None, Team(), 0.0).read

    def loss(self, picks: list[int], noise: int, frames: int) -> Tensor:
        """The loss of the clips of these numbers."""
        latents, scenes = self.pool.draw(picks, frames)
        tokens = self.read([scene.caption for scene in scenes])
        return flow_loss(self.model, latents, tokens, 3.0, noise)

    def step(self, number: int, clips: range, rate: float, frames: int) -> None:
        """One update from clips of a range."""
        rng = np.random.default_rng((self.seed, number))
        self.model.zero_grad(set_to_none=True)
        self.loss(
            rng.choice(clips, self.batch).tolist(), int(rng.integers(2**31)), frames
        ).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * {"muon": 4e-3, "adamw": 2e-3}[name]
            optimizer.step()

    @torch.no_grad()
    def held_out_loss(self, clips: range, frames: int) -> float:
        """The mean loss of clips, each at one noise level of its own."""
        return statistics.mean(self.loss([clip], clip, frames).item() for clip in clips)

    def density(self) -> float:
        """The share of the pairs of tokens that were read."""
        return 1.0 if self.handle is None else self.handle.report().density


def main() -> None:
    """Train what is not trained yet, print the table, write it."""
    args = parse()
    folder, work = writable_folder(args.out), writable_folder(args.work)
    choices = {text: parse_choice(text) for text in dict.fromkeys(("dense", *args.methods))}
    config = {
        "seed": 0,
        "world": "emoji",
        "vae": {"model": {"z_dim": 16}},
        "text": {"width": 64, "layers": 2},
        "flow": {
            "model": {
                "num_attention_heads": args.heads,
                "attention_head_dim": 64,
                "ffn_dim": 128 * args.heads,
                "num_layers": args.layers,
                "freq_dim": 128,
            }
        },
    }
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae")
    config["vae"]["model"]["z_dim"] = vae.config.z_dim
    count = args.clips + args.held_out
    kind = {"size": args.size, "count": count}
    pool = Pools(vae, Clips(args.data, 0), [kind], work, Team()).of(args.size)
    frames = pool.latents.shape[2]
    clips, held_out = range(args.clips), range(args.clips, count)
    settings = {"size": args.size, "steps": args.steps, "batch": args.batch, "clips": args.clips}
    settings |= {"held_out": args.held_out, "layers": args.layers, "heads": args.heads}
    kept = work / "from_scratch.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.get("settings", settings) != settings:
        raise SystemExit(f"{kept} holds runs of other settings: choose another --work")
    runs = found.get("runs", [])
    for seed, (text, choice) in itertools.product(range(args.seeds), choices.items()):
        if any((run["method"], run["seed"]) == (text, seed) for run in runs):
            continue
        run = Run(choice, seed, config, pool, args.batch)
        for step in tqdm(range(args.steps), desc=f"{text}, seed {seed}", ncols=100):
            # up, level, and down over the last half
            rate = min(1.0, (step + 1) / 20, 2 * (1 - step / args.steps))
            run.step(step, clips, rate, frames)
        loss = run.held_out_loss(held_out, frames)
        runs.append({"method": text, "seed": seed, "loss": loss, "density": run.density()})
        write_json(kept, {"settings": settings, "runs": runs})
    timed = {text: Run(choice, 0, config, pool, args.batch) for text, choice in choices.items()}
    ms = interleaved_ms(
        {text: lambda run=run: run.step(0, clips, 1.0, frames) for text, run in timed.items()}
    )
    facts = hardware() | {"torch": torch.__version__, "sets": sets_in_use(), "seeds": args.seeds}
    facts |= settings | {"width": 64 * args.heads, "tokens": pool.latents[0, 0].numel()}
    rows = [row_of(text, runs, ms[text], args.seeds) for text in choices]
    text = to_markdown(rows, facts)
    write_json(folder / "from_scratch.json", {"facts": facts, "rows": rows})
    with write_atomically(folder / "from_scratch.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--data", default="runs/world/data", help="folder of the pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/from_scratch"))
    parser.add_argument("--model", default=str(resource("assets/tiny-t2v")), help="of the encoder")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="beside dense")
    parser.add_argument(
        "--size", type=int, nargs=3, default=[65, 128, 128], metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    numbers = {"clips": 400, "held-out": 64, "steps": 400, "batch": 1, "seeds": 3}
    for name, default in (numbers | {"layers": 3, "heads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def row_of(method: str, runs: list[dict], ms: float, seeds: int) -> dict[str, object]:
    """What the runs of a method came to."""
    own = [run for run in runs if run["method"] == method and run["seed"] < seeds]
    losses = [run["loss"] for run in own]
    return {"method": method, "density": own[0]["density"], "losses": losses, "seconds": ms / 1e3}


def to_markdown(rows: list[dict], facts: dict[str, object]) -> str:
    """The page: a line for each method."""
    lines = []
    for row in rows:
        losses = row["losses"]
        cells = [f"`{row['method']}`", f"{row['density']:.2f}", f"{statistics.mean(losses):.4f}"]
        cells += [f"{min(losses):.4f} to {max(losses):.4f}", f"{row['seconds']:.2f}"]
        cells.append(f"{rows[0]['seconds'] / row['seconds']:.2f}")
        lines.append(f"| {' | '.join(cells)} |\n")
    return TEXT.format(**facts) + "".join(lines)


if __name__ == "__main__":
    main()
