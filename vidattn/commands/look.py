"""`vidattn look`: a video beside a map of where a word of its prompt is looked at."""

from __future__ import annotations

import argparse

from vidattn.pipelines.looking import looking_at, places_of
from vidattn.runs.clip import Guards, make_clip
from vidattn.runs.heat import over
from vidattn.runs.output import write_atomically
from vidattn.runs.serve import foresee
from vidattn.runs.video import beside, write_video
from vidattn.runs.warn import warn_about


def run(args: argparse.Namespace) -> None:
    """Make the video, and the map."""
    guards = Guards(args.dense_layers, args.dense_steps)
    outlook = foresee(args, [args.request])
    outlook.check(args.choice, guards)
    pipe, (request,) = outlook.load(args)
    places_of(pipe.tokenizer, request.prompt, args.word)
    warn_about(pipe, args.model, [request])
    with looking_at(pipe, request.prompt, args.word) as looked:
        clip = make_clip(pipe, request, args.choice, guards)
    heat = looked.heat()[0]
    labels = [request.prompt, f"{args.word}\n{heat.min():.1%} to {heat.max():.1%} of the prompt"]
    with write_atomically(args.path) as partial:
        write_video(partial, beside([clip.frames, over(clip.frames, heat)], labels), fps=args.fps)
    print(f"wrote {args.path}")
