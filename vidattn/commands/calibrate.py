"""`vidattn calibrate`: find the orders and masks of paro for a model and a size of video."""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from vidattn.choice import Choice
from vidattn.pipelines.hooks.watch import Sight, watching
from vidattn.planning.calibration import Calibrator
from vidattn.runs.clip import Guards, pipeline_arguments
from vidattn.runs.output import write_atomically
from vidattn.runs.serve import foresee
from vidattn.runs.warn import warn_about


def run(args: argparse.Namespace) -> None:
    """Run the prompts densely, write the file."""
    options = {"density": args.density, "early": args.early, "block": args.block}
    outlook = foresee(args, args.requests)
    outlook.check(Choice("paro", options), Guards())
    pipe, requests = outlook.load(args)
    warn_about(pipe, args.model, requests)
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
                model = shape.transformer, shape.layers
                found.setdefault(site.name, Calibrator(*model, *options.values()))
            pipe(**pipeline_arguments(request, "latent"))
    for name, calibrator in found.items():
        # a file for each transformer, where the pipeline has several
        own = args.path if len(found) == 1 else args.path.with_stem(f"{args.path.stem}-{name}")
        with write_atomically(own) as partial:
            calibrator.finish().save(partial)
        print(f"wrote {own}")
