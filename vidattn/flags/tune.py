"""Flags of `vidattn tune`: mix methods by layer and head so that little is lost at a density."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX
from vidattn.flags.values import positive_int
from vidattn.flags.video import add_model_arguments, add_request_arguments, read_prompts
from vidattn.runs.choices import choices_of
from vidattn.runs.output import writable_file
from vidattn.runs.processes import check_alone
from vidattn.runs.request import request_of

EXAMPLES = """\
examples:
  vidattn tune --prompts prompts.txt --budget density=0.25
  vidattn tune --prompts prompts.txt --target psnr=30 --method topk --method radial:near=0,sink=no
  vidattn compare "a red bag" --schedule outputs/tuned.yaml --method topk:density=0.25"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt to a line"
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget", metavar="density=X", help="mean density of the layers that are not dense"
    )
    goal.add_argument(
        "--target", metavar="psnr=X", help="dB to the dense clips, with the least density"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="METHOD",
        help=f"{SYNTAX}; may be repeated (default: every method)",
    )  # fmt: skip
    parser.add_argument(
        "--looks", type=positive_int, default=3, metavar="N",
        help="denoising steps at which methods are tried (default 3)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("outputs/tuned.yaml"), metavar="FILE")
    add_request_arguments(parser)
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``density`` or ``psnr_db``, ``choices``, ``requests`` and ``path``.

    Raises:
        ValueError: what is wrong with them.
    """
    check_alone("tune")
    args.density, args.psnr_db = parse_goal(args.budget, args.target)
    args.choices = choices_of(args)
    prompts = read_prompts(args.prompts)
    args.path = writable_file(args.output, (".yaml", ".yml"))
    args.requests = [request_of(args, prompt) for prompt in prompts]


def parse_goal(budget: str | None, target: str | None) -> tuple[float | None, float | None]:
    """The density, or the likeness in dB, in the flags.

    Raises:
        ValueError: it is not written density=X or psnr=X, or no method can meet it.
    """
    flag, key, text = ("--budget", "density", budget)
    if budget is None:
        flag, key, text = "--target", "psnr", target
    name, _, value = text.partition("=")
    try:
        number = float(value) if name.strip() == key else None
    except ValueError:
        number = None
    if number is None:
        raise ValueError(f"{flag} must be {key}=X with a number for X, got {text!r}")
    if key == "density" and not 0 < number <= 1:
        raise ValueError(f"{flag} must be a density above 0 and at most 1, got {number:g}")
    if key == "psnr" and not 0 < number < 100:
        raise ValueError(f"{flag} must be a PSNR from 0 to 100 dB, got {number:g}")
    return (number, None) if key == "density" else (None, number)
