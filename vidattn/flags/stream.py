"""Flags of `vidattn stream`: make a video of any length, which can be watched meanwhile."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from vidattn.choice import parse_choice
from vidattn.flags.values import positive_int, seed
from vidattn.flags.video import add_model_arguments
from vidattn.runs.folder import find_causal_model
from vidattn.runs.output import fresh_file, writable_file
from vidattn.runs.pairings import Pairings

EXAMPLES = """\
examples:
  vidattn stream "a red boot moving right" --model ./self-forcing --duration 60s
  vidattn stream "a cat on a skateboard" --model ./self-forcing --policy tempcache:window=21
  vidattn stream "a cat" --model ./self-forcing --prompt-at 12s="a dog" --prompt-at 30s="a fox\""""

OUTPUT = Path("outputs/stream.mp4")
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("prompt", help="what the video shows, in quotes")
    parser.add_argument(
        "--policy", action="append", default=[], metavar="POLICY",
        help="what is kept of the past, NAME or NAME:OPTION=VALUE,... as in tempcache:cap=20000 "
        "(default: that of the model); again for what is read of the prompt, as annca:keep=0.3",
    )  # fmt: skip
    parser.add_argument(
        "--duration", type=duration, metavar="TIME", default=20.0,
        help="such as 60s, 10m or 2h (default 20s), up to the end of its last chunk",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-at", type=prompt_at, action="append", default=[], metavar='TIME="TEXT"',
        help="another prompt, from the first chunk on that begins at that time or later",
    )  # fmt: skip
    parser.add_argument(
        "--no-recache", dest="recache", action="store_false",
        help="keep what was seen under the last prompt as it was when the prompt changes",
    )  # fmt: skip
    parser.add_argument(
        "--start", type=Path, metavar="FILE",
        help="a picture or a video that the video begins with",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", metavar="NAME",
        help="how a model is run that does not say so itself, such as self-forcing",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help=f"an mp4, replaced if it is there (default: {OUTPUT}, or the first of "
        f"{OUTPUT.stem}-2, {OUTPUT.stem}-3, ... that is free)",
    )  # fmt: skip
    group = parser.add_argument_group("video")
    for flag in ("--height", "--width"):
        group.add_argument(flag, type=positive_int, metavar="N", help="default: the model's")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="default 0")
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        ValueError: what is wrong with them.
    """
    if not args.prompt.strip():
        raise ValueError("the prompt is empty; write what the video should show")
    for words in args.policy:
        for policy in words.split("+"):
            parse_choice(policy, "cache")
    if (args.height is None) != (args.width is None):
        raise ValueError("--height and --width go together: give both or neither")
    if args.start is not None and not args.start.is_file():
        raise ValueError(f"--start '{args.start}' is no file")
    args.prompts = sorted(args.prompt_at, key=lambda pair: pair[0])
    for at, _ in args.prompts:
        if at >= args.duration:
            raise ValueError(
                f"--prompt-at {at:g}s is not before the end, at {args.duration:g}s: give a longer "
                "--duration"
            )
    times = [at for at, _ in args.prompts]
    if len(set(times)) < len(times):
        raise ValueError("--prompt-at names one time twice; give each prompt a time of its own")
    args.model = find_causal_model(args.model)
    args.output = writable_file(
        fresh_file(OUTPUT) if args.output is None else args.output, (".mp4",)
    )
    writable_file(args.output.with_suffix(".json"), (".json",))
    args.pairings = Pairings(offload=args.offload)


def duration(text: str) -> float:
    """Seconds of a time such as 90, 60s, 1.5m or 2h."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(s|m|min|h|)", text.strip())
    value = float(match[1]) * UNITS[match[2]] if match else math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a time above 0 such as 60s, 10m or 2h, got {text!r}"
        )
    return value


def prompt_at(text: str) -> tuple[float, str]:
    """Seconds and prompt of ``12s=a red boot``."""
    time, equals, prompt = text.partition("=")
    if not equals or not prompt.strip():
        raise argparse.ArgumentTypeError(f'must be a time and a prompt, 12s="...", got {text!r}')
    return duration(time), prompt
