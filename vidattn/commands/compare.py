"""`vidattn compare`: run methods and dense attention on one seed, side by side."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from vidattn.commands.choice import (
    SCHEDULE_HELP,
    SYNTAX,
    Choice,
    ScheduleChoice,
    choices_of,
    expand_all,
)
from vidattn.commands.clip import Clip, Guards, make_clip, warm_up
from vidattn.commands.comparison import Row, print_table, seconds, to_markdown
from vidattn.commands.likeness import MEASURES, Measure, choose_measures
from vidattn.commands.model import load_pipeline
from vidattn.commands.output import writable_folder, write_atomically, write_json
from vidattn.commands.record import hardware_line, record
from vidattn.commands.request import (
    Request,
    add_model_arguments,
    add_request_arguments,
    positive_int,
    request_of,
    resolve,
)
from vidattn.video import beside, write_video

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
        "for every method, with that density where it has one",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", action="append", default=[], metavar="NAME|FILE",
        help=f"{SCHEDULE_HELP}; may be repeated",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), metavar="FOLDER")
    parser.add_argument(
        "--repeats", type=positive_int, default=1, metavar="N",
        help="rounds of all methods in turn; times are medians over all (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", metavar="LIST",
        help=f"{','.join(MEASURES)}, or all (default: the fast ones whose weights are there; "
        "scripts/fetch_metric_weights.py fetches weights)",
    )  # fmt: skip
    parser.add_argument("--gif", action="store_true", help="also write the side by side as a gif")
    add_request_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run every method, write the videos, print the table."""
    may_fail = any(text.partition(":")[0] == "all" for text in args.method)
    choices = _choices(args)
    requests = [request_of(args, prompt) for prompt in [*args.prompts, *args.prompt] or [None]]
    folder = writable_folder(args.output)
    pipe = load_pipeline(args)
    requests = [resolve(pipe, request) for request in requests]
    sides = [x for x in (requests[0].height, requests[0].width) if x is not None]
    measures = choose_measures(
        args.metrics, side_px=min(sides, default=1 << 30), num_clips=len(requests)
    )
    guards = Guards(args.dense_layers, args.dense_steps)
    console = Console(highlight=False)
    choices = [x for x in choices if is_ready(pipe, requests[0], x, may_fail, console)]

    def keep(label: str, i: int, clip: Clip) -> None:
        number = f"-{i + 1}" if len(requests) > 1 else ""
        with write_atomically(folder / f"{_slug(label)}{number}.mp4") as partial:
            write_video(partial, clip.frames, fps=args.fps)

    clips = make_clips(pipe, requests, choices, guards, repeats=args.repeats, keep=keep)
    rows = [
        _row(choice, clips[choice.label], clips["dense"], measures, len(requests))
        for choice in choices
    ]
    _write_beside(args, folder, clips, rows, len(requests))
    _write_report(folder, record(pipe, args, requests[0]), requests, clips, rows)
    print_table(console, rows, measures)
    setting = _setting(requests[0], [clips[row.label][0] for row in rows], rows[0])
    console.print(f"\n{setting}")
    with write_atomically(folder / "report.md") as partial:
        partial.write_text(f"{to_markdown(rows, measures)}\n{setting}\n", encoding="utf-8")
    console.print(f"wrote {folder}", soft_wrap=True)


def _choices(args: argparse.Namespace) -> list[Choice | ScheduleChoice]:
    """Dense attention, then what is asked for."""
    if not args.schedule:
        args.method = args.method or ["radial:density=0.3"]
    args.method = expand_all(args.method)
    methods = [
        choice for choice in (choices_of(args) if args.method else []) if choice.name != "dense"
    ]
    schedules = [ScheduleChoice(where) for where in dict.fromkeys(args.schedule)]
    if not methods + schedules:
        raise ValueError("nothing to compare dense with; add --method radial:density=0.3")
    return [Choice("dense"), *methods, *schedules]


def is_ready(
    pipe: object,
    request: Request,
    choice: Choice | ScheduleChoice,
    may_fail: bool,
    console: Console,
) -> bool:
    """Warm a method up, and say whether it can do what is asked.

    Raises:
        ValueError: it cannot, and it may not fail.
    """
    try:
        warm_up(pipe, request, choice)
    except ValueError as error:
        if not may_fail:
            raise
        console.print(f"left out: {choice.label}: {error}", soft_wrap=True)
        return False
    return True


def make_clips(
    pipe: object,
    requests: Sequence[Request],
    choices: Sequence[Choice | ScheduleChoice],
    guards: Guards,
    *,
    repeats: int,
    keep: Callable[[str, int, Clip], None],
) -> dict[str, list[Clip]]:
    """The clips of every method, by label: each prompt in turn, each round over all methods.

    Args:
        keep: called with the label, the number of the prompt, and the clip, as soon as it is there.
    """
    clips: dict[str, list[Clip]] = {choice.label: [] for choice in choices}
    for repeat in range(repeats):
        for i, request in enumerate(requests):
            for choice in choices:
                clip = make_clip(pipe, request, choice, guards)
                clips[choice.label].append(clip)
                if repeat == 0:
                    keep(choice.label, i, clip)
    return clips


def _row(
    choice: Choice | ScheduleChoice,
    clips: Sequence[Clip],
    dense: Sequence[Clip],
    measures: Sequence[Measure],
    num_prompts: int,
) -> Row:
    steps_ms = [ms for clip in clips for ms in clip.steps_ms]
    # the share of a whole step, so that Amdahl's law applies to it
    share = sum(clip.report.attention_ms for clip in clips) / sum(steps_ms)
    # later rounds make the same clips again
    frames, others = ([clip.frames for clip in some[:num_prompts]] for some in (clips, dense))
    return Row(
        label=choice.label,
        density=plan_density(clips[0]),
        density_in_all=statistics.mean(clip.report.density for clip in clips),
        step_ms=statistics.median(steps_ms),
        total_ms=statistics.median(clip.total_ms for clip in clips),
        attention_share=share,
        figures={measure.key: measure.compute(frames, others) for measure in measures},
    )


def plan_density(clip: Clip) -> float:
    """Mean over the calls that ran sparse; 1 where none did."""
    calls = [(layer.num_sparse, layer.density) for layer in clip.report.layers if layer.num_sparse]
    return sum(n * d for n, d in calls) / sum(n for n, _ in calls) if calls else 1.0


def _write_beside(args, folder: Path, clips, rows: Sequence[Row], num_prompts: int) -> None:
    captions = [_caption(row, rows[0]) for row in rows]
    strips = [
        beside([clips[row.label][i].frames for row in rows], captions) for i in range(num_prompts)
    ]
    endings = (".mp4", ".gif") if args.gif else (".mp4",)
    for ending in endings:
        with write_atomically(folder / f"side_by_side{ending}") as partial:
            write_video(partial, torch.cat(strips, dim=2), fps=args.fps)


def _slug(label: str) -> str:
    return "".join(x if x.isalnum() or x in "=.," else "-" for x in label)


def _caption(row: Row, dense: Row) -> str:
    if row is dense:
        return f"dense\n{seconds(row.step_ms)} per step"
    likeness = f", {row.figures['psnr_db']:.1f} dB" if "psnr_db" in row.figures else ""
    return f"{row.label}\n{dense.step_ms / row.step_ms:.2f}x, density {row.density:.2f}{likeness}"


def _write_report(folder: Path, header: dict, requests, clips, rows: Sequence[Row]) -> None:
    methods = {
        row.label: row.to_dict()
        | {"speedup": rows[0].step_ms / row.step_ms}
        | {"clips": [_describe(clip) for clip in clips[row.label]]}
        for row in rows
    }
    header |= {"prompts": [request.prompt for request in requests], "methods": methods}
    header["frames"] = list(clips["dense"][0].frames.shape)
    write_json(folder / "report.json", header)


def _describe(clip: Clip) -> dict[str, object]:
    return clip.timing() | {"report": clip.report.to_dict()}


def _setting(request: Request, clips: Sequence[Clip], dense: Row) -> str:
    frames, _, height, width = clips[0].frames.shape
    grids = dict.fromkeys(_grid_words(grid) for clip in clips for grid in clip.report.grids)
    return (
        f"{frames} frames of {height}x{width}, {request.num_inference_steps} steps, "
        f"{', '.join(grids)}; self-attention takes {dense.attention_share:.0%} of a dense step.\n"
        "density: of the plan, then with the dense layers and steps. step: median. "
        "Likeness is to the dense clips, on the frames before they are encoded.\n"
        f"{hardware_line()}."
    )


def _grid_words(grid: str) -> str:
    """A grid as its report writes it, in plain words."""
    t, h, w, text = (int(x) for x in re.findall(r"=(\d+)", grid))
    beside = f" + {text} text" if text else ""
    return f"{t * h * w:,} video tokens ({t}x{h}x{w}){beside}"
