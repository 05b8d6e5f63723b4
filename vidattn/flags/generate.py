"""Flags of `vidattn generate`: make a video with a method, and a JSON report beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX, Choice
from vidattn.flags.video import add_model_arguments, add_request_arguments
from vidattn.runs.choices import DEFAULT_METHOD, SCHEDULE_HELP, ScheduleChoice, choices_of
from vidattn.runs.lora import parse_lora, trained_attention
from vidattn.runs.output import fresh_file, writable_file
from vidattn.runs.request import request_of

EXAMPLES = """\
examples:
  vidattn generate "a red boot moving right over a dark background"
  vidattn generate --method radial --density 0.3 --output boot.mp4
  vidattn generate "a cat on a skateboard" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --method radial:density=0.3 --dense-steps 0.25 --offload model
  vidattn generate --lora runs/tiny-t2v-lora/lora.safetensors:0.8"""

# the method that flags of a method belong to where none is named
FLAGS_OF = "radial"
OUTPUT = Path("outputs/video.mp4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("prompt", nargs="?", help="what the video shows, in quotes")
    parser.add_argument("--prompt", dest="prompt_flag", metavar="TEXT", help="the same")
    parser.add_argument(
        "--method", action="append", default=[], metavar="METHOD",
        help=f"{SYNTAX} (default: the preset of the model, or {DEFAULT_METHOD} where it has none)",
    )  # fmt: skip
    parser.add_argument("--schedule", metavar="NAME|FILE", help=SCHEDULE_HELP)
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
        help="low-rank updates to add, several times for several; without --method and --schedule "
        "attention is as they were trained with, where the file says so",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help=f"an mp4 or gif, replaced if it is there (default: {OUTPUT}, or the first of "
        f"{OUTPUT.stem}-2, {OUTPUT.stem}-3, ... that is free)",
    )  # fmt: skip
    add_request_arguments(parser)
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``choice`` (None for the default), ``loras``, ``request``, ``path``.

    Raises:
        ValueError: what is wrong with them.
    """
    if args.prompt is not None and args.prompt_flag is not None:
        raise ValueError("the prompt is given twice, with and without --prompt")
    args.loras = [parse_lora(text) for text in args.lora]
    args.choice = _choice(args) or trained_attention(args.loras)
    path = fresh_file(OUTPUT) if args.output is None else args.output
    args.path = writable_file(path, (".mp4", ".gif"))
    writable_file(path.with_suffix(".json"), (".json",))
    args.request = request_of(args, args.prompt if args.prompt is not None else args.prompt_flag)


def _choice(args: argparse.Namespace) -> Choice | ScheduleChoice | None:
    if args.schedule is not None:
        if args.method:
            raise ValueError(
                f"generate takes a method or a schedule, got --method {args.method[0]} and "
                f"--schedule {args.schedule}"
            )
        return ScheduleChoice(args.schedule)
    choices = choices_of(args, FLAGS_OF)
    if len(choices) > 1:
        raise ValueError("generate takes one --method; `vidattn compare` takes several")
    return next(iter(choices), None)
