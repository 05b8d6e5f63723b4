"""Frames stand where they are put, and keys move in time as the rotary embedding turns them."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.testing import assert_close

from tests.pipelines.tiny_inputs import WAN
from vidattn.pipelines.streaming.rope import rotation_of, starting_at

ROWS, COLUMNS = 4, 6


@pytest.fixture(scope="module")
def model():
    return WanTransformer3DModel(**WAN)


def latents(model, num_frames: int) -> torch.Tensor:
    p_t, p_h, p_w = model.config.patch_size
    return torch.zeros(1, 1, num_frames * p_t, ROWS * p_h, COLUMNS * p_w)


def tables(model, num_frames: int):
    return model.rope(latents(model, num_frames))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(S, D) tokens, turned pair by pair."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turn = torch.complex(cos[0, :, 0, ::2].double(), sin[0, :, 0, ::2].double())
    return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize("frame", [0, 5, 29])
def test_frames_are_those_of_the_table_of_the_model(model, frame):
    whole = [x[:, frame * ROWS * COLUMNS :] for x in tables(model, frame + 3)]
    with starting_at(model, frame, latents(model, 3)):
        found = tables(model, 3)
    for one, other in zip(found, whole):
        assert_close(one, other, rtol=0, atol=0)
    assert "forward" not in vars(model.rope)


@pytest.mark.parametrize("frames", [(3, 8), (8, 3), (1000, 5000)])
def test_a_key_moves_to_another_frame(model, frames):
    raw = torch.randn(ROWS * COLUMNS, model.config.attention_head_dim)
    here, there = frames
    placed = {}
    for frame in frames:
        with starting_at(model, frame, latents(model, 1)):
            placed[frame] = rotated(raw, *tables(model, 1))
    moved = rotation_of(model)(placed[here].float()[None, None], there - here)[0, 0]
    assert_close(moved.double(), placed[there], rtol=1e-4, atol=1e-4)
    assert (placed[here] - placed[there]).abs().max() > 0.1
