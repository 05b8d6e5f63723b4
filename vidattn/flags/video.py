"""Flags of every command that makes videos: about the model, the video, and what stays dense."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidattn.flags.values import count_or_share, finite, positive_int, seed
from vidattn.runs.pairings import CACHES, QUANTIZERS, Pairings

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about the model and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="ID|FOLDER", help="default: the bundled tiny model")
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--offload", choices=OFFLOADS, default="none", help="keep parts of the model off the GPU"
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's choice)"
    )
    group.add_argument("--vae-tiling", action="store_true", help="decode in tiles, to save memory")


def add_pairing_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about what runs beside a method, and beside dense attention too."""
    group = parser.add_argument_group("beside the method")
    group.add_argument(
        "--quantize", choices=tuple(QUANTIZERS), help="weights in 8 bits, by torchao"
    )
    group.add_argument(
        "--cache", choices=CACHES, help="reuse what earlier steps computed, by diffusers"
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the blocks of the transformer"
    )
    group.add_argument(
        "--dense-backend", choices=("auto", "pytorch"), default="auto",
        help="what runs dense layers and steps: on a CPU the faster of PyTorch's attention and "
        "ours, or always PyTorch's",
    )  # fmt: skip
    group.add_argument(
        "--repeats-after", type=float, metavar="FRAMES",
        help="slow the rotation in time that lets longer videos begin anew after so many latent "
        "frames: 50 of HunyuanVideo and Wan 2.1",
    )  # fmt: skip


def read_pairings(args: argparse.Namespace) -> Pairings:
    """What those flags ask for.

    Raises:
        ValueError: a package that is missing, or what excludes each other.
    """
    return Pairings(args.quantize, args.cache, args.compile, args.offload)


def add_request_arguments(parser: argparse.ArgumentParser, guards: bool = True) -> None:
    """Flags about the video, and about what stays dense."""
    group = parser.add_argument_group("video")
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--image", type=Path, help="the first frame, for image-to-video models")
    for flag in ("--frames", "--height", "--width", "--steps"):
        group.add_argument(flag, type=positive_int, metavar="N", help="default: the model's")
    group.add_argument("--guidance", type=finite, metavar="X", help="default: the model's")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="default 0")
    group.add_argument("--fps", type=positive_int, default=16, metavar="N", help="default 16")
    if not guards:
        return
    group = parser.add_argument_group("where attention stays dense")
    group.add_argument(
        "--dense-layers", type=count_or_share, metavar="X",
        help="first layers: a count such as 2 or a share such as 0.1 (default 1 or the schedule's)",
    )  # fmt: skip
    group.add_argument(
        "--dense-steps", type=count_or_share, metavar="X",
        help="first denoising steps: a count or a share (default 0.1, or the schedule's)",
    )  # fmt: skip


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one to a line; empty lines do not count.

    Raises:
        ValueError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts '{path}' cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts '{path}' is empty: write one prompt to a line")
    return prompts
