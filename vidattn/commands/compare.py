"""`vidattn compare`: run methods and dense attention on one seed, side by side."""

from __future__ import annotations

import argparse
import statistics
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vidattn.choice import Choice
from vidattn.commands.comparison import Row, seconds, to_markdown, to_text
from vidattn.grid import Grid
from vidattn.quality.measures import Measure, choose_measures
from vidattn.runs.choices import AllMethods, Served
from vidattn.runs.clip import Clip, Guards, make_clip, warm_up
from vidattn.runs.output import write_atomically, write_json
from vidattn.runs.pairings import check_pairings, put_beside
from vidattn.runs.record import hardware_line, record
from vidattn.runs.request import Request
from vidattn.runs.serve import Outlook, foresee
from vidattn.runs.video import beside, write_video
from vidattn.runs.warn import warn, warn_about
from vidattn.support.table import fill

# of the name of a clip, below what file systems allow
LONGEST = 120
# the steps of a method take about the same time: the middle half of many differ by noise
NOISY, FEW_STEPS = 1.5, 4
# dense attention on the fastest engine: what sparse attention has to beat
EXACT = Choice("exact")


def run(args: argparse.Namespace) -> None:
    """Run every method, write the videos, print the table."""
    guards = Guards(args.dense_layers, args.dense_steps, args.dense_backend, args.repeats_after)
    outlook = foresee(args, args.requests)
    choices, optional = _choices(args.choices, outlook, guards)
    sides = [x for x in (outlook.requests[0].height, outlook.requests[0].width) if x is not None]
    measures = choose_measures(
        args.metrics, side_px=min(sides, default=1 << 30), num_clips=len(args.requests)
    )
    if outlook.pipe is not None:
        check_pairings(outlook.pipe, args.pairings)
    pipe, requests = outlook.load(args)
    put_beside(pipe, args.pairings)
    warn_about(pipe, args.model, requests)
    choices = [x for x in choices if is_ready(pipe, requests[0], x, may_fail=x in optional)]
    choices[1:] = exact_row(pipe, requests[0], choices[1:])

    def keep(label: str, i: int, clip: Clip) -> None:
        number = f"-{i + 1}" if len(requests) > 1 else ""
        with write_atomically(args.folder / f"{file_name(label)}{number}.mp4") as partial:
            write_video(partial, clip.frames, fps=args.fps)

    clips = make_clips(pipe, requests, choices, guards, repeats=args.repeats, keep=keep)
    rows = [
        _row(choice, clips[choice.label], clips["dense"], measures, len(requests))
        for choice in choices
    ]
    _write_beside(args, clips, rows, requests)
    _write_report(args.folder, record(pipe, args, requests[0]), requests, clips, rows)
    setting = _setting(requests[0], [clips[row.label][0] for row in rows], rows[0])
    with write_atomically(args.folder / "report.md") as partial:
        partial.write_text(f"{to_markdown(rows, measures)}\n{setting}\n", encoding="utf-8")
    print(f"{to_text(rows, measures)}\n")
    for line in setting.splitlines():
        print(fill(line))
    warn_of_noise(rows, args.repeats)
    print(f"wrote {args.folder}: open {args.folder / 'side_by_side.mp4'}")


def _choices(
    asked: Sequence[Served | AllMethods], outlook: Outlook, guards: Guards
) -> tuple[list[Served], list[Choice]]:
    """Dense attention and what is asked for, and what of it may be left out if it fails."""
    named = [choice for choice in asked if not isinstance(choice, AllMethods)]
    if not asked:
        named = [outlook.default()]
    for choice in named:
        outlook.check(choice, guards)
    optional = []
    for wanted in asked:
        if isinstance(wanted, AllMethods):
            found, left_out = outlook.everything(wanted, guards)
            optional += [choice for choice in found if choice not in named + optional]
            for label, why in left_out.items():
                print(f"left out: {label}: {why}")
    if not named + optional:
        raise ValueError("no method can do this: see why above")
    return [Choice("dense"), *named, *optional], optional


def is_ready(pipe: object, request: Request, choice: Served, may_fail: bool) -> bool:
    """Warm a method up, and say whether it can do what is asked.

    Raises:
        ValueError: it cannot, and it may not fail.
    """
    try:
        warm_up(pipe, request, choice)
    except ValueError as error:
        if not may_fail:
            raise
        print(f"left out: {choice.label}: {error}")
        return False
    return True


def exact_row(pipe: object, request: Request, choices: Sequence[Served]) -> list[Served]:
    """What is compared, behind ``exact`` on a CPU where an engine of ours is faster at it."""
    if EXACT in choices or pipe._execution_device.type != "cpu":
        return list(choices)
    is_faster = warm_up(pipe, request, EXACT).dense_engines.keys() - {"pytorch"}
    return [EXACT, *choices] if is_faster else list(choices)


def make_clips(
    pipe: object,
    requests: Sequence[Request],
    choices: Sequence[Served],
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
    choice: Served,
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
        steps_ms=steps_ms,
        total_ms=statistics.median(clip.total_ms for clip in clips),
        attention_share=share,
        figures={measure.key: measure.compute(frames, others) for measure in measures},
    )


def plan_density(clip: Clip) -> float:
    """Mean over the calls that ran sparse; 1 where none did."""
    calls = [(layer.num_sparse, layer.density) for layer in clip.report.layers if layer.num_sparse]
    return sum(n * d for n, d in calls) / sum(n for n, _ in calls) if calls else 1.0


def _write_beside(args, clips, rows: Sequence[Row], requests: Sequence[Request]) -> None:
    captions = [_caption(row, rows[0]) for row in rows]
    strips = [
        beside([clips[row.label][i].frames for row in rows], captions, title=request.prompt)
        for i, request in enumerate(requests)
    ]
    endings = (".mp4", ".gif") if args.gif else (".mp4",)
    for ending in endings:
        with write_atomically(args.folder / f"side_by_side{ending}") as partial:
            write_video(partial, torch.cat(strips, dim=2), fps=args.fps)


def file_name(label: str) -> str:
    """A label as a file name; of a long one the beginning, and a number that stands for all."""
    name = "".join(x if x.isalnum() or x in "=.," else "-" for x in label)
    if len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{zlib.crc32(label.encode()):08x}"


def _caption(row: Row, dense: Row) -> str:
    if row is dense:
        return f"dense\n{seconds(row.total_ms)}"
    likeness = f", {row.figures['psnr_db']:.1f} dB" if "psnr_db" in row.figures else ""
    faster = f"{seconds(row.total_ms)}, {dense.total_ms / row.total_ms:.2f}x"
    return f"{row.label}\n{faster}, density {row.density_in_all:.2f}{likeness}"


def warn_of_noise(rows: Sequence[Row], repeats: int) -> None:
    """Warn where steps that should take the same time did not."""
    spreads = {row.label: row.middle_ms for row in rows if len(row.steps_ms) >= FEW_STEPS}
    label, (low, high) = max(spreads.items(), key=lambda x: x[1][1] / x[1][0], default=("", (1, 1)))
    if high > NOISY * low:
        warn(
            f"times varied {high / low:.1f}x: the middle half of the steps of {label} took "
            f"{seconds(low)} to {seconds(high)}. Something else may have been running: use "
            f"--repeats {3 if repeats == 1 else 2 * repeats}"
        )


def _write_report(folder: Path, header: dict, requests, clips, rows: Sequence[Row]) -> None:
    methods = {
        row.label: row.to_dict()
        | {"speedup": rows[0].total_ms / row.total_ms}
        | {"step_speedup": rows[0].step_ms / row.step_ms}
        | {"engines": clips[row.label][0].report.engines}
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
        f"{', '.join(grids)}; self-attention takes {dense.attention_share:.0%} of a dense step"
        f"{_engines(clips)}.\n"
        "The speed-up of a whole run includes text encoder and VAE. step: median of the denoising "
        "steps, ± for the middle half of them. density: of the plans, then in all, with the dense "
        "layers and steps. Likeness is to the dense clips, on the frames before they are encoded.\n"
        f"{hardware_line()}."
    )


def _engines(clips: Sequence[Clip]) -> str:
    names = dict.fromkeys(name for clip in clips for name in clip.report.engines)
    return f"; the sparse ones ran on the engine {' and '.join(names)}" if names else ""


def _grid_words(grid: Grid) -> str:
    """A grid in plain words."""
    beside = f" + {grid.text} text" if grid.text else ""
    return f"{grid.num_video_tokens:,} video tokens ({grid.t}x{grid.h}x{grid.w}){beside}"
