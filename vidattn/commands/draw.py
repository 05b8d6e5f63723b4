"""`vidattn draw`: a PNG of one or several plans on a grid."""

from __future__ import annotations

import argparse
import re

import torch

from vidattn.draw import draw
from vidattn.grid import Grid
from vidattn.plan import AnyPlan
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading
from vidattn.runs.output import write_atomically
from vidattn.simulation.work import speedup_bound
from vidattn.support.table import fill, table

MADE_UP = "queries and keys made up"


def run(args: argparse.Namespace) -> None:
    """Draw the plans, print their figures."""
    grid = Grid(*_three("--grid", args.grid), text=args.text, text_first=args.text_first)
    query = None
    if args.query:
        query = _token(grid, _three("--query", args.query))
    methods = {choice.label: choice.create() for choice in args.choices}
    for method in methods.values():
        method.check(grid)
    plans = {label: plan_of(method, grid) for label, method in methods.items()}
    made_up = [label for label, method in methods.items() if method.reads_content]
    figure = draw(plans, query=query, notes=dict.fromkeys(made_up, MADE_UP))
    with write_atomically(args.path) as partial:
        figure.savefig(partial, format=args.path.suffix[1:].lower())
    _print_figures(plans)
    if made_up:
        words = (
            "There is no model here: the queries and keys were made up, from a smooth pattern, for "
            f"{', '.join(made_up)}. A model may look elsewhere."
        )
        print(f"\n{fill(words)}")
    print(f"\nwrote {args.path}")


def plan_of(method: Method, grid: Grid) -> AnyPlan:
    """The plan of a method; one that reads content is shown a smooth stand-in for it."""
    return method.plan(grid, smooth_reading(grid) if method.reads_content else None)


def smooth_reading(grid: Grid, dim: int = 64) -> Reading:
    """Queries and keys alike that vary smoothly over the video, so that near tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(3, dim, generator=generator) * 2
    phase = torch.rand(dim, generator=generator) * 6.3
    places = grid.coords().float() / torch.tensor(grid.size)
    features = (3 * torch.cos(places @ waves + phase))[None, None]
    return Reading(features, features)


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


def _print_figures(plans: dict[str, AnyPlan]) -> None:
    head = ["method", "tokens", "density", "visited", "blocks", "plan\nMiB", "speed-up\nat most"]
    rows = []
    for label, plan in plans.items():
        figures = plan.summary()
        rows.append(
            [
                label,
                f"{figures['num_tokens']:,}",
                f"{figures['density']:.4f}",
                f"{figures['visited_density']:.4f}",
                f"{figures['num_blocks']:,}",
                f"{figures['memory_mib']:.1f}",
                f"{speedup_bound(plan):.2f}x",
            ]
        )
    print(table(head, rows))
