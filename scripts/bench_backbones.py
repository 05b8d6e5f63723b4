"""Time vision backbones on this machine: python scripts/bench_backbones.py [--quick].

In turns: each model, forward and forward with backward, and Swin for comparison, as timm makes it
by default, with timm's fused attention, and accelerated. Where NATTEN is installed, DiNAT on it
too, which has no position biases there. Writes backbones_cpu.json and backbones_cpu.md.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from resident_memory import extra_mib
from timm.layers import set_fused_attn
from torch import Tensor, nn
from tqdm import tqdm

from vidattn.backbones import accelerate
from vidattn.backbones.neighborhood_attention import NeighborhoodAttention2d
from vidattn.measure import hardware

SWIN = "swin_tiny_patch4_window7_224"
NATTEN, FUSED, OURS = "dinat_tiny, NATTEN", "swin_tiny, fused", "swin_tiny, accelerated"
LABELS = ("nat_tiny", "dinat_tiny", NATTEN, "biformer_tiny", "swin_tiny", FUSED, OURS)
COLUMNS = (
    ("model", "model"),
    ("size", "pixels"),
    ("forward", "images/s"),
    ("forward_times", "of Swin"),
    ("train", "images/s fwd+bwd"),
    ("train_times", "of Swin"),
    ("train_mib", "extra MiB fwd+bwd"),
)
NOTES = """\
Images per second in float32, {batch} to a batch, medians of {rounds} rounds in which everything is
called in turns. fwd+bwd is forward and backward in training mode. "of Swin" is the speed over that
of Swin in timm's faster setting. extra is the peak of resident memory during a call, beyond what
was there before it. NATTEN has no backward on a CPU, and no position biases.
"""


class NattenAttention(NeighborhoodAttention2d):
    """The same attention by NATTEN, without its position biases."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        na2d = importlib.import_module("natten").na2d
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return self.proj(na2d(q, k, v, self.window, dilation=self.dilation).flatten(3))


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="224 pixels and one round")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], help="edges of images")
    parser.add_argument("--batch", type=int, default=2, help="images at a time")
    parser.add_argument("--rounds", type=int, default=5, help="times each function is called")
    parser.add_argument("--threads", type=int, help="of PyTorch; all cores by default")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes, rounds = ([224], 1) if args.quick else (args.sizes, args.rounds)
    labels = [label for label in LABELS if label != NATTEN or find_spec("natten")]
    rows = []
    for size in sizes:
        rows += measure(labels, size, args.batch, rounds)
    machine = hardware() | {"torch": torch.__version__, "timm": timm.__version__}
    text = to_markdown(rows, machine, args.batch, rounds)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "backbones_quick" if args.quick else "backbones_cpu"
    report = {"hardware": machine, "batch": args.batch, "rounds": rounds, "rows": rows}
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(text)
    print(f"wrote {args.out / name}.json and .md")


def create(label: str, size: int) -> nn.Module:
    """The model of a line of the table."""
    name, _, variant = label.partition(", ")
    if name != "swin_tiny":
        model = timm.create_model(name)
        for module in model.modules():
            if variant and type(module) is NeighborhoodAttention2d:
                module.__class__ = NattenAttention
        return model
    set_fused_attn(True, experimental=label == FUSED)
    model = timm.create_model(SWIN, img_size=size, window_size=7)
    set_fused_attn(True)
    if label == OURS:
        accelerate(model)
    return model


def measure(labels: list[str], size: int, batch: int, rounds: int) -> list[dict]:
    """One row of figures for each model at one size of images."""
    images = torch.randn(batch, 3, size, size)
    models = {label: create(label, size) for label in labels}
    functions = {}
    for label, model in models.items():
        functions[label, "forward"] = lambda model=model: forward(model, images)
        if label != NATTEN:
            functions[label, "train"] = lambda model=model: train(model, images)
    seconds = in_turns(functions, rounds)
    rows = []
    for label in labels:
        row = {"model": label, "size": size}
        for kind in ("forward", "train"):
            time_s = seconds.get((label, kind))
            row[kind] = batch / time_s if time_s else None
            swin = min(seconds["swin_tiny", kind], seconds[FUSED, kind])
            row[f"{kind}_times"] = swin / time_s if time_s else None
        trained = functions.get((label, "train"))
        row["train_mib"] = extra_mib(trained) if trained else None
        rows.append(row)
    return rows


def forward(model: nn.Module, images: Tensor) -> None:
    """Class scores, without gradients."""
    with torch.inference_mode():
        model.eval()(images)


def train(model: nn.Module, images: Tensor) -> None:
    """Forward and backward."""
    model.train()(images).sum().backward()
    model.zero_grad()


def in_turns(functions: dict[tuple, Callable[[], None]], rounds: int) -> dict[tuple, float]:
    """Median seconds of each function, after a call that is left out."""
    times = {key: [] for key in functions}
    for step in tqdm(range(rounds + 1), unit="round", smoothing=0):
        for key, function in functions.items():
            begin = time.perf_counter()
            function()
            if step:
                times[key].append(time.perf_counter() - begin)
    return {key: statistics.median(values) for key, values in times.items()}


def to_markdown(rows: list[dict], machine: dict, batch: int, rounds: int) -> str:
    """The table, with the machine above and notes below."""
    head = (
        f"# Vision backbones on {machine['num_threads']} threads of {machine['cpu']}\n\n"
        f"{machine['num_cores']} cores, {machine['system']}, torch {machine['torch']}, timm "
        f"{machine['timm']}. `python scripts/bench_backbones.py`\n"
    )
    lines = [" | ".join(title for _, title in COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(show(key, row[key]) for key, _ in COLUMNS) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{head}\n{table}\n\n{NOTES.format(batch=batch, rounds=rounds)}"


def show(key: str, value: object) -> str:
    """One cell."""
    if value is None:
        return "-"
    if key.endswith("times"):
        return f"{value:.2f}x"
    if key in ("forward", "train"):
        return f"{value:.2f}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
