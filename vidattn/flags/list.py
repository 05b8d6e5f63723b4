"""Flags of `vidattn list`: the methods, everything about one of them, and what else is known."""

from __future__ import annotations

import argparse

from vidattn.catalog import describe

EXAMPLES = """\
examples:
  vidattn list
  vidattn list radial
  vidattn list --policies
  vidattn list --policies tempcache
  vidattn list --guides broadway
  vidattn list --models
  vidattn list --presets
  vidattn list --engines"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("method", nargs="?", help="show the options of this method")
    parser.add_argument(
        "--presets", action="store_true", help="show the schedules for published models"
    )
    parser.add_argument(
        "--models", action="store_true", help="show the transformers of diffusers that are known"
    )
    parser.add_argument(
        "--policies", nargs="?", const="", metavar="NAME",
        help="show what a stream may keep of the past, or the options of one of these policies",
    )  # fmt: skip
    parser.add_argument(
        "--guides", nargs="?", const="", metavar="NAME",
        help="show what a video can be guided by, or the options of one of these guides",
    )  # fmt: skip
    parser.add_argument(
        "--engines", action="store_true",
        help="show what runs attention on this machine, and how fast",
    )  # fmt: skip


def read(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        ValueError: no such method, or more than one thing asked for.
    """
    flags = [f"--{name}" for name in ("models", "presets", "engines") if getattr(args, name)]
    flags += [f"--{x}" for x in ("policies", "guides") if getattr(args, x) is not None]
    asked = [word for word in (args.method, *flags) if word]
    if len(asked) > 1:
        raise ValueError(
            "list takes a method, --policies, --guides, --models, --presets or --engines, got "
            f"{' and '.join(asked)}"
        )
    if args.method:
        describe(args.method)
    if args.policies:
        describe(args.policies, "cache")
    if args.guides:
        describe(args.guides, "guides")
