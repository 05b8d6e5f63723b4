"""A pipeline without its weights, to refuse what it cannot do before they are loaded."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import torch

from vidattn.grid import Grid
from vidattn.pipelines.family import find_family
from vidattn.runs.request import TEMPORAL, Request, first_attribute, spatial_factor

log = logging.getLogger(__name__)

# parameters of pipelines that make a video piece by piece, so that its size is not that of a pass
PIECEWISE = ("window", "segment", "section", "chunk", "history", "overlap", "base_num_frames")


def skeleton(where: str, config: dict[str, object]) -> object | None:
    """The pipeline of a folder or hub id with its transformers and VAE on the meta device.

    Nothing but configurations is read. None where the pipeline cannot be built of these.

    Args:
        config: what its model_index.json says.
    """
    import diffusers

    try:
        pipeline = getattr(diffusers, config["_class_name"])
        parameters = inspect.signature(pipeline.__init__).parameters
        parts = {name: config[name] for name in parameters if name in config}
        for name, value in parts.items():
            if isinstance(value, list | tuple):
                parts[name] = _part(where, name, *value)
        return pipeline(**parts)
    except Exception as error:
        # what is wrong with it, if anything, shows when it is loaded in earnest
        log.info("no skeleton of %s: %s", where, error)
        return None


def _part(where: str, name: str, library: str | None, kind: str | None) -> object | None:
    """A component of diffusers without weights; None for the others."""
    import diffusers

    if library != "diffusers" or kind is None:
        return None
    cls = getattr(diffusers, kind)
    options = {"subfolder": name, "local_files_only": Path(where).is_dir()}
    if not issubclass(cls, diffusers.ModelMixin):
        return cls.from_pretrained(where, **options)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(where, **options))


def is_piecewise(pipe: object) -> bool:
    """Whether a pipeline, or its skeleton, makes a video piece by piece."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return any(word in name for name in parameters for word in PIECEWISE)


def video_grid(pipe: object, request: Request) -> Grid | None:
    """The tokens of the video that a pipeline attends to, beside any text.

    None where the request leaves a size open, or the pipeline does not work on the whole video.

    Args:
        pipe: a pipeline or its skeleton.
    """
    sizes = (request.num_frames, request.height, request.width)
    if None in sizes or is_piecewise(pipe):
        return None
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    model = next((part for part in models if find_family(part) is not None), None)
    step, edge = first_attribute(pipe, TEMPORAL), spatial_factor(pipe)
    if model is None or (request.num_frames - 1) % step:
        return None
    extents = {"T": (request.num_frames - 1) // step + 1}
    extents |= {"H": request.height // edge, "W": request.width // edge, "B": 1, "C": 1}
    family = find_family(model)
    arguments = {
        "hidden_states": torch.empty([extents[axis] for axis in family.axes], device="meta"),
        "num_frames": extents["T"],
        "height": extents["H"],
        "width": extents["W"],
    }
    try:
        return Grid(*family.place(model, arguments).size)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        log.info("no grid of %s before it runs: %s", type(pipe).__name__, error)
        return None
