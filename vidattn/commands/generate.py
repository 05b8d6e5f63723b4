"""`vidattn generate`: make a video with a method, and a JSON report beside it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vidattn.guides import create_guide
from vidattn.pipelines.guiding import check_guide
from vidattn.runs.choices import Served
from vidattn.runs.clip import Clip, Guards, make_clip
from vidattn.runs.large import Large
from vidattn.runs.lora import LoraChoice, check_loras, load_loras
from vidattn.runs.output import fresh_file, write_atomically, write_json
from vidattn.runs.pairings import check_pairings, put_beside
from vidattn.runs.processes import check_degrees, find_processes, spread
from vidattn.runs.record import record
from vidattn.runs.request import Request
from vidattn.runs.serve import Outlook, foresee
from vidattn.runs.video import write_video
from vidattn.runs.warn import warn_about


def run(args: argparse.Namespace) -> None:
    """Make the video, or several."""
    guards = Guards(args.dense_layers, args.dense_steps, args.dense_backend, args.repeats_after)
    outlook = foresee(args, args.requests)
    guide = None if args.guide is None else create_guide(args.guide.name, **args.guide.options)
    if guide is not None and guide.has_second_pass and args.cache is not None:
        raise ValueError(
            f"--guide {args.guide.name} runs each step twice, and --cache {args.cache} would serve "
            "both: leave one out"
        )
    large = None if args.target is None else Large(args.target, args.strength)
    choice = args.choice or (large.choice if large else outlook.default())
    if isinstance(choice, LoraChoice):
        print(f"attention as {choice.lora.path} was trained with; --method or --schedule overrules")
    if large is None:
        are_spread = args.degrees is not None and args.degrees.ulysses > 1
        outlook.check(choice, guards, are_spread=are_spread, parameters=args.parameters)
    if outlook.pipe is not None:
        _check(outlook, args, large)
        if guide is not None:
            check_guide(outlook.pipe, guide)
    pipe, requests = outlook.load(args)
    load_loras(pipe, args.loras)
    put_beside(pipe, args.pairings)
    warn_about(pipe, args.model, requests)
    with spread(pipe, args.degrees):
        for request, path in zip(requests, args.paths):
            if large is not None:
                clip = large.make_clip(pipe, request)
            else:
                clip = make_clip(
                    pipe, request, choice, guards, parameters=args.parameters, guide=guide
                )
            # all that share a video have all of it
            if args.degrees is None or find_processes().rank == 0:
                _write(pipe, args, request, choice, clip, path)


def _check(outlook: Outlook, args: argparse.Namespace, large: Large | None) -> None:
    """Refuse what the model rules out beside the method."""
    if outlook.grid is not None and outlook.grid.t > 1 and args.paths[0].suffix == ".png":
        raise ValueError(f"--output {args.paths[0]} holds one frame: give an mp4 or a gif")
    if large is not None:
        for request in outlook.requests:
            large.check(outlook.pipe, request)
    check_loras(outlook.pipe, args.loras)
    check_pairings(outlook.pipe, args.pairings)
    if args.degrees is not None:
        check_degrees(outlook.pipe, args.degrees, outlook.grid)


def _write(
    pipe: object, args: argparse.Namespace, request: Request, choice: Served, clip: Clip, path: Path
) -> None:
    """Write a video or a picture, and its report."""
    if args.output is None and len(clip.frames) == 1:
        path = fresh_file(path.with_suffix(".png"))
    with write_atomically(path) as partial:
        write_video(partial, clip.frames, fps=args.fps)
    report = path.with_suffix(".json")
    write_json(
        report,
        record(pipe, args, request)
        | {
            "method": choice.label,
            "loras": {str(lora.path): lora.weight for lora in args.loras},
            "parameters": args.parameters and str(args.parameters),
            "guide": args.guide and args.guide.label,
            "parallel": args.degrees and vars(args.degrees),
            "dense_layers": clip.report.dense_layers,
            "dense_steps": clip.report.dense_steps,
            "target": args.target and list(args.target),
            "frames": list(clip.frames.shape),
            "timing": clip.timing(),
            "report": clip.report.to_dict(),
        },
    )
    print(clip.report, file=sys.stderr)
    print(f"wrote {path} and {report}")
