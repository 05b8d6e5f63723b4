"""`vidattn simulate`: how fast a method can be on a GPU, and its best tile, without running it."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vidattn.commands.choice import SYNTAX, Choice, choices_of
from vidattn.commands.draw import smooth_content
from vidattn.commands.output import writable_file, write_json
from vidattn.commands.request import count_or_share, positive_int
from vidattn.gpus import Gpu, find_gpu, list_gpus
from vidattn.grid import Grid, Size
from vidattn.methods import create_method
from vidattn.schedule import DenseGuard
from vidattn.simulate import Counts, Estimate, Work, best_first, count_tiles, estimate
from vidattn.video_models import find_video_model, list_video_models

DEFAULT_MODEL = "wan2.1-14b"
NOTE = """\
Bounds and a model, nothing was measured. Times are of one layer.
  at most  the best dense kernel, on the visited pairs alone: a bound
  model    a Triton kernel on the computed slots, predicates included, and the
           passes beside it (reordering q, k, v and the output; pooled scores)
  e2e      with the matrices, norms and cross attention of the transformer
  even     the density above which dense attention is modelled to be faster"""
EXAMPLES = """\
examples:
  vidattn simulate radial --density 0.3 --model wan2.1-14b --size 81x720x1280
  vidattn simulate neighborhood --window 9,21,41 --model hunyuanvideo --gpu H100
  vidattn simulate neighborhood:window=5,9,9 radial --grid 16x32x32 --heads 12 --head-dim 64
  vidattn simulate --figures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=SYNTAX)
    parser.add_argument("--method", action="append", default=[], metavar="METHOD", help="the same")
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(list_video_models())} ({DEFAULT_MODEL})"
    )
    group.add_argument("--size", metavar="FxHxW", help="frames x height x width of the video")
    group.add_argument("--grid", metavar="TxHxW", help="a token grid instead of a model's video")
    group.add_argument("--text", type=int, help="text tokens in the sequence (default the model's)")
    group.add_argument("--heads", type=positive_int, metavar="N", help="with --grid, default 24")
    group.add_argument("--head-dim", type=positive_int, metavar="N", help="likewise, default 128")
    group.add_argument(
        "--dense-layers", type=count_or_share, default=0, metavar="X",
        help="first layers that stay dense: a count or a share (default 0)",
    )  # fmt: skip
    group.add_argument(
        "--dense-steps", type=count_or_share, default=0, metavar="X",
        help="first denoising steps that stay dense: a count or a share (default 0)",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument(
        "--gpu", action="append", metavar="NAME", help=f"{', '.join(list_gpus())} (default all)"
    )
    group.add_argument(
        "--tiles", type=positive_int, default=5, metavar="N", help="tiles to list (default 5)"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    group.add_argument("--figures", action="store_true", help="show what is assumed about the GPUs")


def run(args: argparse.Namespace) -> None:
    """Count, estimate and print."""
    console = Console(highlight=False)
    gpus = list(dict.fromkeys(find_gpu(name) for name in args.gpu or list_gpus()))
    if args.figures:
        _show_figures(console, gpus)
        return
    path = writable_file(args.json, (".json",), "--json") if args.json else None
    choices = choices_of(args)
    grid, work = _workload(args)
    report = []
    for choice in choices:
        with console.status(f"counting the pairs of {choice.label}"):
            counts = _count(choice, grid)
        reads_content = create_method(choice.name, **choice.options).reads_content
        ranked = {
            gpu.name: best_first(
                estimate(x, grid, gpu, work, reads_content=reads_content) for x in counts
            )
            for gpu in gpus
        }
        _show(console, choice, grid, work, ranked, args.tiles)
        report += [_entry(choice, grid, work, x[0]) for x in ranked.values()]
        if reads_content:
            console.print("Its plan was made for a smooth stand-in of queries and keys.")
        console.print()
    console.print(NOTE)
    if path:
        write_json(path, report)
        console.print(f"\nwrote {path}", soft_wrap=True)


def _workload(args: argparse.Namespace) -> tuple[Grid, Work]:
    """The token grid, and the work of one layer on it."""
    if args.grid:
        for flag in ("model", "size", "dense_layers", "dense_steps"):
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag.replace('_', '-')} belongs to a model's video; leave it or --grid out"
                )
        grid = Grid(*_three("--grid", args.grid), text=args.text or 0)
        return grid, Work(args.heads or 24, args.head_dim or 128)
    for flag in ("heads", "head_dim"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} goes with --grid; a model has its own")
    model = find_video_model(args.model or DEFAULT_MODEL)
    grid = model.grid(*(_three("--size", args.size) if args.size else model.size))
    if args.text is not None:
        grid = dataclasses.replace(grid, text=args.text)
    guard = DenseGuard(args.dense_layers, args.dense_steps)
    layers = min(1, guard.num_layers(model.layers) / model.layers)
    steps = min(1, guard.num_steps(model.steps) / model.steps)
    return grid, Work(model.heads, model.head_dim, model, 1 - (1 - layers) * (1 - steps))


def _three(flag: str, text: str) -> Size:
    pieces = re.split(r"[x×,]", text)
    if len(pieces) != 3 or not all(piece.strip().isdigit() for piece in pieces):
        raise ValueError(f"{flag} must be three integers such as 21x45x80, got {text!r}")
    a, b, c = map(int, pieces)
    return a, b, c


def _count(choice: Choice, grid: Grid) -> list[Counts]:
    method = create_method(choice.name, **choice.options)
    q = smooth_content(grid) if method.reads_content else None
    return list(count_tiles(method, grid, q, q))


def _show(
    console: Console,
    choice: Choice,
    grid: Grid,
    work: Work,
    ranked: dict[str, list[Estimate]],
    num_tiles: int,
) -> None:
    size = "x".join(map(str, grid.size))
    text = f" and {grid.text} of text" if grid.text else ""
    of = f" of {work.model.name}" if work.model else ""
    console.print(
        f"[bold cyan]{choice.label}[/] on {size} = {grid.num_video_tokens:,} tokens{text}, "
        f"{work.heads} heads of {work.head_dim}{of}",
        soft_wrap=True,
    )
    gpu, estimates = next(iter(ranked.items()))
    best = estimates[0].counts
    console.print(
        f"needed pairs   {best.needed_pairs:>15,} a head, density {best.density:.4f}\n"
        f"visited pairs  {best.visited_pairs:>15,} a head, density {best.visited_density:.4f}, "
        f"with tile {_tile(best)}\n"
    )
    if len(estimates) > 1:
        console.print(f"[bold]tiles, the fastest on {gpu} first[/] ({len(estimates)} tried)")
        console.print(_tile_table(estimates[:num_tiles]))
        console.print()
    console.print(_gpu_table(ranked))
    if work.dense_share:
        console.print(f"end to end with {work.dense_share:.0%} of the attention calls dense")


def _tile(counts: Counts) -> str:
    return "x".join(map(str, counts.tile)) if counts.tile else "own"


def _tile_table(estimates: list[Estimate]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tile")
    columns = ("slots", "density", "visited", "computed", "partial", "padding", "at most", "model")
    for column in columns:
        table.add_column(column, justify="right")
    for x in estimates:
        counts = x.counts
        table.add_row(
            _tile(counts),
            str(counts.block),
            f"{counts.density:.4f}",
            f"{counts.visited_density:.4f}",
            f"{counts.computed_share:.4f}",
            f"{counts.partial_share:.0%}",
            f"{counts.padding:.2f}x",
            f"{x.ideal_speedup:.2f}x",
            f"{x.speedup:.2f}x",
        )
    return table


def _gpu_table(ranked: dict[str, list[Estimate]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    has_rest = any(estimates[0].rest_ms for estimates in ranked.values())
    columns = ["GPU", "tile", "dense\nms", "kernel\nms", "beside\nms", "attn\nat most"]
    columns += ["attn\nmodel", *["e2e\nat most", "e2e\nmodel"] * has_rest, "break\neven", "run"]
    for column in columns:
        left = column in ("GPU", "tile", "run")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for gpu, (best, *_) in ranked.items():
        rates = [best.ideal_speedup, best.speedup]
        rates += [best.ideal_end_to_end, best.end_to_end] * has_rest
        table.add_row(
            gpu,
            _tile(best.counts),
            f"{best.dense_ms:.1f}",
            f"{best.kernel_ms:.1f}",
            f"{sum(best.overhead_ms.values()):.1f}",
            *[f"{rate:.2f}x" for rate in rates],
            f"{best.break_even:.2f}",
            "dense" if best.runs_dense else "sparse",
        )
    return table


def _entry(choice: Choice, grid: Grid, work: Work, best: Estimate) -> dict[str, object]:
    """Everything about the best tile on one GPU."""
    derived = ("sparse_ms", "ideal_speedup", "speedup", "ideal_end_to_end", "end_to_end")
    figures = dataclasses.asdict(best) | {name: getattr(best, name) for name in derived}
    if work.model is None:
        for name in ("rest_ms", "ideal_end_to_end", "end_to_end"):
            figures[name] = None
    return {
        "kind": "bounds and a model, not measured",
        "method": choice.label,
        "model": work.model.name if work.model else None,
        "grid": dataclasses.asdict(grid),
        "heads": work.heads,
        "head_dim": work.head_dim,
        **figures,
        "runs_dense": best.runs_dense,
    }


def _show_figures(console: Console, gpus: list[Gpu]) -> None:
    for gpu in gpus:
        console.print(f"[bold cyan]{gpu.name}[/]  {gpu.device}, {gpu.architecture}")
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        for name, figure in gpu.figures.items():
            table.add_row(name, f"{figure.value:g}", figure.basis, figure.source)
        console.print(table)
        console.print()
