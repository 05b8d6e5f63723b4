"""Dense clips beside sparse ones as a picture that moves: python scripts/draw_clips.py.

Makes the strip at the top of README.md with the bundled model: from left to right, each prompt
densely and with the method, from the same latents.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vidattn.choice import Choice, parse_choice
from vidattn.commands.compare import plan_density
from vidattn.flags.video import add_model_arguments, add_request_arguments
from vidattn.quality.likeness import psnr
from vidattn.runs.clip import Guards, make_clip
from vidattn.runs.model import load_pipeline
from vidattn.runs.output import writable_file, write_atomically
from vidattn.runs.request import request_of, resolve
from vidattn.runs.video import beside, write_video

PROMPTS = (
    "a blue bag moving left over a light background",
    "a purple shirt moving right over a striped background",
)


def main() -> None:
    """Make the clips, write the picture."""
    args = parse()
    path = writable_file(args.output, (".webp", ".gif", ".mp4"))
    guards = Guards(args.dense_layers, args.dense_steps)
    pipe, videos, labels = load_pipeline(args), [], []
    for prompt in args.prompts or PROMPTS:
        request = resolve(pipe, request_of(args, prompt))
        dense, sparse = (
            make_clip(pipe, request, choice, guards) for choice in (Choice("dense"), args.method)
        )
        likeness = psnr(sparse.frames, dense.frames)
        videos += [dense.frames, sparse.frames]
        labels += [
            "dense\nreads all pairs of tokens",
            f"{args.method.label}\nreads {plan_density(sparse):.0%} of them, {likeness:.1f} dB",
        ]
    with write_atomically(path) as partial:
        write_video(partial, beside(videos, labels), fps=args.fps)
    print(f"wrote {path}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="*", help="what the clips show, each in quotes")
    parser.add_argument("--method", type=parse_choice, default=Choice("radial", {"density": 0.5}))
    parser.add_argument("--output", type=Path, default=Path("assets/clips.webp"))
    add_request_arguments(parser)
    add_model_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
