"""The folder of a model and its parts, loaded as far as training needs them."""

import inspect
import sys
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from vidattn.pipelines.family import family_of, find_family
from vidattn.runs.folder import PICKLES, check_folder, find_model
from vidattn.runs.model import pipeline_config
from vidattn.runs.request import TEMPORAL, first_attribute, spatial_multiple
from vidattn.runs.skeleton import skeleton


@cache
def model_folder(name: str) -> Path:
    """The folder of a model, downloaded if it is on the hub.

    Raises:
        ValueError: no such model, a broken one, or one of pickles only.
    """
    where = Path(find_model(name))
    if where.is_dir():
        return where
    from huggingface_hub import snapshot_download

    unused = [f"*{ending}" for ending in PICKLES]
    try:
        return check_folder(Path(snapshot_download(name, ignore_patterns=unused)))
    except OSError as error:
        raise ValueError(
            f"'{name}' cannot be had from the hub ({first_line(error)}): check the name and the "
            "network, or copy its folder here and name that"
        ) from error


def transformer_class(folder: Path, component: str) -> type:
    """The class of a transformer.

    Raises:
        ValueError: the pipeline has no such component, or one that cannot be patched.
    """
    parts = pipeline_config(str(folder))
    found = parts.get(component)
    known = [name for name in parts if name.startswith("transformer") and parts[name][1]]
    if component not in known:
        raise ValueError(
            f"model.experts: '{folder}' has no '{component}'; it has {', '.join(known) or 'none'}"
        )
    return getattr(diffusers, found[1])


def load_transformer(folder: Path, component: str, dtype: torch.dtype) -> nn.Module:
    """A transformer with its weights.

    Raises:
        ValueError: they cannot be loaded.
    """
    cls = transformer_class(folder, component)
    try:
        model = cls.from_pretrained(
            folder, subfolder=component, torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{component}' of '{folder}' cannot be loaded: {first_line(error)}"
        ) from error
    family_of(model)
    return model


def load_frame(
    folder: Path, dtype: torch.dtype, device: torch.device, *, tiling: bool
) -> DiffusionPipeline:
    """The pipeline around its transformers, which have no weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    bones = skeleton(str(folder), pipeline_config(str(folder)))
    if bones is None:
        raise ValueError(f"'{folder}' is no pipeline that can be built from its configurations")
    # past the warning that a cast model may not compute well: these never compute
    empty = {
        name: nn.Module.to(part, dtype)
        for name, part in bones.components.items()
        if isinstance(part, nn.Module) and find_family(part)
    }
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    # the VAE of Wan breaks into blotches below float32; every one is small and runs once
    dtypes = {"default": dtype, "vae": torch.float32}
    try:
        # the class itself: for Wan, DiffusionPipeline would load the transformers all the same
        pipe = pipeline_class(folder).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=dtypes, **empty
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"'{folder}' cannot be loaded: {first_line(error)}") from error
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in empty:
            part.to(device).eval().requires_grad_(False)
    if tiling:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_scheduler(folder: Path) -> object:
    """The scheduler of a pipeline, which says what the model predicts."""
    parts = pipeline_config(str(folder))
    cls = getattr(diffusers, parts["scheduler"][1])
    return cls.from_pretrained(folder, subfolder="scheduler")


def pipeline_class(folder: Path) -> type:
    """The class of a pipeline."""
    return getattr(diffusers, pipeline_config(str(folder))["_class_name"])


def takes(pipe: DiffusionPipeline, name: str) -> bool:
    """Whether a pipeline can be called with an argument of this name."""
    return name in inspect.signature(type(pipe).__call__).parameters


def needs_picture(folder: Path) -> bool:
    """Whether a pipeline starts from a picture."""
    found = inspect.signature(pipeline_class(folder).__call__).parameters.get("image")
    return found is not None and found.default is inspect.Parameter.empty


def multiples(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Frames of a clip per frame of its latents, and what height and width are multiples of."""
    return first_attribute(pipe, TEMPORAL), spatial_multiple(pipe)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
