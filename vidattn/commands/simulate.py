"""`vidattn simulate`: how fast a method can be on a GPU, and its best tile, without running it."""

from __future__ import annotations

import argparse
import dataclasses
import re

from vidattn.commands.draw import smooth_reading
from vidattn.grid import Grid, Size
from vidattn.planning.method import Method
from vidattn.runs.output import write_json
from vidattn.schedule import DenseGuard
from vidattn.simulation.gpus import Gpu
from vidattn.simulation.simulate import Counts, Estimate, Work, best_first, count_tiles, estimate
from vidattn.support.table import fill, table

NOTE = """\
Bounds and a model, nothing was measured. Times are of one layer.
  at most  the best dense kernel, on the visited pairs alone: a bound
  model    a Triton kernel on the computed slots, predicates included, and the
           passes beside it (reordering q, k, v and the output; pooled scores)
  e2e      with the matrices, norms and cross attention of the transformer
  even     the density above which dense attention is modelled to be faster"""


def run(args: argparse.Namespace) -> None:
    """Count, estimate and print."""
    if args.figures:
        _show_figures(args.gpus)
        return
    grid, work = _workload(args)
    methods = {choice.label: choice.create() for choice in args.choices}
    for method in methods.values():
        method.check(grid)
    report = []
    for label, method in methods.items():
        counts = _count(method, grid)
        given = {"reads_content": method.reads_content}
        ranked = {
            gpu.name: best_first(estimate(x, grid, gpu, work, **given) for x in counts)
            for gpu in args.gpus
        }
        _show(label, grid, work, ranked, args.tiles)
        report += [_entry(label, grid, work, x[0]) for x in ranked.values()]
        if method.reads_content:
            print("Its plan was made for a smooth stand-in of queries and keys.")
        print()
    print(NOTE)
    if args.path:
        write_json(args.path, report)
        print(f"\nwrote {args.path}")


def _workload(args: argparse.Namespace) -> tuple[Grid, Work]:
    """The token grid, and the work of one layer on it."""
    model = args.video_model
    if model is None:
        grid = Grid(*_three("--grid", args.grid), text=args.text or 0)
        return grid, Work(args.heads or 24, args.head_dim or 128)
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


def _count(method: Method, grid: Grid) -> list[Counts]:
    reading = smooth_reading(grid) if method.reads_content else None
    return list(count_tiles(method, grid, reading))


def _show(
    label: str, grid: Grid, work: Work, ranked: dict[str, list[Estimate]], num_tiles: int
) -> None:
    size = "x".join(map(str, grid.size))
    text = f" and {grid.text} of text" if grid.text else ""
    of = f" of {work.model.name}" if work.model else ""
    print(
        fill(
            f"{label} on {size} = {grid.num_video_tokens:,} tokens{text}, "
            f"{work.heads} heads of {work.head_dim}{of}"
        )
    )
    gpu, estimates = next(iter(ranked.items()))
    best = estimates[0].counts
    print(
        f"needed pairs   {best.needed_pairs:>15,} a head, density {best.density:.4f}\n"
        f"visited pairs  {best.visited_pairs:>15,} a head, density {best.visited_density:.4f}, "
        f"with tile {_tile(best)}\n"
    )
    if len(estimates) > 1:
        print(f"tiles, the fastest on {gpu} first ({len(estimates)} tried)")
        print(f"{_tile_table(estimates[:num_tiles])}\n")
    print(_gpu_table(ranked))
    if work.dense_share:
        print(f"end to end with {work.dense_share:.0%} of the attention calls dense")


def _tile(counts: Counts) -> str:
    return "x".join(map(str, counts.tile)) if counts.tile else "own"


def _tile_table(estimates: list[Estimate]) -> str:
    head = ["tile", "slots", "density", "visited", "computed", "partial", "padding", "at most"]
    rows = [
        [
            _tile(x.counts),
            str(x.counts.block),
            f"{x.counts.density:.4f}",
            f"{x.counts.visited_density:.4f}",
            f"{x.counts.computed_share:.4f}",
            f"{x.counts.partial_share:.0%}",
            f"{x.counts.padding:.2f}x",
            f"{x.ideal_speedup:.2f}x",
            f"{x.speedup:.2f}x",
        ]
        for x in estimates
    ]
    return table([*head, "model"], rows)


def _gpu_table(ranked: dict[str, list[Estimate]]) -> str:
    has_rest = any(estimates[0].rest_ms for estimates in ranked.values())
    head = ["GPU", "tile", "dense\nms", "kernel\nms", "beside\nms", "attn\nat most"]
    head += ["attn\nmodel", *["e2e\nat most", "e2e\nmodel"] * has_rest, "break\neven", "run"]
    rows = []
    for gpu, (best, *_) in ranked.items():
        rates = [best.ideal_speedup, best.speedup]
        rates += [best.ideal_end_to_end, best.end_to_end] * has_rest
        times = [best.dense_ms, best.kernel_ms, sum(best.overhead_ms.values())]
        rows.append(
            [
                gpu,
                _tile(best.counts),
                *[f"{ms:.1f}" for ms in times],
                *[f"{rate:.2f}x" for rate in rates],
                f"{best.break_even:.2f}",
                "dense" if best.runs_dense else "sparse",
            ]
        )
    return table(head, rows)


def _entry(label: str, grid: Grid, work: Work, best: Estimate) -> dict[str, object]:
    """Everything about the best tile on one GPU."""
    derived = ("sparse_ms", "ideal_speedup", "speedup", "ideal_end_to_end", "end_to_end")
    figures = dataclasses.asdict(best) | {name: getattr(best, name) for name in derived}
    if work.model is None:
        for name in ("rest_ms", "ideal_end_to_end", "end_to_end"):
            figures[name] = None
    return {
        "kind": "bounds and a model, not measured",
        "method": label,
        "model": work.model.name if work.model else None,
        "grid": dataclasses.asdict(grid),
        "heads": work.heads,
        "head_dim": work.head_dim,
        **figures,
        "runs_dense": best.runs_dense,
    }


def _show_figures(gpus: list[Gpu]) -> None:
    for gpu in gpus:
        print(f"{gpu.name}  {gpu.device}, {gpu.architecture}")
        rows = [
            [name, f"{figure.value:g}", figure.basis, figure.source]
            for name, figure in gpu.figures.items()
        ]
        print(f"{table(['figure', 'value', 'basis', 'source'], rows, prose=['source'])}\n")
