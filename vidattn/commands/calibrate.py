"""`vidattn calibrate`: find the orders and masks of paro for a model and a size of video."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from vidattn.calibration import Calibrator
from vidattn.commands.clip import pipeline_arguments
from vidattn.commands.model import load_pipeline
from vidattn.commands.output import writable_file, write_atomically
from vidattn.commands.request import (
    add_model_arguments,
    add_request_arguments,
    positive_int,
    read_prompts,
    request_of,
    resolve,
)
from vidattn.methods.paro import Paro
from vidattn.pipelines.watch import Sight, watching

EXAMPLES = """\
examples:
  vidattn calibrate --prompts prompts.txt --density 0.25 --output outputs/paro.safetensors
  vidattn generate "a red bag" --method paro:calibration=outputs/paro.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    defaults = Paro()
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt to a line"
    )
    parser.add_argument(
        "--density", type=float, default=defaults.density, metavar="X",
        help="kept share of the video pairs (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--early", type=positive_int, default=defaults.early, metavar="N",
        help="first steps with masks of their own, the last of them for the rest (default 3)",
    )  # fmt: skip
    parser.add_argument(
        "--block", type=positive_int, default=defaults.block, metavar="N",
        help="tokens of one block (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/paro.safetensors"), metavar="FILE"
    )
    add_request_arguments(parser, guards=False)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the prompts densely, write the file."""
    Paro(density=args.density, early=args.early, block=args.block)
    requests = [request_of(args, prompt) for prompt in read_prompts(args.prompts)]
    path = writable_file(args.output, (".safetensors",))
    pipe = load_pipeline(args)
    requests = [resolve(pipe, request) for request in requests]
    found: dict[str, Calibrator] = {}

    @torch.no_grad()
    def look(seen: Sight) -> None:
        given = {"scale": seen.scale, "key_mask": seen.key_mask}
        found[seen.transformer].add(seen.layer, seen.step, seen.grid, seen.q, seen.k, **given)

    for request in tqdm(requests, desc="calibrating", unit="prompt"):
        pipe.set_progress_bar_config(desc="dense run")
        with watching(pipe, look) as handle:
            for site in handle.sites:
                shape = site.shape
                options = shape.transformer, shape.layers, args.density, args.early, args.block
                found.setdefault(site.name, Calibrator(*options))
            pipe(**pipeline_arguments(request, "latent"))
    console = Console(highlight=False)
    for name, calibrator in found.items():
        # a file for each transformer, where the pipeline has several
        own = path if len(found) == 1 else path.with_stem(f"{path.stem}-{name}")
        with write_atomically(own) as partial:
            calibrator.finish().save(partial)
        console.print(f"wrote {own}", soft_wrap=True)
