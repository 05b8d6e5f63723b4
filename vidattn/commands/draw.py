"""`vidattn draw`: a PNG of one or several plans on a grid."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vidattn.commands.choice import SYNTAX, Choice, choices_of
from vidattn.commands.output import writable_file, write_atomically
from vidattn.draw import draw
from vidattn.grid import Grid
from vidattn.measure import speedup_bound
from vidattn.methods import create_method
from vidattn.plan import Plan

EXAMPLES = """\
examples:
  vidattn draw radial --density 0.3 --grid 21x30x52
  vidattn draw neighborhood:window=5,9,9 radial:density=0.3 --grid 13x16x24 --output plans.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=SYNTAX)
    parser.add_argument("--method", action="append", default=[], metavar="METHOD", help="the same")
    parser.add_argument(
        "--grid", default="13x16x24", help="latent frames x rows x columns (default %(default)s)"
    )
    parser.add_argument("--text", type=int, default=0, help="text tokens in the sequence")
    parser.add_argument("--text-first", action="store_true", help="text stands before the video")
    parser.add_argument(
        "--query", metavar="t,h,w", help="the token whose keys are shown (default the middle one)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/plan.png"), help="default %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Draw the plans, print their figures."""
    grid = Grid(*_three("--grid", args.grid), text=args.text, text_first=args.text_first)
    query = None
    if args.query:
        query = _token(grid, _three("--query", args.query))
    choices = choices_of(args)
    path = writable_file(args.output, (".png", ".pdf", ".svg"))
    plans = {choice.label: plan_of(choice, grid) for choice in choices}
    figure = draw(plans, query=query)
    with write_atomically(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    _print_figures(plans)
    Console(highlight=False).print(f"\nwrote {path}", soft_wrap=True)


def plan_of(choice: Choice, grid: Grid) -> Plan:
    """The plan of a choice; methods that read content are shown a smooth stand-in for it."""
    method = create_method(choice.name, **choice.options)
    q = k = smooth_content(grid) if method.reads_content else None
    return method.plan(grid, q, k)


def smooth_content(grid: Grid, dim: int = 64) -> Tensor:
    """(1, 1, S, D) features that vary smoothly over the video, so that near tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(3, dim, generator=generator) * 2
    phase = torch.rand(dim, generator=generator) * 6.3
    places = grid.coords().float() / torch.tensor(grid.size)
    return (3 * torch.cos(places @ waves + phase))[None, None]


def _three(flag: str, text: str) -> tuple[int, int, int]:
    pieces = re.split(r"[x×,]", text)
    try:
        t, h, w = (int(piece) for piece in pieces)
    except ValueError:
        raise ValueError(f"{flag} must be three integers such as 21x30x52, got {text!r}") from None
    return t, h, w


def _token(grid: Grid, place: tuple[int, int, int]) -> int:
    if not all(0 <= x < extent for x, extent in zip(place, grid.size)):
        raise ValueError(f"--query {place} lies outside the grid {grid.size}; places count from 0")
    t, h, w = place
    return grid.video_start + (t * grid.h + h) * grid.w + w


def _print_figures(plans: dict[str, Plan]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", overflow="fold")
    columns = ("tokens", "density", "visited", "blocks", "plan MiB", "speed-up at most")
    for column in columns:
        table.add_column(column, justify="right")
    for label, plan in plans.items():
        figures = plan.summary()
        table.add_row(
            label,
            f"{figures['num_tokens']:,}",
            f"{figures['density']:.4f}",
            f"{figures['visited_density']:.4f}",
            f"{figures['num_blocks']:,}",
            f"{figures['memory_mib']:.1f}",
            f"{speedup_bound(plan):.2f}x",
        )
    Console(highlight=False).print(table)
