"""Flags of `vidattn simulate`: how fast a method can be on a GPU, and its best tile."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.choice import SYNTAX
from vidattn.flags.values import count_or_share, positive_int
from vidattn.runs.choices import named_choices
from vidattn.runs.output import writable_file
from vidattn.simulation.gpus import find_gpu, list_gpus
from vidattn.simulation.video_models import find_video_model, list_video_models

BARE_METHODS = True
DEFAULT_MODEL = "wan2.1-14b"
EXAMPLES = """\
examples:
  vidattn simulate radial --density 0.3 --model wan2.1-14b --size 81x720x1280
  vidattn simulate neighborhood --window 9,21,41 --model hunyuanvideo --gpu H100
  vidattn simulate neighborhood:window=5,9,9 radial --grid 16x32x32 --heads 12 --head-dim 64
  vidattn simulate --figures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=SYNTAX)
    parser.add_argument("--method", action="append", default=[], metavar="METHOD", help="the same")
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(list_video_models())} ({DEFAULT_MODEL})"
    )
    group.add_argument("--size", metavar="FxHxW", help="frames x height x width of the video")
    group.add_argument("--grid", metavar="TxHxW", help="a token grid instead of a model's video")
    group.add_argument("--text", type=int, help="text tokens in the sequence (default the model's)")
    group.add_argument("--heads", type=positive_int, metavar="N", help="with --grid, default 24")
    group.add_argument("--head-dim", type=positive_int, metavar="N", help="likewise, default 128")
    group.add_argument(
        "--dense-layers", type=count_or_share, default=0, metavar="X",
        help="first layers that stay dense: a count or a share (default 0)",
    )  # fmt: skip
    group.add_argument(
        "--dense-steps", type=count_or_share, default=0, metavar="X",
        help="first denoising steps that stay dense: a count or a share (default 0)",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument(
        "--gpu", action="append", metavar="NAME", help=f"{', '.join(list_gpus())} (default all)"
    )
    group.add_argument(
        "--tiles", type=positive_int, default=5, metavar="N", help="tiles to list (default 5)"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    group.add_argument("--figures", action="store_true", help="show what is assumed about the GPUs")


def read(args: argparse.Namespace) -> None:
    """Check the flags, and set ``gpus``, ``choices``, ``path``, and ``video_model`` or None.

    Raises:
        ValueError: what is wrong with them.
    """
    args.gpus = list(dict.fromkeys(find_gpu(name) for name in args.gpu or list_gpus()))
    args.choices = [] if args.figures else named_choices(args)
    if args.grid:
        for flag in ("model", "size", "dense_layers", "dense_steps"):
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag.replace('_', '-')} belongs to a model's video; leave it or --grid out"
                )
    else:
        for flag in ("heads", "head_dim"):
            if getattr(args, flag):
                words = flag.replace("_", "-")
                raise ValueError(f"--{words} goes with --grid; a model has its own")
    args.video_model = None if args.grid else find_video_model(args.model or DEFAULT_MODEL)
    args.path = writable_file(args.json, (".json",), "--json") if args.json else None
