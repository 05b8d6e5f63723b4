"""The folder of a model and its parts, loaded as far as training needs them."""

import inspect
import json
import sys
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from vidattn.commands.model import DTYPES, PICKLES, check_folder, find_model
from vidattn.pipelines.family import family_of


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
    parts = pipeline_config(folder)
    found = parts.get(component)
    known = [name for name in parts if name.startswith("transformer") and parts[name][1]]
    if component not in known:
        raise ValueError(
            f"model.experts: '{folder}' has no '{component}'; it has {', '.join(known) or 'none'}"
        )
    return getattr(diffusers, found[1])


def empty_transformer(folder: Path, component: str, dtype: torch.dtype) -> nn.Module:
    """A transformer without its weights, on the meta device."""
    cls = transformer_class(folder, component)
    with torch.device("meta"):
        model = cls.from_config(cls.load_config(folder, subfolder=component))
    family_of(model)
    # past the warning that a cast model may not compute well: this one never computes
    return nn.Module.to(model, dtype)


def load_transformer(folder: Path, component: str, dtype: str) -> nn.Module:
    """A transformer with its weights.

    Raises:
        ValueError: they cannot be loaded.
    """
    cls = transformer_class(folder, component)
    try:
        model = cls.from_pretrained(
            folder, subfolder=component, torch_dtype=DTYPES[dtype], use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{component}' of '{folder}' cannot be loaded: {first_line(error)}"
        ) from error
    family_of(model)
    return model


def load_frame(
    folder: Path, dtype: str, device: torch.device, *, tiling: bool
) -> DiffusionPipeline:
    """The pipeline around its transformers, which have no weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    parts = pipeline_config(folder)
    names = [name for name in parts if name.startswith("transformer") and parts[name][1]]
    empty = {name: empty_transformer(folder, name, DTYPES[dtype]) for name in names}
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    # the VAE of Wan breaks into blotches below float32; every one is small and runs once
    dtypes = {"default": DTYPES[dtype], "vae": torch.float32}
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
    parts = pipeline_config(folder)
    cls = getattr(diffusers, parts["scheduler"][1])
    return cls.from_pretrained(folder, subfolder="scheduler")


def pipeline_config(folder: Path) -> dict[str, object]:
    """What stands in model_index.json beside the components, boundary_ratio among it."""
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))


def pipeline_class(folder: Path) -> type:
    """The class of a pipeline."""
    return getattr(diffusers, pipeline_config(folder)["_class_name"])


def takes(pipe: DiffusionPipeline, name: str) -> bool:
    """Whether a pipeline can be called with an argument of this name."""
    return name in inspect.signature(type(pipe).__call__).parameters


def needs_picture(folder: Path) -> bool:
    """Whether a pipeline starts from a picture."""
    found = inspect.signature(pipeline_class(folder).__call__).parameters.get("image")
    return found is not None and found.default is inspect.Parameter.empty


def temporal_factor(pipe: DiffusionPipeline) -> int:
    """Frames of a clip per frame of its latents."""
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    names += ("vae_temporal_scale_factor", "vae_scale_factor_t")
    return next((getattr(pipe, name) for name in names if getattr(pipe, name, None)), 1)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
