"""Flags of `vidattn look`: show where a word of the prompt is looked at in a video."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX, Choice
from vidattn.flags.video import add_model_arguments, add_request_arguments
from vidattn.runs.choices import choices_of
from vidattn.runs.output import writable_file
from vidattn.runs.request import request_of

EXAMPLES = """\
examples:
  vidattn look fox
  vidattn look balloon "a balloon at sunset" --method radial:density=0.3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("word", help="a word of the prompt, or several in a row in quotes")
    parser.add_argument("prompt", nargs="?", help="what the video shows, in quotes")
    parser.add_argument(
        "--method", action="append", default=[], metavar="METHOD",
        help=f"{SYNTAX} (default: dense)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/look.mp4"), metavar="FILE",
        help="an mp4, gif or WebP of the video beside its heat map (default %(default)s)",
    )  # fmt: skip
    add_request_arguments(parser)
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``choice``, ``path`` and ``request``.

    Raises:
        ValueError: what is wrong with them.
    """
    choices = choices_of(args, default="dense")
    if len(choices) > 1:
        raise ValueError(f"look takes one method, got {', '.join(x.label for x in choices)}")
    args.choice = choices[0] if choices else Choice("dense")
    args.path = writable_file(args.output, (".mp4", ".gif", ".webp"))
    args.request = request_of(args, args.prompt)
