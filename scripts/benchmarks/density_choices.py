"""Every method at a few densities, plain and rectified: what the benchmarks of quality compare."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from vidattn.catalog import describe, list_sparse_methods
from vidattn.choice import Choice
from vidattn.grid import Grid
from vidattn.runs.choices import ScheduleChoice
from vidattn.runs.serve import choice_at

# the one that matters most first: a run that is stopped has that
DENSITIES = (0.25, 0.15, 0.4, 0.6)
# options that a method needs to reach a low density on a short clip
BESIDE = {"radial": {"near": 0, "sink": False}}


def add_density_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for ``choices_at``."""
    parser.add_argument(
        "--methods", type=lambda text: tuple(text.split(",")), default=(),
        help="comma-separated; all by default",
    )  # fmt: skip
    parser.add_argument(
        "--densities", type=lambda text: tuple(map(float, text.split(","))), default=DENSITIES,
        help=f"comma-separated, default {','.join(map(str, DENSITIES))}",
    )  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="leave out what is rectified")


def choices_at(
    densities: Sequence[float], grid: Grid, methods: Sequence[str] = (), plain: bool = False
) -> list[tuple[float, Choice]]:
    """Methods with their options, and the density that was asked for.

    A method that knows no density comes once.

    Args:
        methods: all that leave something out when none are given.
        plain: whether to leave out the rectified variant of each.
    """
    found: dict[str, tuple[float, Choice]] = {}
    names = methods or list_sparse_methods()
    for density, name in product(densities, names):
        options = BESIDE.get(name, {}) | choice_at(name, density, grid).options
        variants = (False,) if plain else (False, True)
        for rectify in variants if "rectify" in describe(name).options else (None,):
            beside = {} if rectify is None else {"rectify": rectify}
            choice = Choice(name, options | beside)
            found.setdefault(choice.label, (density, choice))
    return list(found.values())


def plain_label(choice: Choice | ScheduleChoice) -> str | None:
    """The label of the same method unrectified, None where it is not rectified."""
    if not isinstance(choice, Choice) or not choice.options.get("rectify"):
        return None
    return replace(choice, options=choice.options | {"rectify": False}).label
