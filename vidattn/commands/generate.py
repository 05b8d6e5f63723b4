"""`vidattn generate`: make a video with a method, and a JSON report beside it."""

from __future__ import annotations

import argparse
import sys

from vidattn.runs.clip import Guards, make_clip
from vidattn.runs.lora import LoraChoice, check_loras, load_loras
from vidattn.runs.output import write_atomically, write_json
from vidattn.runs.record import record
from vidattn.runs.serve import foresee
from vidattn.runs.video import write_video
from vidattn.runs.warn import warn_about


def run(args: argparse.Namespace) -> None:
    """Make the video."""
    guards = Guards(args.dense_layers, args.dense_steps)
    outlook = foresee(args, [args.request])
    choice = args.choice or outlook.default()
    if isinstance(choice, LoraChoice):
        print(f"attention as {choice.lora.path} was trained with; --method or --schedule overrules")
    outlook.check(choice, guards)
    if outlook.pipe is not None:
        check_loras(outlook.pipe, args.loras)
    pipe, (request,) = outlook.load(args)
    load_loras(pipe, args.loras)
    warn_about(pipe, args.model, [request])
    clip = make_clip(pipe, request, choice, guards)
    with write_atomically(args.path) as partial:
        write_video(partial, clip.frames, fps=args.fps)
    report = args.path.with_suffix(".json")
    write_json(
        report,
        record(pipe, args, request)
        | {
            "method": choice.label,
            "loras": {str(lora.path): lora.weight for lora in args.loras},
            "dense_layers": clip.report.dense_layers,
            "dense_steps": clip.report.dense_steps,
            "frames": list(clip.frames.shape),
            "timing": clip.timing(),
            "report": clip.report.to_dict(),
        },
    )
    print(clip.report, file=sys.stderr)
    print(f"wrote {args.path} and {report}")
