"""Flags of `vidattn draw`: a PNG of one or several plans on a grid."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX
from vidattn.runs.choices import named_choices
from vidattn.runs.output import writable_file

BARE_METHODS = True
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


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``choices`` and ``path``.

    Raises:
        ValueError: what is wrong with them.
    """
    args.choices = named_choices(args)
    args.path = writable_file(args.output, (".png", ".pdf", ".svg"))
