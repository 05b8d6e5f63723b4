"""Time vision backbones on this machine: python scripts/bench_backbones.py [--quick].

In turns: the models, forward and forward with backward, beside the families of timm that
``accelerate`` takes, as timm computes them in each of its settings and accelerated. Where NATTEN is
installed, DiNAT on it too, which has no position biases there. Writes backbones_SET.json and
backbones_SET.md, SET being the instruction set that bfloat16 runs on here, so that the tables of
other processors stay.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from benchmarks.instruction_sets import sets_in_use
from benchmarks.resident_memory import extra_mib
from timm.layers import set_fused_attn
from torch import Tensor, nn
from tqdm import tqdm

from vidattn.backbones import accelerate
from vidattn.backbones.layers.neighborhood_attention import NeighborhoodAttention2d
from vidattn.kernels.cpp.processor import instruction_set
from vidattn.runs.hardware import hardware


class Family(NamedTuple):
    """A model of timm that ``accelerate`` takes."""

    name: str
    # of its attention: timm's own operations, PyTorch's fused one, and accelerated
    settings: tuple[str, ...]
    has_size: bool = False
    multiple: int = 1  # of the edge of its images


OURS, NATTEN, SWIN = "accelerated", "dinat_tiny, NATTEN", "swin_tiny"
FAMILIES = {
    SWIN: Family("swin_tiny_patch4_window7_224", ("plain", "fused", OURS), has_size=True),
    "swinv2_tiny": Family("swinv2_tiny_window8_256", ("plain", OURS), has_size=True),
    "davit_tiny": Family("davit_tiny", ("plain", "fused", OURS)),
    "halonet26t": Family("halonet26t", ("plain", OURS), multiple=256),
}
MODELS = ("nat_tiny", "dinat_tiny", NATTEN, "biformer_tiny")
KINDS = ("forward", "train")
COLUMNS = (
    ("model", "model"),
    ("size", "pixels"),
    ("batch", "batch"),
    ("forward", "images/s"),
    ("forward_mib", "extra MiB"),
    ("train", "images/s fwd+bwd"),
    ("train_mib", "extra MiB fwd+bwd"),
)
RATIOS = (
    ("model", "speed of"),
    ("other", "over that of"),
    ("size", "pixels"),
    ("forward", "forward"),
    ("train", "fwd+bwd"),
)
NOTES = """\
Images per second of {clock} in float32, medians of {rounds} rounds in which everything is called in
turns. fwd+bwd is forward and backward in training mode. A ratio is the median over the rounds;
"timm" is the faster of timm's settings: plain operations, or PyTorch's fused attention where timm
can use it. extra is the peak of resident memory during the first call, beyond what was there before
it. Windows are 7 x 7 in Swin, Swin V2 and DaViT; HaloNet needs images of a multiple of 256 pixels.
NATTEN has no backward on a CPU, no position biases, and needs memory by the square of the pixels:
it is timed below 448 alone.
"""


class NattenAttention(NeighborhoodAttention2d):
    """The same attention by NATTEN, without its position biases."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        na2d = importlib.import_module("natten").na2d
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return self.proj(na2d(q, k, v, self.window, dilation=self.dilation).flatten(3))


def main() -> None:
    """Measure one size after another."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one image of 64 pixels, one round")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], help="edges of images")
    parser.add_argument("--batch", type=int, default=2, help="images of the first size")
    parser.add_argument("--rounds", type=int, default=5, help="times each function is called")
    parser.add_argument("--threads", type=int, help="of PyTorch; all cores by default")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes, batch, rounds = args.sizes, args.batch, args.rounds
    if args.quick:
        sizes, batch, rounds = [64], 1, 1
    packages = {name: version(name) for name in ("torch", "timm", "natten") if find_spec(name)}
    report = {"hardware": hardware() | packages, "sets": sets_in_use()}
    report |= {"rounds": rounds, "rows": [], "ratios": []}
    name = f"backbones_{'quick' if args.quick else instruction_set(torch.bfloat16)}"
    for size in sizes:
        # about as many pixels at any size
        count = max(1, batch * sizes[0] ** 2 // size**2)
        rows, ratios = measure(labels(size), size, count, rounds)
        report["rows"] += rows
        report["ratios"] += ratios
        write(report, args.out / name)


def write(report: dict, path: Path) -> None:
    """Print the tables, and write what there is so far."""
    text = to_markdown(report)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"wrote {path}.json and .md")


def labels(size: int) -> list[str]:
    """The lines of the table for one size of images."""
    # NATTEN needs dilated windows to fit into a map, and memory by the square of its pixels
    has_peer = find_spec("natten") and 224 <= size < 448
    models = [label for label in MODELS if label != NATTEN or has_peer]
    return models + [f"{name}, {how}" for name in FAMILIES for how in FAMILIES[name].settings]


def edge(label: str, size: int) -> int:
    """Pixels along the edge of the images of a model."""
    family = FAMILIES.get(label.partition(", ")[0])
    return size + -size % family.multiple if family else size


def create(label: str, size: int) -> nn.Module:
    """The model of a line of the table."""
    name, _, setting = label.partition(", ")
    if name not in FAMILIES:
        model = timm.create_model(name)
        for module in model.modules():
            if setting and type(module) is NeighborhoodAttention2d:
                module.__class__ = NattenAttention
        return model
    family = FAMILIES[name]
    options = {"img_size": size, "window_size": 7} if family.has_size else {}
    set_fused_attn(setting == "fused", experimental=True)
    model = timm.create_model(family.name, **options)
    set_fused_attn(True)
    if setting == OURS:
        accelerate(model)
    return model


def measure(labels: list[str], size: int, batch: int, rounds: int) -> tuple[list, list]:
    """A row of figures for each model at one size of images, and the ratios of their speeds."""
    functions = {}
    for label in labels:
        model = create(label, edge(label, size))
        images = torch.randn(batch, 3, edge(label, size), edge(label, size))
        functions[label, "forward"] = lambda model=model, images=images: forward(model, images)
        if label != NATTEN:
            functions[label, "train"] = lambda model=model, images=images: train(model, images)
    # the first calls compile and plan, and are not timed
    mib = {key: extra_mib(function) for key, function in functions.items()}
    times = in_turns(functions, rounds)
    rows = []
    for label in labels:
        row = {"model": label, "size": edge(label, size), "batch": batch}
        for kind in KINDS:
            key = label, kind
            row[kind] = batch / statistics.median(times[key]["used"]) if key in times else None
            row[f"{kind}_mib"] = mib.get(key)
            row[f"{kind}_wall_s"] = statistics.median(times[key]["wall"]) if key in times else None
        rows.append(row)
    used = {key: values["used"] for key, values in times.items()}
    return rows, [ratio(used, *pair, edge(pair[0], size)) for pair in pairs(labels)]


def pairs(labels: list[str]) -> list[tuple[str, str]]:
    """Which lines are compared with which: a family stands for the faster setting of timm."""
    found = [(f"{name}, {OURS}", name) for name in FAMILIES]
    found += [("dinat_tiny", NATTEN)] if NATTEN in labels else []
    return found + [(label, SWIN) for label in labels if label in MODELS and label != NATTEN]


def ratio(times: dict[tuple, list[float]], label: str, other: str, size: int) -> dict:
    """How many times as fast as another a model is, by the medians of all rounds."""
    row = {"model": label, "other": f"{other}, timm" if other in FAMILIES else other, "size": size}
    settings = FAMILIES[other].settings[:-1] if other in FAMILIES else ()
    others = [f"{other}, {setting}" for setting in settings] or [other]
    for kind in KINDS:
        candidates = [times[name, kind] for name in others if (name, kind) in times]
        if candidates:
            fastest = min(candidates, key=statistics.median)
            row[kind] = statistics.median(a / b for a, b in zip(fastest, times[label, kind]))
        else:
            row[kind] = None
    return row


def forward(model: nn.Module, images: Tensor) -> None:
    """Class scores, without gradients."""
    with torch.inference_mode():
        model.eval()(images)


def train(model: nn.Module, images: Tensor) -> None:
    """Forward and backward."""
    model.train()(images).sum().backward()
    model.zero_grad()


def clock_name() -> str:
    """CPU time stands for the time of one thread on a busy machine."""
    return "CPU time" if torch.get_num_threads() == 1 else "wall time"


def in_turns(functions: dict[tuple, Callable[[], None]], rounds: int) -> dict[tuple, dict]:
    """Seconds of wall time and of the clock used, for each function."""
    times = {key: {"wall": [], "used": []} for key in functions}
    clock = time.process_time if clock_name() == "CPU time" else time.perf_counter
    for _ in tqdm(range(rounds), unit="round", smoothing=0):
        for key, function in functions.items():
            begin, wall = clock(), time.perf_counter()
            function()
            times[key]["used"].append(clock() - begin)
            times[key]["wall"].append(time.perf_counter() - wall)
    return times


def to_markdown(report: dict) -> str:
    """The tables, with the machine above and notes below."""
    machine = report["hardware"]
    peer = f", NATTEN {machine['natten']}" if "natten" in machine else ""
    threads = machine["num_threads"]
    head = (
        f"# Vision backbones on {threads} thread{'s' * (threads > 1)} of {machine['cpu']}\n\n"
        f"{machine['num_cores']} cores, {machine['system']}, {report['sets']}, torch "
        f"{machine['torch']}, timm {machine['timm']}{peer}. `python scripts/bench_backbones.py`\n"
    )
    notes = NOTES.format(clock=clock_name(), rounds=report["rounds"])
    parts = [head, table(COLUMNS, report["rows"]), table(RATIOS, report["ratios"], "x"), notes]
    return "\n".join(parts)


def table(columns: tuple, rows: list[dict], unit: str = "") -> str:
    """The keys of rows under their titles."""
    lines = [" | ".join(title for _, title in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(show(key, row[key], unit) for key, _ in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def show(key: str, value: object, unit: str) -> str:
    """One cell."""
    if value is None:
        return "-"
    if key in KINDS:
        return f"{value:.2f}{unit}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
