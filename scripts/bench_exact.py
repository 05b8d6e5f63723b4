"""Time attention to everything, PyTorch's and ours: python scripts/bench_exact.py.

In turns, forward and with the gradient, in float32 and bfloat16, on lengths from those of vision
transformers to those of videos, and vision transformers of timm as they are and accelerated. Writes
exact_SET.json and exact_SET.md, SET being the instruction set that bfloat16 runs on here, so that
the tables of other processors stay.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from bench_attention import train
from benchmarks.instruction_sets import sets_in_use
from torch import Tensor
from tqdm import tqdm

from vidattn.backbones import accelerate
from vidattn.kernels.cpp.processor import instruction_set
from vidattn.kernels.engines.block_sparse_cpu import attention
from vidattn.kernels.engines.exact import exact_engine, whole_lists
from vidattn.kernels.timing import interleaved_ms
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json

DTYPES = ("float32", "bfloat16")
# batch, heads, tokens
SHAPES = [(8, 6, 197), (4, 6, 577), (1, 8, 1280), (1, 4, 2304), (1, 2, 4352), (1, 2, 8192)]
HEAD_DIMS = (64, 128)
VITS = {"deit_small_patch16_224": 224, "vit_small_patch16_384": 384}
IMAGES = 4
TEXT = """\
# Attention to everything on {cpu}

`python scripts/bench_exact.py` on {num_cores} cores, {num_threads} in use, torch {torch}; the cpp
engine on {sets}. Milliseconds, medians of {rounds} in turns; "x" is how many times as fast as
PyTorch ours is, and "runs on" what dense calls are given here, which is measured apart, once.

| dtype | D | batch, heads, tokens | PyTorch | cpp | x | runs on | PyTorch, and backward | cpp | x \
| runs on |
|---|---:|---|---:|---:|---:|---|---:|---:|---:|---|
{rows}

Vision transformers of timm at {images} images, as they are and in `accelerate`:

| model | dtype | forward | accelerated | x | and backward | accelerated | x |
|---|---|---:|---:|---:|---:|---:|---:|
{models}
"""


def main() -> None:
    """Measure, print the tables, write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most-tokens", type=int, default=8192, help="leave longer calls out")
    parser.add_argument("--models", nargs="*", choices=VITS, default=list(VITS))
    args = parser.parse_args()
    folder = writable_folder(args.out)
    torch.manual_seed(0)
    shapes = [shape for shape in SHAPES if shape[2] <= args.most_tokens]
    cases = [(x, D, shape) for x in DTYPES for D in HEAD_DIMS for shape in shapes]
    rows = [measure(*case, args.rounds) for case in tqdm(cases)]
    models = [measure_model(x, y, args.rounds) for x in args.models for y in DTYPES]
    facts = hardware() | {"torch": torch.__version__, "sets": sets_in_use(), "rounds": args.rounds}
    text = to_markdown(rows, models, facts)
    name = f"exact_{instruction_set(torch.bfloat16)}"
    write_json(folder / f"{name}.json", {"facts": facts, "rows": rows, "models": models})
    with write_atomically(folder / f"{name}.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)


def measure(dtype: str, head_dim: int, shape: tuple[int, int, int], rounds: int) -> dict:
    """The times of both engines, and the one that is chosen, in calls of a kind."""
    batch, heads, tokens = shape
    # tokens before heads in memory, as models have them
    q, k, v, pull = (
        torch.randn(batch, tokens, heads, head_dim).to(getattr(torch, dtype)).transpose(1, 2)
        for _ in range(4)
    )
    lists, engines = whole_lists(tokens), {"pytorch": F.scaled_dot_product_attention}
    engines["cpp"] = lambda *x: attention(*x, lists, scale=head_dim**-0.5)[0]
    row = {"dtype": dtype, "head_dim": head_dim, "shape": list(shape)}
    row["forward_ms"] = interleaved_ms(
        {name: lambda run=run: run(q, k, v) for name, run in engines.items()}, rounds=rounds
    )
    row["train_ms"] = interleaved_ms(
        {name: lambda run=run: train(run, q, k, v, pull) for name, run in engines.items()},
        rounds=rounds,
    )
    row["forward_on"] = exact_engine(q, k, v)
    row["train_on"] = exact_engine(q.detach().requires_grad_(), k, v)
    return row


def measure_model(name: str, dtype: str, rounds: int) -> dict:
    """The times of a vision transformer as it is and accelerated."""
    plain, faster = (timm.create_model(name).to(getattr(torch, dtype)).eval() for _ in range(2))
    accelerate(faster)
    images = torch.randn(IMAGES, 3, VITS[name], VITS[name]).to(getattr(torch, dtype))
    models = {"plain": plain, "accelerated": faster}

    def look(model: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            model(images)

    def learn(model: torch.nn.Module) -> None:
        model.zero_grad()
        model(images).sum().backward()

    return {
        "model": name,
        "dtype": dtype,
        "forward_ms": in_turns(look, models, rounds),
        "train_ms": in_turns(learn, models, rounds),
    }


def in_turns(run: Callable, models: dict[str, torch.nn.Module], rounds: int) -> dict[str, float]:
    """Milliseconds of each model."""
    functions = {name: lambda model=model: run(model) for name, model in models.items()}
    return interleaved_ms(functions, rounds=rounds)


def to_markdown(rows: list[dict], models: list[dict], facts: dict[str, object]) -> str:
    """The page."""
    lines = []
    for row in rows:
        cells = [row["dtype"], str(row["head_dim"]), ", ".join(map(str, row["shape"]))]
        for what in ("forward", "train"):
            cells += [*pair(row[f"{what}_ms"], "pytorch", "cpp"), row[f"{what}_on"]]
        lines.append(f"| {' | '.join(cells)} |")
    others = []
    for row in models:
        cells = [f"`{row['model']}`", row["dtype"]]
        for what in ("forward", "train"):
            cells += pair(row[f"{what}_ms"], "plain", "accelerated")
        others.append(f"| {' | '.join(cells)} |")
    tables = {"rows": "\n".join(lines), "models": "\n".join(others)}
    return TEXT.format(**facts, **tables, images=IMAGES)


def pair(ms: dict[str, float], slow: str, fast: str) -> list[str]:
    """Two times, and how many times as fast the second is."""
    return [f"{ms[slow]:.1f}", f"{ms[fast]:.1f}", f"{ms[slow] / ms[fast]:.2f}"]


if __name__ == "__main__":
    main()
