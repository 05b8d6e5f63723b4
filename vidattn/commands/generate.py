"""`vidattn generate`: make a video with a method, and a JSON report beside it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from vidattn.commands.choice import SCHEDULE_HELP, SYNTAX, Choice, ScheduleChoice, choices_of
from vidattn.commands.clip import Guards, make_clip
from vidattn.commands.model import load_pipeline
from vidattn.commands.output import writable_file, write_atomically, write_json
from vidattn.commands.record import record
from vidattn.commands.request import (
    add_model_arguments,
    add_request_arguments,
    request_of,
    resolve,
)
from vidattn.video import write_video

EXAMPLES = """\
examples:
  vidattn generate "a red boot moving right over a dark background"
  vidattn generate --method radial --density 0.3 --output boot.mp4
  vidattn generate "a cat on a skateboard" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --method radial:density=0.3 --dense-steps 0.25 --offload model"""

DEFAULT_METHOD = "radial"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("prompt", nargs="?", help="what the video shows, in quotes")
    parser.add_argument("--prompt", dest="prompt_flag", metavar="TEXT", help="the same")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="METHOD",
        help=f"{SYNTAX} (default {DEFAULT_METHOD})",
    )
    parser.add_argument("--schedule", metavar="NAME|FILE", help=SCHEDULE_HELP)
    parser.add_argument("--output", type=Path, default=Path("outputs/video.mp4"), metavar="FILE")
    add_request_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Make the video."""
    if args.prompt is not None and args.prompt_flag is not None:
        raise ValueError("the prompt is given twice, with and without --prompt")
    choice = _choice(args)
    request = request_of(args, args.prompt if args.prompt is not None else args.prompt_flag)
    path = writable_file(args.output, (".mp4", ".gif"))
    writable_file(path.with_suffix(".json"), (".json",))
    pipe = load_pipeline(args)
    _make(args, pipe, resolve(pipe, request), choice, path)


def _choice(args: argparse.Namespace) -> Choice | ScheduleChoice:
    if args.schedule is not None:
        if args.method:
            raise ValueError(
                f"generate takes a method or a schedule, got --method {args.method[0]} and "
                f"--schedule {args.schedule}"
            )
        return ScheduleChoice(args.schedule)
    args.method = args.method or [DEFAULT_METHOD]
    choices = choices_of(args)
    if len(choices) > 1:
        raise ValueError("generate takes one --method; `vidattn compare` takes several")
    return choices[0]


def _make(args, pipe: object, request, choice: Choice | ScheduleChoice, path: Path) -> None:
    clip = make_clip(pipe, request, choice, Guards(args.dense_layers, args.dense_steps))
    with write_atomically(path) as partial:
        write_video(partial, clip.frames, fps=args.fps)
    write_json(
        path.with_suffix(".json"),
        record(pipe, args, request)
        | {
            "method": choice.label,
            "dense_layers": clip.report.dense_layers,
            "dense_steps": clip.report.dense_steps,
            "frames": list(clip.frames.shape),
            "timing": clip.timing(),
            "report": clip.report.to_dict(),
        },
    )
    print(clip.report, file=sys.stderr)
    Console(highlight=False).print(f"wrote {path} and {path.with_suffix('.json')}", soft_wrap=True)
