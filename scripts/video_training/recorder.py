"""What a pipeline calls its transformer with, and the latents of clips as it would see them.

A pipeline is run up to the first call of its transformer, which has no weights. What it is called
with, the embeddings of the text, masks, positions, sizes, is kept as it is, so that training needs
to know nothing about any family. Only latents and time step are then put in anew.

Letters: B batch, C latent channels, F frames, H height, W width.
"""

import inspect
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from video_training.pipeline import first_line, takes
from video_training.stretches import Bucket

from vidattn.pipelines.family import family_of, find_family

# facts of a size, beside the arguments of the transformer
AXIS, SHAPE, PER_SAMPLE = ".axis", ".shape", ".per_sample"
TIME_SCALE, TIME_SHAPE = ".time_scale", ".time_shape"
# the channels behind the latents
CONDITION = "condition"


class _Stop(BaseException):
    """Carries the arguments out of the pipeline, past everything that catches exceptions."""


class Recorder:
    """Records the calls of one pipeline.

    Args:
        pipe: with transformers on the meta device.
        guidance: that is embedded, for models that have it as an input.
        fps: of the clips, for models that are told; None for what they take it to be.
        call: further arguments of the pipeline.

    Raises:
        ValueError: arguments that the pipeline does not take.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        guidance: float = 1.0,
        fps: float | None = None,
        call: Mapping[str, object],
    ):
        self.pipe, self.call, self.fps = pipe, dict(call), fps
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        self.transformers = [part for part in parts if find_family(part)]
        model, config = self.transformers[0], pipe.vae.config
        self.axes = family_of(model).axes
        self.channels = config.get("z_dim") or config.get("latent_channels")
        self.guidance = guidance if model.config.get("guidance_embeds") else 1.0
        unknown = [name for name in self.call if not takes(pipe, name)]
        if unknown:
            raise ValueError(
                f"model.call: {type(pipe).__name__} does not take {', '.join(unknown)}"
            )

    def base(self, size: Bucket, picture: np.ndarray | None) -> dict[str, object]:
        """The entry of a size: its facts, and the arguments under the empty caption.

        Args:
            picture: (H, W, 3) bytes that a clip begins with, for pipelines that need one.

        Raises:
            ValueError: the pipeline cannot do it, or passes what cannot be kept.
        """
        facts, one = self._record([""], size, picture)
        other = self._record([""], size, picture, seed=1)[1]
        if noise := [name for name, value in one.items() if not same(value, other.get(name))]:
            raise ValueError(
                f"{type(self.pipe).__name__} begins with noise in {', '.join(noise)} too, which is "
                "not trained: it makes more than a video"
            )
        # a pipeline that starts from a picture takes one clip at a time
        two = one if picture is not None else self._record(["", ""], size, None)[1]
        tensors = {name: value for name, value in one.items() if isinstance(value, Tensor)}
        facts[PER_SAMPLE] = [
            name
            for name, value in tensors.items()
            if value.ndim and len(value) == 1 and (two is one or len(two[name]) == 2)
        ]
        return facts | one

    def own(
        self, caption: str, size: Bucket, picture: np.ndarray | None, base: Mapping[str, object]
    ) -> dict[str, object]:
        """The entry of a caption: the arguments that differ from those of the empty one."""
        found = self._record([caption], size, picture)[1]
        return {name: value for name, value in found.items() if not same(value, base.get(name))}

    @torch.no_grad()
    def latents(self, frames: np.ndarray) -> Tensor:
        """The latents of a clip, normalised and laid out as the transformer sees them.

        Args:
            frames: (F, H, W, 3) bytes.

        Raises:
            ValueError: they are not finite.
        """
        vae = self.pipe.vae
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype)
        encoded = vae.encode(clip / 127.5 - 1).latent_dist.mode()
        latents = normalise(vae, encoded.float())
        if not bool(latents.isfinite().all()):
            raise ValueError("its latents are not finite")
        if self._is_packed:
            return latents.flatten(2).mT.contiguous()
        return latents.permute(["BCTHW".index(axis) for axis in self.axes]).contiguous()

    @property
    def _is_packed(self) -> bool:
        """Whether the transformer takes tokens, (B, S, C)."""
        return family_of(self.transformers[0]).locate is not None and hasattr(
            self.pipe, "_pack_latents"
        )

    @torch.no_grad()
    def _record(
        self, captions: list[str], size: Bucket, picture: np.ndarray | None, seed: int = 0
    ) -> tuple[dict[str, object], dict[str, object]]:
        """The facts of a size, and the arguments of the transformer by the names of leaves."""
        frames, height, width = size
        given = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": 2}
        given |= {"guidance_scale": self.guidance, "true_cfg_scale": 1.0, "use_dynamic_cfg": False}
        given |= {"frame_rate": self.fps, "fps": self.fps} if self.fps else {}
        given = {name: value for name, value in given.items() if takes(self.pipe, name)}
        if picture is not None:
            given["image"] = Image.fromarray(picture)
        given["generator"] = torch.Generator().manual_seed(seed)
        try:
            with _stopping(self.transformers):
                self.pipe(prompt=captions, **given | self.call)
            raise RuntimeError("it does not call its transformer")
        except _Stop as stop:
            (arguments,) = stop.args
        except Exception as error:
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be run on {frames} frames of {height} x "
                f"{width}: {type(error).__name__}: {first_line(error)}"
            ) from error
        return self._take_apart(arguments, size)

    def _take_apart(self, arguments: dict, size: Bucket) -> tuple[dict, dict]:
        hidden_states, timestep = arguments.pop("hidden_states"), arguments.pop("timestep")
        arguments.pop("return_dict", None)
        steps = torch.as_tensor(timestep, dtype=torch.float64)
        first, own = float(self.pipe.scheduler.timesteps[0]), float(steps.flatten()[0])
        if not bool((steps == own).all()):
            raise ValueError(
                f"{type(self.pipe).__name__} gives its tokens time steps of their own, as for a "
                "first frame that is known; that is not trained yet"
            )
        axis = 2 if self._is_packed else self.axes.index("C")
        leaves = dict(_leaves(arguments))
        if extra := hidden_states.shape[axis] - self.channels:
            leaves[CONDITION] = hidden_states.narrow(axis, self.channels, extra)
        shape = list(hidden_states.shape)
        shape[axis] = self.channels
        facts = {AXIS: axis, TIME_SHAPE: list(steps.shape[1:]), SHAPE: shape}
        facts[TIME_SCALE] = round(own / first, 6) if first else 1.0
        return facts, leaves


def normalise(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents (B, C, F, H, W) of a VAE as the transformers of diffusers are trained on them."""
    # some keep them as buffers, the others in their configuration
    found = {**vae.config, **dict(vae.named_buffers())}
    mean, std = (
        torch.as_tensor(default if found.get(name) is None else found[name])
        for name, default in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    mean, std = (x.to(latents).view(1, -1, 1, 1, 1) for x in (mean, std))
    shift = vae.config.get("shift_factor") or 0.0
    return (latents - mean - shift) * (vae.config.get("scaling_factor") or 1.0) / std


@contextmanager
def _stopping(transformers: list[nn.Module]):
    """Let the transformers carry their arguments out instead of running."""

    def stop(model: nn.Module, args: tuple, kwargs: dict):
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self", None)
        raise _Stop(arguments)

    hooks = [model.register_forward_pre_hook(stop, with_kwargs=True) for model in transformers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _leaves(value: object, name: str = ""):
    """Tensors and plain values in arguments, with their names."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    else:
        if value is not None and not isinstance(value, Tensor | int | float | str | bool):
            raise ValueError(f"the transformer is called with {name}={value!r}, which is not kept")
        if value is not None:
            yield name, value
        return
    for key, one in items:
        yield from _leaves(one, f"{name}/{key}" if name else str(key))


def nest(leaves: Mapping[str, object]) -> dict[str, object]:
    """Arguments from their leaves; what is numbered becomes a tuple."""
    found: dict[str, object] = {}
    groups: dict[str, dict[str, object]] = {}
    for name, value in leaves.items():
        head, slash, tail = name.partition("/")
        if slash:
            groups.setdefault(head, {})[tail] = value
        else:
            found[head] = value
    for head, group in groups.items():
        inner = nest(group)
        found[head] = (
            tuple(inner[str(i)] for i in range(len(inner)))
            if all(key.isdigit() for key in inner)
            else inner
        )
    return found


def same(one: object, other: object) -> bool:
    """Whether two leaves are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.to(one.device))
    return type(one) is type(other) and one == other
