"""Flags of `vidattn calibrate`: find the orders and masks of paro for a model and a size."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.catalog import describe
from vidattn.flags.values import finite, positive_int
from vidattn.flags.video import add_model_arguments, add_request_arguments, read_prompts
from vidattn.runs.output import writable_file
from vidattn.runs.processes import check_alone
from vidattn.runs.request import request_of

EXAMPLES = """\
examples:
  vidattn calibrate --prompts prompts.txt --density 0.25 --output outputs/paro.safetensors
  vidattn generate "a red bag" --method paro:calibration=outputs/paro.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    defaults = {x.name: x.default for x in describe("paro").options.values()}
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt to a line"
    )
    parser.add_argument(
        "--density", type=finite, default=defaults["density"], metavar="X",
        help="kept share of the video pairs (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--early", type=positive_int, default=defaults["early"], metavar="N",
        help="first steps with masks of their own, the last for the rest (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--block", type=positive_int, default=defaults["block"], metavar="N",
        help="tokens of one block (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/paro.safetensors"), metavar="FILE"
    )
    add_request_arguments(parser, guards=False)
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``requests`` and ``path``.

    Raises:
        ValueError: what is wrong with them.
    """
    check_alone("calibrate")
    prompts = read_prompts(args.prompts)
    args.path = writable_file(args.output, (".safetensors",))
    args.requests = [request_of(args, prompt) for prompt in prompts]
