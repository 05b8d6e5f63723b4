"""What a stream needs of a pipeline, said before anything runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidattn.grid import Size
from vidattn.pipelines.handle import find_handle, handle_of
from vidattn.pipelines.models import unwrap
from vidattn.pipelines.streaming.recipe import Recipe
from vidattn.pipelines.streaming.timing import FAR, SKYREELS, WAN

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def transformer_of(pipe: Any) -> nn.Module:
    """The transformer of a pipeline that can be streamed.

    Raises:
        ValueError: no such pipeline, or one in a state in which it cannot be.
    """
    kind = type(pipe).__name__
    missing = [name for name in PARTS if getattr(pipe, name, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"a stream needs a pipeline of Wan, SkyReels-V2 or AnyFlow-FAR with "
            f"{', '.join(PARTS)}, and this {kind} has no "
            f"{missing[0] if missing else 'encode_prompt'}"
        )
    model: Any = unwrap(pipe.transformer)
    name = type(model).__name__
    if name not in (WAN, SKYREELS, FAR):
        raise ValueError(
            f"a stream needs a causal {WAN}, {SKYREELS} or {FAR}, and the transformer of this "
            f"{kind} is a {name}, which has no release that was trained to be causal in this layout"
        )
    if name == SKYREELS and model.config.num_frame_per_block > 1:
        raise ValueError(
            f"num_frame_per_block={model.config.num_frame_per_block} lets the frames of one pass "
            "wait for each other by a mask, and in a stream they do so by its cache: call "
            "pipe.transformer._set_ar_attention(1) first, and say the chunk in the recipe"
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"this {kind} has two transformers, one for each half of the noise levels: a stream "
            "needs one that makes whole chunks, as converted causal models are"
        )
    if any(model.config.get(name) is not None for name in ("added_kv_proj_dim", "image_dim")):
        raise ValueError(
            "this transformer reads the embedding of a picture beside the prompt: a stream takes "
            "a text-to-video transformer, and a picture as its first frame with start="
        )
    if _patch(model)[0] != 1:
        raise ValueError(
            f"a stream needs a transformer that cuts no patches in time, and those of this one "
            f"are of {_patch(model)[0]} frames"
        )
    _check_state(pipe, model)
    return model


def _check_state(pipe: Any, model: Any) -> None:
    """Raise ValueError where something else has its hands on the attention of a model."""
    if handle_of(pipe) is not None or find_handle(model) is not None:
        raise ValueError(
            "this pipeline is patched: call vidattn.unpatch(pipe) first; a stream is made sparse "
            "by its policy, such as annsa"
        )
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            "a step cache is enabled on this transformer, which would reuse steps of other chunks: "
            "call pipe.transformer.disable_cache() first"
        )
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            "this transformer spreads its sequence over several processes, and a cache holds whole "
            "frames: load it without context parallelism"
        )


def check_size(pipe: Any, model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens of a size in pixels.

    Raises:
        ValueError: it does not divide into tokens; the nearest that does is named.
    """
    factor = pipe.vae_scale_factor_spatial
    edges = [factor * edge for edge in _patch(model)[1:]]
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    if not is_pair or not all(type(x) is int and x > 0 for x in size):
        raise ValueError(f"size must be a height and a width in pixels, got {size!r}")
    if any(x % edge for x, edge in zip(size, edges)):
        near = tuple(max(1, round(x / edge)) * edge for x, edge in zip(size, edges))
        raise ValueError(
            f"size={tuple(size)} does not divide into tokens of {edges[0]}x{edges[1]} pixels: the "
            f"nearest that does is {near}"
        )
    return size[0] // edges[0], size[1] // edges[1]


def _patch(model: Any) -> Size:
    """(t, h, w) latents of a token, of those that are coarse where there are such."""
    return model.config.get("compressed_patch_size") or model.config.patch_size


def check_seed(seed: Any) -> None:
    """Raise ValueError unless torch takes it for a seed."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")


def check_start(start: Any, size: tuple[int, int], factor: int, total: int | None) -> None:
    """Refuse what a video cannot begin with.

    Args:
        factor: frames to a latent frame.
        total: latent frames of the video; None is endless.

    Raises:
        ValueError: no frames of the size, or as many as are no whole latent frames.
    """
    is_video = isinstance(start, Tensor) and start.dim() == 4 and start.shape[1] == 3
    if not is_video or tuple(start.shape[2:]) != tuple(size) or not len(start):
        shape = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(
            f"start must be frames in [0, 1] of shape (frames, 3, {size[0]}, {size[1]}), as the "
            f"video has, got {shape}"
        )
    is_light = start.is_floating_point() and bool(((start >= 0) & (start <= 1)).all())
    if not is_light:
        raise ValueError(
            f"start must be of floating point numbers from 0 to 1, got {start.dtype} from "
            f"{start.min().item():g} to {start.max().item():g}"
        )
    num_frames = None if total is None else (total - 1) * factor + 1
    if num_frames is not None and len(start) > num_frames:
        raise ValueError(
            f"start has {len(start)} frames, and the video is to have {num_frames} in all: give a "
            "larger num_frames, or less of start"
        )
    if (len(start) - 1) % factor:
        low = (len(start) - 1) // factor * factor + 1
        raise ValueError(
            f"start has {len(start)} frames, and must have one and then {factor} for each latent "
            f"frame: the nearest are {low} and {low + factor}"
        )


def latent_frames(num_frames: int | None, recipe: Recipe, factor: int) -> int | None:
    """Latent frames of a number of frames, which is one of whole chunks; None is endless.

    Args:
        factor: frames to a latent frame.

    Raises:
        ValueError: it is not; the nearest are named.
    """
    if num_frames is None:
        return None
    if type(num_frames) is not int or num_frames < 1:
        raise ValueError(f"num_frames must be a positive integer or None, got {num_frames!r}")
    first = len(recipe.chunk_at(0))
    low = max(0, ((num_frames - 1) // factor + 1 - first) // recipe.chunk)
    near = [(first + (low + i) * recipe.chunk - 1) * factor + 1 for i in range(2)]
    if num_frames not in near:
        raise ValueError(
            f"num_frames={num_frames} is no whole number of chunks, of {first} latent frames first "
            f"and {recipe.chunk} then, {factor} frames each but the first: the nearest are "
            f"{near[0]} and {near[1]}"
        )
    return (num_frames - 1) // factor + 1
