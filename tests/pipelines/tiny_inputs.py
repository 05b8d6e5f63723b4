"""What a small transformer is, and inputs and settings that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

B = 2
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}


@dataclass(frozen=True)
class Tiny:
    """A small transformer.

    ``before`` gives the number of tokens in front of the video in a sequence of S tokens.
    """

    config: dict[str, object]
    inputs: Callable[[], dict[str, object]]
    size: tuple[int, int, int] = (3, 5, 7)
    before: Callable[[int], int] = lambda length: 0
    # of them, tokens that have keys and no queries
    silent: int = 0
    # frames that wait for those before them together
    chunk: int | None = None
    tolerance: float = 1e-5
    # at which some layers see the video beside ``size``
    other_sizes: tuple[tuple[int, int, int], ...] = ()

    def call(self, model: nn.Module, **changes: object) -> Tensor:
        """The video that the transformer predicts."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            inputs = self.inputs()
            output = model(**{**inputs, **changes}, return_dict=False)
        while not isinstance(output, Tensor):
            is_batch = isinstance(output, list) and len(output) == B
            output = torch.stack(output) if is_batch else output[0]
        return output

    @property
    def num_video(self) -> int:
        t, h, w = self.size
        return t * h * w


def latents(channels: int = 4, frames: int = 3, height: int = 11, width: int = 15) -> Tensor:
    return torch.randn(B, channels, frames, height, width)


def text(length: int = 6, width: int = 16) -> Tensor:
    return torch.randn(B, length, width)


def timestep() -> Tensor:
    return torch.full((B,), 500.0)


def padding(*valid: int, length: int = 6) -> Tensor:
    return (torch.arange(length) < torch.tensor(valid)[:, None]).long()


def plain(**more: object) -> dict[str, object]:
    return {
        "hidden_states": latents(),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        **more,
    }


def even(**more: object) -> dict[str, object]:
    """For models that take only latents which the patches divide."""
    return plain(**more) | {"hidden_states": latents(height=10, width=14)}


WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 24,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": False,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan(**more: object) -> dict[str, object]:
    return plain(encoder_attention_mask=padding(6, 3), pooled_projections=torch.randn(B, 8), **more)


def framepack() -> dict[str, object]:
    frames = torch.arange(12)
    return hunyuan() | {
        "hidden_states": latents(height=10, width=14),
        "image_embeds": torch.randn(B, 2, 16),
        "indices_latents": frames[9:],
        "latents_clean": latents(frames=2, height=10, width=14),
        "indices_latents_clean": frames[7:9],
        "latents_history_2x": latents(frames=2, height=10, width=14),
        "indices_latents_history_2x": frames[5:7],
        "latents_history_4x": latents(frames=5, height=10, width=14),
        "indices_latents_history_4x": frames[:5],
    }


def cosmos() -> dict[str, object]:
    return even(fps=30, padding_mask=torch.zeros(1, 1, 10, 14))


def coordinates(*stretches: tuple[int, int, int, float]) -> Tensor:
    """(B, 3, S) of stretches of (frames, rows, columns, time of the first frame)."""
    parts = []
    for frames, rows, columns, start in stretches:
        axes = (
            torch.arange(frames) * 8 + start,
            torch.arange(rows) * 32,
            torch.arange(columns) * 32,
        )
        parts.append(torch.cartesian_prod(*(axis.float() for axis in axes)).T)
    return torch.cat(parts, 1).expand(B, -1, -1)


def packed() -> dict[str, object]:
    """Text, a picture of the video's size, two frames of another video, sound, and the video."""
    video = coordinates((1, 5, 7, 6.0), (2, 3, 4, 7.0), (3, 5, 7, 30.0))[0].T
    tags = torch.tensor([1] * 6 + [0] * (35 + 24) + [2] * 4 + [0] * 105)
    positions = torch.zeros(len(tags), 3)
    positions[:6, 0] = torch.arange(6)
    positions[tags == 0] = video
    positions[tags == 2, 0] = torch.arange(4) + 30.0
    return {
        "hidden_states": torch.randn(B, 35 + 24 + 105, 16),
        "audio_hidden_states": torch.randn(B, 4, 3),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.3, 0.9]),
        "timestep_indices": ((tags == 0) & (torch.arange(len(tags)) < 65)).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": (tags == 0).nonzero()[:, 0],
        "audio_indices": (tags == 2).nonzero()[:, 0],
        "text_indices": (tags == 1).nonzero()[:, 0],
    }


def cosmos3() -> dict[str, object]:
    """Six tokens of text, the video and four of sound, in one sequence without a batch."""
    text, video, sound = torch.arange(115).split([6, 105, 4])
    return {
        "input_ids": torch.arange(6),
        "text_indexes": text,
        "position_ids": torch.arange(115).expand(3, -1),
        "und_len": 6,
        "sequence_length": 115,
        "vision_tokens": [torch.randn(1, 4, 3, 10, 14)],
        "vision_token_shapes": [(3, 5, 7)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((105,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(3)],
        "sound_tokens": [torch.randn(3, 4)],
        "sound_token_shapes": [(4, 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound,
        "sound_timesteps": torch.full((4,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(4)],
    }


LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
}


def ltx(**more: object) -> dict[str, object]:
    return {
        "hidden_states": torch.randn(B, 105, 4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": padding(6, 3),
        "num_frames": 3,
        "height": 5,
        "width": 7,
        **more,
    }


def ltx2(extra: int = 9) -> dict[str, object]:
    return {
        "hidden_states": torch.randn(B, 105 + extra, 4),
        "audio_hidden_states": torch.randn(B, 5, 2),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": padding(6, 3),
        "audio_encoder_attention_mask": padding(6, 3),
        "num_frames": 3,
        "height": 5,
        "width": 7,
        "fps": 25.0,
        "audio_num_frames": 5,
        "video_coords": torch.rand(B, 3, 105 + extra, 2),
    }


def channels_last(channels: int) -> Tensor:
    return torch.randn(B, 3, 10, 14, channels)


def kandinsky5() -> dict[str, object]:
    return {
        "hidden_states": channels_last(4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "pooled_projections": torch.randn(B, 8),
        "visual_rope_pos": (torch.arange(3), torch.arange(5), torch.arange(7)),
        "text_rope_pos": torch.arange(6),
    }


def kandinsky6() -> dict[str, object]:
    return {
        "hidden_states": channels_last(4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "pooled_projections": torch.randn(B, 8),
        "audio_hidden_states": torch.randn(B, 4, 3),
    }


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 14,
    "sample_height": 10,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 6,
}


def cogvideox(frames: int = 3) -> dict[str, object]:
    return {
        "hidden_states": torch.randn(B, frames, 4, 10, 14),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
    }
