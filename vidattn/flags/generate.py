"""Flags of `vidattn generate`: make a video with a method, and a JSON report beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX, Choice, parse_choice
from vidattn.flags.values import finite, size
from vidattn.flags.video import (
    add_model_arguments,
    add_pairing_arguments,
    add_request_arguments,
    read_pairings,
)
from vidattn.runs.choices import DEFAULT_METHOD, SCHEDULE_HELP, ScheduleChoice, choices_of
from vidattn.runs.lora import LoraChoice, parse_lora, trained_attention
from vidattn.runs.output import fresh_file, writable_file
from vidattn.runs.processes import find_processes, parse_parallel
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
    parser.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT",
        help="the same, several times for several videos, which processes that are started "
        "together share",
    )  # fmt: skip
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
        "--parameters", type=Path, metavar="FILE|FOLDER",
        help="of a learned method such as vsa: a file that training wrote, or a model that has "
        "them among its weights (default: those that come with --lora)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="an mp4 or gif, or of a picture a png, replaced if it is there (default: "
        f"{OUTPUT}, or the first of {OUTPUT.stem}-2, {OUTPUT.stem}-3, ... that is free); of "
        "several videos the second is FILE-2, and so on",
    )  # fmt: skip
    parser.add_argument(
        "--parallel", metavar="KIND=N",
        help="N processes, started by torchrun, share the video: ulysses=N, ring=N, or both",
    )  # fmt: skip
    parser.add_argument(
        "--guide", metavar="GUIDE",
        help="guide the video by attention, as broadway:motion=1.5; vidattn list --guides",
    )  # fmt: skip
    add_request_arguments(parser)
    group = parser.add_argument_group("above the trained size, by FreeSwim on Wan models")
    group.add_argument(
        "--target", type=size, metavar="HxW",
        help="height and width to make; --height and --width are those of training",
    )  # fmt: skip
    group.add_argument(
        "--strength", type=finite, metavar="X",
        help="share of the steps that the enlarged clip goes through again (default 0.7)",
    )  # fmt: skip
    add_pairing_arguments(parser)
    add_model_arguments(parser)


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set what the command is given.

    These are ``choice`` (None for the default), ``loras``, ``parameters``, ``pairings``,
    ``guide`` (None for none), ``degrees`` (None for one process), and of each video that this
    process makes one of ``requests`` and ``paths``.

    Raises:
        ValueError: what is wrong with them.
    """
    args.loras = [parse_lora(text) for text in args.lora]
    args.choice = _choice(args) or trained_attention(args.loras)
    if args.parameters is None and isinstance(args.choice, LoraChoice):
        args.parameters = args.choice.parameters
    args.pairings = read_pairings(args)
    args.guide = None if args.guide is None else parse_choice(args.guide, "guides")
    args.degrees = None if args.parallel is None else parse_parallel(args.parallel)
    if args.target is not None:
        _check_target(args)
    elif args.strength is not None:
        raise ValueError("--strength says how much --target makes anew: give that too")
    if args.guide is not None and args.degrees is not None:
        raise ValueError("--guide and --parallel exclude each other: guide in one process")
    if args.degrees is not None and args.cache == "first-block":
        raise ValueError(
            "--cache first-block and --parallel exclude each other: each process would skip steps "
            "by its own part of the video; take --cache taylorseer"
        )
    given = args.prompts if args.prompt is None else [args.prompt, *args.prompts]
    prompts = given or [None]
    args.paths = _share(args, _paths(args.output, len(prompts)))
    for path in args.paths:
        writable_file(path, (".mp4", ".gif", ".png"))
        writable_file(path.with_suffix(".json"), (".json",))
    args.requests = [request_of(args, prompt) for prompt in _share(args, prompts)]


def _check_target(args: argparse.Namespace) -> None:
    """Refuse what does not go with FreeSwim, which is a method by itself."""
    others = {
        "--method": args.choice,
        "--parameters": args.parameters,
        "--parallel": args.degrees,
        "--guide": args.guide,
        "--cache": args.cache,
        "--compile": args.compile,
        "--image": args.image,
        "--dense-layers": args.dense_layers,
        "--dense-steps": args.dense_steps,
    }
    if given := [flag for flag, value in others.items() if value]:
        raise ValueError(f"--target attends by FreeSwim, which does not take {given[0]}")


def _paths(output: Path | None, count: int) -> list[Path]:
    """Where the videos go."""
    if output is None and count > 1:
        raise ValueError(f"{count} prompts need --output FILE: the second makes FILE-2, and so on")
    first = fresh_file(OUTPUT) if output is None else output
    return [first, *(first.with_stem(f"{first.stem}-{i}") for i in range(2, count + 1))]


def _share(args: argparse.Namespace, videos: list) -> list:
    """Those that this process makes: all with others that share each, or else its own."""
    processes = find_processes()
    if args.degrees is not None:
        return videos
    if len(videos) < processes.count:
        raise ValueError(
            f"{processes.count} processes for {len(videos)} videos: give a --prompt for each, or "
            f"--parallel ulysses={processes.count} to share one"
        )
    return videos[processes.rank :: processes.count]


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
