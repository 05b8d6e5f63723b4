"""Flags of `vidattn compare`: run methods and dense attention on one seed, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX, Choice
from vidattn.flags.values import positive_int
from vidattn.flags.video import (
    add_model_arguments,
    add_pairing_arguments,
    add_request_arguments,
    read_pairings,
)
from vidattn.runs.choices import (
    DEFAULT_METHOD,
    SCHEDULE_HELP,
    AllMethods,
    ScheduleChoice,
    choices_of,
    parse_all,
)
from vidattn.runs.output import writable_folder
from vidattn.runs.processes import check_alone
from vidattn.runs.request import request_of

EXAMPLES = """\
examples:
  vidattn compare --method radial:density=0.3 --frames 65
  vidattn compare --method radial:density=0.2 --method neighborhood:window=9,9,9 --repeats 3
  vidattn compare --method all:density=0.25 --steps 8 --metrics psnr,ssim,warp"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what each video shows")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="the same")
    parser.add_argument(
        "--method", action="append", default=[], metavar="METHOD",
        help=f"{SYNTAX}; may be repeated, dense is always there; all, or all:density=0.25, stands "
        "for every method that can serve, at that density (default: the preset of the model, or "
        f"{DEFAULT_METHOD} where it has none)",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", action="append", default=[], metavar="NAME|FILE",
        help=f"{SCHEDULE_HELP}; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/compare"), metavar="FOLDER",
        help="for the videos and reports, which are replaced (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=positive_int, default=1, metavar="N",
        help="rounds of all methods in turn; times are medians over all (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", metavar="LIST",
        help="psnr, ssim, ms-ssim, lpips, fvd, warp, or all (default: the fast ones whose weights "
        "are there; scripts/fetch_metric_weights.py fetches weights)",
    )  # fmt: skip
    parser.add_argument("--gif", action="store_true", help="also write the side by side as a gif")
    add_request_arguments(parser)
    add_pairing_arguments(parser)
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``choices``, ``requests``, ``folder`` and ``pairings``.

    Raises:
        ValueError: what is wrong with them.
    """
    check_alone("compare")
    args.choices = _choices(args)
    args.pairings = read_pairings(args)
    args.folder = writable_folder(args.output)
    prompts = [*args.prompts, *args.prompt] or [None]
    args.requests = [request_of(args, prompt) for prompt in prompts]


def _choices(args: argparse.Namespace) -> list[Choice | ScheduleChoice | AllMethods]:
    """What is asked for beside dense attention; nothing for the preset of the model."""
    given = bool(args.method or args.schedule)
    alls = [text for text in args.method if text.partition(":")[0] == "all"]
    args.method = [text for text in args.method if text not in alls]
    choices = [choice for choice in choices_of(args) if choice.name != "dense"]
    choices += [ScheduleChoice(where) for where in dict.fromkeys(args.schedule)]
    choices += [parse_all(text) for text in dict.fromkeys(alls)]
    if given and not choices:
        raise ValueError(f"nothing to compare dense with; add --method {DEFAULT_METHOD}")
    return choices
