"""Lets the rotary embedding of one transformer begin at any frame, without a limit of frames.

That of diffusers begins at frame 0, and ends with its table, at frame 1024.

Letters: F latent frames, h, w rows and columns of tokens, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from vidattn.streaming.rotation import Rotation

THETA = 10000.0


@contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else in a with block, and no other of its class."""
    own = vars(module)
    # hooks of accelerate stand there
    before = own.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def starting_at(transformer: nn.Module, frame: int, latents: Tensor) -> Iterator[None]:
    """Let the (B, C, F, h, w) latents of a transformer begin at another frame in a with block."""
    rope: Any = transformer.rope
    # made out here: code that torch.compile made for one frame then serves all
    tables = _tables(rope, latents, frame)
    with forwarding(rope, lambda hidden_states: tables):
        yield


def rotation_of(transformer: nn.Module) -> Rotation:
    """What moves the keys of a transformer in time: what rows and columns leave of a head."""
    head_dim = transformer.config.attention_head_dim
    return Rotation(head_dim - 4 * (head_dim // 6), THETA)


def _tables(rope: Any, hidden_states: Tensor, frame: int) -> tuple[Tensor, Tensor]:
    """(1, S, 1, D) cosines and sines, as ``WanRotaryPosEmbed`` computes them."""
    num_frames, height, width = (
        size // edge for size, edge in zip(hidden_states.shape[-3:], rope.patch_size)
    )
    times = torch.arange(frame, frame + num_frames)
    freqs_dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
    of_times = get_1d_rotary_pos_embed(
        rope.t_dim, times, THETA, use_real=True, repeat_interleave_real=True,
        freqs_dtype=freqs_dtype,
    )  # fmt: skip
    shape = (num_frames, height, width, -1)
    tables = []
    for time, table in zip(of_times, (rope.freqs_cos, rope.freqs_sin)):
        _, rows, columns = table.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
        parts = (
            time.to(table)[:, None, None].expand(shape),
            rows[:height][None, :, None].expand(shape),
            columns[:width][None, None].expand(shape),
        )
        tables.append(torch.cat(parts, -1).reshape(1, num_frames * height * width, 1, -1))
    return tables[0], tables[1]
