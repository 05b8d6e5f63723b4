"""What a pipeline is asked for, and whether it can do it."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vidattn.runs.folder import read_card

_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)


@dataclass(frozen=True)
class Request:
    """One video: the arguments of a pipeline call, None where its own default is to hold."""

    prompt: str
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    image: Path | None = None

    def arguments(self) -> dict[str, object]:
        """The arguments that were given, by the names of diffusers, seed and image aside."""
        names = [name for name in vars(self) if name not in ("seed", "image")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def request_of(args: argparse.Namespace, prompt: str | None) -> Request:
    """The request in the flags, with the defaults of the model's card.

    Raises:
        ValueError: no prompt for a model whose card has none, or no such image.
    """
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty; write what the video should show")
    if args.image is not None and not args.image.is_file():
        raise ValueError(f"--image '{args.image}' is no file")
    card = read_card(args.model)
    if prompt is None and card.prompt is None:
        raise ValueError("no prompt given; write it behind the command, in quotes")
    given = {
        "num_frames": args.frames,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    given = {key: card.defaults.get(key) if x is None else x for key, x in given.items()}
    return Request(
        prompt=card.prompt if prompt is None else prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        image=args.image,
        **given,
    )


def resolve(pipe: object, request: Request) -> Request:
    """The request with the defaults of the pipeline filled in, checked against what it can do.

    Raises:
        ValueError: a size that the pipeline cannot make (the nearest are named), or an argument
            that it does not have.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in request.arguments():
        if name not in parameters:
            raise ValueError(f"{type(pipe).__name__} does not take {name}; leave it out")
    takes_image = "image" in parameters
    if request.image is not None and not takes_image:
        raise ValueError(f"{type(pipe).__name__} takes no --image: it makes videos from text")
    if takes_image and parameters["image"].default is inspect.Parameter.empty and not request.image:
        raise ValueError(f"{type(pipe).__name__} starts from a picture: give --image FILE")
    defaults = {
        name: parameters[name].default
        for name in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
        if name in parameters and isinstance(parameters[name].default, int | float)
    }
    _check_sizes(pipe, request, defaults)
    missing = {name: x for name, x in defaults.items() if getattr(request, name) is None}
    return replace(request, **missing)


def _check_sizes(pipe: object, request: Request, defaults: Mapping[str, int]) -> None:
    multiple = spatial_multiple(pipe)
    for name in ("height", "width"):
        value = getattr(request, name)
        if value is not None and value % multiple and defaults.get(name, 0) % multiple == 0:
            low = value // multiple * multiple
            raise ValueError(
                f"--{name} {value} is not possible with this {type(pipe).__name__}: it must be a "
                f"multiple of {multiple}; the nearest are {_either(low, low + multiple)}"
            )
    step, frames = first_attribute(pipe, TEMPORAL), request.num_frames
    # some pipelines count otherwise; their own default tells
    if step > 1 and frames is not None and (defaults.get("num_frames", 1) - 1) % step == 0:
        if (frames - 1) % step and "num_frames" in defaults:
            low = (frames - 1) // step * step + 1
            raise ValueError(
                f"--frames {frames} is not possible with this {type(pipe).__name__}: it must be "
                f"{step}n + 1; the nearest are {_either(low, low + step)}"
            )


def spatial_multiple(pipe: object) -> int:
    """What height and width must be multiples of: VAE factor times patch edge, or more."""
    # brings in PyTorch, which flags are read without
    from vidattn.pipelines.family import find_family

    model = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    patch = getattr(getattr(model, "config", None), "patch_size", None) or 1
    edge = patch if isinstance(patch, int) else patch[-1]
    family = find_family(model)
    return math.lcm(spatial_factor(pipe) * edge, family.pixels if family else 1)


def spatial_factor(pipe: object) -> int:
    """Pixels to a latent along height and width."""
    return first_attribute(pipe, _SPATIAL)


def first_attribute(pipe: object, names: tuple[str, ...]) -> int:
    """The first of several attributes that a pipeline has, or 1."""
    return next((getattr(pipe, name) for name in names if getattr(pipe, name, None)), 1)


def _either(low: int, high: int) -> str:
    return f"{low} and {high}" if low > 0 else str(high)
