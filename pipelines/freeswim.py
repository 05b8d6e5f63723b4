"""FreeSwim: videos larger than those that a Wan model was trained on, which hold together.

A clip of the trained size is enlarged, noised in part, and denoised with windows of the trained
size, so that each token sees as much as in training. What is asked of the prompt is decided by
attention to everything (see ``hooks.dual_path``): windows alone show a thing in each of them.

Source: Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
Ultra-High-Resolution Video Generation", arXiv:2511.14712. Where the authors' code runs both paths
as two samples of one batch, and layers for nothing where one is not needed, each runs by itself.

Letters: B batch, F frames, H height and W width in pixels; clips are (B, F, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from vidattn.grid import Size
from vidattn.methods.freeswim import FreeSwim, sharpness
from vidattn.pipelines.enlarging import bar_of, enlarge, in_tiles, late_start, pad
from vidattn.pipelines.family import family_of
from vidattn.pipelines.hooks.dual_path import DualPath, Store
from vidattn.pipelines.models import transformers_of
from vidattn.pipelines.patch import patch
from vidattn.pipelines.report import Report
from vidattn.streaming.codec import CODECS
from vidattn.support.registry import unknown

# height and width that published models were trained at, by layers and heads
TRAINED = {
    (30, 12): (480, 832),  # Wan 2.1 1.3B
    (40, 40): (720, 1280),  # Wan 2.1 and 2.2 14B
    (30, 24): (704, 1280),  # Wan 2.2 5B
}
OUTPUT_TYPES = ("np", "pt", "pil")


@dataclass(frozen=True, eq=False)
class Enlarged:
    """What ``FreeSwimPipeline`` gives.

    Args:
        frames: as the pipeline gives them: an array (B, F, H, W, 3), a tensor (B, F, 3, H, W), or
            a list of pictures for each video.
        base: (B, F, 3, h, w) the clip of the trained size.
        report: of the steps at the large size.
        cache_bytes: that the cross-attentions of the full path took.
    """

    frames: Any
    base: Tensor
    report: Report
    cache_bytes: int


class FreeSwimPipeline:
    """Makes videos above the size that a Wan model was trained at, and leaves it as it was.

    Args:
        pipe: a WanPipeline of any version, not patched.
        trained: (height, width) in pixels of the clips that it was trained on; known for published
            models.
        strength: share of the steps that the enlarged clip goes through again, above 0, at most 1:
            the more, the more is made anew.
        cache_steps: how many steps a full path serves; 1 for one in each.
        quantise: what is kept of it, to "int8" or "int4", or "none".
        cache_device: where it is kept, such as "cpu"; None for where the model is.
        cache_gib: most memory that it may take; None for any.
        tiling: whether the autoencoder works in tiles, which takes less memory.

    Raises:
        ValueError: another pipeline, a model whose trained size nobody knows, or a value out of
            range.

    >>> large = FreeSwimPipeline(pipe)("a fox in the snow", height=1080, width=1920)
    """

    def __init__(
        self,
        pipe: WanPipeline,
        *,
        trained: tuple[int, int] | None = None,
        strength: float = 0.7,
        cache_steps: int = 2,
        quantise: str = "int8",
        cache_device: str | torch.device | None = None,
        cache_gib: float | None = None,
        tiling: bool = False,
    ):
        if not isinstance(pipe, WanPipeline):
            raise ValueError(f"FreeSwim makes large videos of a WanPipeline, got {type(pipe)!r}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
        if type(cache_steps) is not int or cache_steps < 1:
            raise ValueError(f"cache_steps must be a positive integer, got {cache_steps!r}")
        if quantise not in CODECS:
            raise unknown("quantise", quantise, CODECS)
        self.pipe, self.strength, self.cache_steps = pipe, strength, cache_steps
        self.quantise, self.cache_gib, self.tiling = quantise, cache_gib, tiling
        self.cache_device = None if cache_device is None else torch.device(cache_device)
        self.models = transformers_of(pipe.components)
        self.trained = (
            trained_size(next(iter(self.models.values()))) if trained is None else trained
        )
        model = next(iter(self.models.values()))
        token = tuple(pipe.vae_scale_factor_spatial * edge for edge in model.config.patch_size[1:])
        # the pipeline may want more than whole tokens
        self.multiple = tuple(math.lcm(edge, family_of(model).pixels) for edge in token)
        if any(x % m for x, m in zip(self.trained, self.multiple)) or min(self.trained) < 1:
            raise ValueError(
                f"trained must be a (height, width) in multiples of {self.multiple}, got "
                f"{self.trained}"
            )
        self.token = token
        self.window = tuple(x // edge for x, edge in zip(self.trained, token))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        base: Tensor | None = None,
        output_type: str = "np",
        **arguments: Any,
    ) -> Enlarged:
        """Make a video, or several.

        Args:
            prompt: what it shows.
            height, width: in pixels, any from the trained size on.
            generator: of all randomness.
            base: (B, F, 3, h, w) in [0, 1], a clip to enlarge; made at the trained size if not
                given.
            output_type: "np", "pt" or "pil".
            arguments: others of the pipeline, such as ``num_frames`` or ``guidance_scale``.

        Raises:
            ValueError: a size below the trained one, a cache above its limit, or what the pipeline
                itself refuses.
        """
        if output_type not in OUTPUT_TYPES:
            raise unknown("output_type", output_type, OUTPUT_TYPES)
        if wrong := sorted({"latents", "callback_on_step_end"} & set(arguments)):
            raise ValueError(f"FreeSwim runs the pipeline twice, so it takes no {wrong[0]}")
        arguments |= {"prompt": prompt, "generator": generator, "output_type": "pt"}
        prompts = len(prompt) if isinstance(prompt, list) else 1
        frames = arguments.get("num_frames", self._default("num_frames"))
        self.check((frames, height, width), prompts * arguments.get("num_videos_per_prompt", 1))
        if base is None:
            rows, columns = self.trained
            base = self.pipe(height=rows, width=columns, **arguments).frames
        padded = self._padded(height, width)
        clip = pad(enlarge(base, (height, width)), padded)
        with ExitStack() as stack:
            if self.tiling:
                stack.enter_context(in_tiles(self.pipe.vae))
            noisy, steps = self._noise(self._encode(clip), generator, arguments)
            stack.enter_context(bar_of(self.pipe, steps))
            stack.enter_context(late_start(self.pipe.scheduler, self.strength))
            handle = stack.enter_context(self._patched())
            paths = [self._second_path(site) for site in handle.sites]
            for path in paths:
                stack.callback(path.remove)
            frames = self.pipe(
                height=padded[0], width=padded[1], latents=noisy, **arguments
            ).frames[..., :height, :width]
            found = sum(path.store.nbytes for path in paths)
            return Enlarged(_as_type(frames, output_type), base, handle.report(), found)

    def cache_bytes(self, size: Size, num_videos: int = 1) -> int:
        """Bytes that are kept of the full path for (F, H, W) pixels of so many videos."""
        latent = (size[0] - 1) // self.pipe.vae_scale_factor_temporal + 1
        patch_frames = next(iter(self.models.values())).config.patch_size[0]
        rows, columns = (x // edge for x, edge in zip(self._padded(*size[1:]), self.token))
        tokens = num_videos * latent // patch_frames * rows * columns
        codec, found = CODECS[self.quantise], 0
        for model in self.models.values():
            channels = model.config.num_attention_heads * model.config.attention_head_dim
            found += model.config.num_layers * tokens * codec.num_bytes(channels, model.dtype)
        return found

    def check(self, size: Size, num_videos: int = 1) -> None:
        """Refuse (F, H, W) pixels that are not above the trained size, or whose cache is too large.

        Raises:
            ValueError: it is refused.
        """
        frames, height, width = size
        rows, columns = self.trained
        if height < rows or width < columns or (height, width) == self.trained:
            raise ValueError(
                f"{height} x {width} is not above the trained size of {rows} x {columns}: FreeSwim "
                "makes larger videos; call the pipeline itself for others"
            )
        needed = self.cache_bytes(size, num_videos)
        if self.cache_gib is not None and needed > self.cache_gib * 2**30:
            raise ValueError(
                f"the full path keeps {needed / 2**30:.2f} GiB for {frames} frames of {height} x "
                f"{width}, cache_gib is {self.cache_gib}: allow more, make less at a time, or keep "
                'it elsewhere with cache_device="cpu" and another limit'
            )

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """The least size that the pipeline makes which holds another."""
        first, second = (-(-x // m) * m for x, m in zip((height, width), self.multiple))
        return first, second

    def _default(self, name: str) -> Any:
        return inspect.signature(type(self.pipe).__call__).parameters[name].default

    def _patched(self):
        return patch(self.pipe, FreeSwim(window=self.window), dense_layers=0, dense_steps=0)

    def _second_path(self, site: Any) -> DualPath:
        store = Store(self.quantise, self.cache_device)
        return DualPath(site, sharpness(math.prod(self.window)), self.cache_steps, store)

    def _encode(self, clip: Tensor) -> Tensor:
        """(B, C, f, h, w) latents of a clip as the transformer sees them."""
        vae, device = self.pipe.vae, self.pipe._execution_device
        video = (clip.transpose(1, 2) * 2 - 1).to(device, vae.dtype)
        found = torch.cat([vae.encode(x[None]).latent_dist.mode() for x in video]).float()
        mean, std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1, 1)
            for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (found - mean) / std

    def _noise(
        self, latents: Tensor, generator: Any, arguments: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Latents with the noise of the first of the steps that are left, and how many are."""
        count = arguments.get("num_inference_steps", self._default("num_inference_steps"))
        # a copy: the pipeline sets its own anew
        scheduler = copy.copy(self.pipe.scheduler)
        with late_start(scheduler, self.strength):
            scheduler.set_timesteps(count, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=_of(generator, latents))
        first, noise = scheduler.timesteps[:1], noise.to(latents.device)
        steps = scheduler.num_inference_steps
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(latents, first, noise), steps
        return scheduler.add_noise(latents, noise, first), steps


def trained_size(model: Any) -> tuple[int, int]:
    """Height and width in pixels that a published model was trained at.

    Raises:
        ValueError: nobody knows.
    """
    shape = model.config.num_layers, model.config.num_attention_heads
    if shape not in TRAINED:
        raise ValueError(
            f"nobody knows the size that a model of {shape[0]} layers and {shape[1]} heads was "
            "trained at: give trained=(height, width) in pixels"
        )
    return TRAINED[shape]


def _of(generator: Any, latents: Tensor) -> torch.device:
    return latents.device if generator is None else generator.device


def _as_type(frames: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return frames
    array = frames.permute(0, 1, 3, 4, 2).float().cpu().numpy()
    if output_type == "np":
        return array
    return [VaeImageProcessor.numpy_to_pil(clip) for clip in array]
