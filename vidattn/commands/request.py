"""What a pipeline is asked for, and whether it can do it."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vidattn.commands.model import DTYPES, OFFLOADS, is_bundled

# the sizes that the bundled model was trained for
BUNDLED_DEFAULTS = {
    "num_frames": 33,
    "height": 128,
    "width": 128,
    "num_inference_steps": 12,
    "guidance_scale": 4.0,
}
BUNDLED_PROMPT = "a red boot moving right over a dark background"

_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
_TEMPORAL = (
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


def add_request_arguments(parser: argparse.ArgumentParser, guards: bool = True) -> None:
    """Flags about the video, and about what stays dense."""
    group = parser.add_argument_group("video")
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--image", type=Path, help="the first frame, for image-to-video models")
    for flag in ("--frames", "--height", "--width", "--steps"):
        group.add_argument(flag, type=positive_int, metavar="N", help="default: the model's")
    group.add_argument("--guidance", type=float, metavar="X", help="default: the model's")
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


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def seed(text: str) -> int:
    """An integer that torch takes as a seed."""
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {text}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None


def count_or_share(text: str) -> int | float:
    """A count such as 2, or a share such as 0.25."""
    try:
        value = float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a count such as 2 or a share such as 0.1, got {text!r}"
        ) from None
    if not 0 <= value < math.inf or isinstance(value, float) and value > 1:
        raise argparse.ArgumentTypeError(
            f"must be a count of at least 0, or a share from 0.0 to 1.0, got {text}"
        )
    return value


def request_of(args: argparse.Namespace, prompt: str | None) -> Request:
    """The request in the flags; the bundled model has its own defaults.

    Raises:
        ValueError: no prompt for a model that is not the bundled one, or no such image.
    """
    bundled = is_bundled(args.model)
    if prompt is None and not bundled:
        raise ValueError("no prompt given; write it behind the command, in quotes")
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty; write what the video should show")
    if args.image is not None and not args.image.is_file():
        raise ValueError(f"--image '{args.image}' is no file")
    given = {
        "num_frames": args.frames,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    if bundled:
        given = {key: BUNDLED_DEFAULTS[key] if x is None else x for key, x in given.items()}
    return Request(
        prompt=BUNDLED_PROMPT if prompt is None else prompt,
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
    step, frames = _first(pipe, _TEMPORAL), request.num_frames
    # some pipelines count otherwise; their own default tells
    if step > 1 and frames is not None and (defaults.get("num_frames", 1) - 1) % step == 0:
        if (frames - 1) % step and "num_frames" in defaults:
            low = (frames - 1) // step * step + 1
            raise ValueError(
                f"--frames {frames} is not possible with this {type(pipe).__name__}: it must be "
                f"{step}n + 1; the nearest are {_either(low, low + step)}"
            )


def spatial_multiple(pipe: object) -> int:
    """What height and width must be multiples of: VAE factor times patch edge."""
    model = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    patch = getattr(getattr(model, "config", None), "patch_size", None) or 1
    edge = patch if isinstance(patch, int) else patch[-1]
    multiple = _first(pipe, _SPATIAL) * edge
    # Wan asks for 16 whatever its parts need
    return math.lcm(multiple, 16) if type(pipe).__name__.startswith("Wan") else multiple


def _first(pipe: object, names: tuple[str, ...]) -> int:
    return next((getattr(pipe, name) for name in names if getattr(pipe, name, None)), 1)


def _either(low: int, high: int) -> str:
    return f"{low} and {high}" if low > 0 else str(high)
