"""Every transformer that can be patched, small enough for a test, and what to call it with.

A new family needs one entry here, under the name of its class; ``test_families`` says so if it is
missing, and runs every check on it.
"""

from __future__ import annotations

import diffusers
import torch
from torch import nn

from tests.pipelines.tiny_inputs import (
    COGVIDEOX,
    HEADS,
    HUNYUAN,
    LTX,
    WAN,
    B,
    Tiny,
    cogvideox,
    coordinates,
    cosmos,
    cosmos3,
    even,
    framepack,
    hunyuan,
    kandinsky5,
    kandinsky6,
    latents,
    ltx,
    ltx2,
    packed,
    padding,
    plain,
    text,
)
from tests.pipelines.tiny_pictures import PICTURES


def build(key: str) -> nn.Module:
    """The transformer under a key with random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, key.partition("/")[0])(**TINY[key].config).eval()
        for parameter in model.parameters():
            # weights that start at zero would hide mistakes
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return model


_NOT_IN_15 = ("num_single_layers", "guidance_embeds", "pooled_projection_dim")
_NOT_IN_MOTIF = ("num_refiner_layers", "guidance_embeds", "pooled_projection_dim")
TINY: dict[str, Tiny] = {
    "WanTransformer3DModel": Tiny(WAN, plain),
    "WanTransformer3DModel/image to video": Tiny(
        {**WAN, "image_dim": 8, "added_kv_proj_dim": 24},
        lambda: plain(
            encoder_hidden_states=text(512), encoder_hidden_states_image=torch.randn(B, 4, 8)
        ),
    ),
    "WanTransformer3DModel/time in patches": Tiny(
        {**WAN, "patch_size": (2, 1, 3)},
        lambda: plain() | {"hidden_states": latents(frames=7, height=5, width=22)},
    ),
    "WanTransformer3DModel/one frame": Tiny(
        WAN, lambda: plain() | {"hidden_states": latents(frames=1)}, size=(1, 5, 7)
    ),
    "WanVACETransformer3DModel": Tiny(
        {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 5},
        lambda: plain(control_hidden_states=latents(5)),
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "num_layers": 4,
            "image_dim": 4,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda: (
            plain(
                encoder_hidden_states_image=torch.randn(B, 3, 4),
                pose_hidden_states=latents(4, frames=2),
                face_pixel_values=torch.randn(B, 3, 5, 16, 16),
            )
            | {"hidden_states": latents(12)}
        ),
    ),
    "ChronoEditTransformer3DModel": Tiny(WAN, plain),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, plain),
    "SkyReelsV2Transformer3DModel/blocks of frames": Tiny(
        {**WAN, "num_frame_per_block": 2},
        lambda: plain() | {"hidden_states": latents(frames=6)},
        size=(6, 5, 7),
        chunk=2,
    ),
    "AnyFlowTransformer3DModel": Tiny(
        WAN,
        lambda: {
            "hidden_states": torch.randn(B, 3, 4, 10, 14),
            "timestep": torch.full((B, 3), 500.0),
            "r_timestep": torch.full((B, 3), 300.0),
            "encoder_hidden_states": text(),
        },
    ),
    "HeliosTransformer3DModel": Tiny(
        {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        lambda: even(
            timestep=torch.full((B,), 500),
            indices_hidden_states=torch.arange(6, 9).expand(B, -1),
            indices_latents_history_short=torch.arange(4, 6).expand(B, -1),
            indices_latents_history_mid=torch.arange(2, 4).expand(B, -1),
            indices_latents_history_long=torch.arange(2).expand(B, -1),
            latents_history_short=latents(frames=2, height=10, width=14),
            latents_history_mid=latents(frames=2, height=10, width=14),
            latents_history_long=latents(frames=2, height=10, width=14),
        ),
        before=lambda length: length - 105,
    ),
    "HunyuanVideoTransformer3DModel": Tiny(HUNYUAN, hunyuan),
    "HunyuanVideoTransformer3DModel/image to video": Tiny(
        {**HUNYUAN, "image_condition_type": "token_replace"}, hunyuan
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {
            **{k: v for k, v in HUNYUAN.items() if k not in _NOT_IN_15},
            "num_layers": 2,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "task_type": "i2v",
        },
        lambda: plain(
            encoder_attention_mask=padding(6, 3),
            encoder_hidden_states_2=text(4, 8),
            encoder_attention_mask_2=padding(2, 4, length=4),
            image_embeds=torch.randn(B, 3, 8),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        framepack,
        before=lambda length: length - 105 - 8,
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {**{k: v for k, v in HUNYUAN.items() if k not in _NOT_IN_MOTIF}},
        lambda: plain(encoder_attention_mask=padding(6, 3)),
    ),
    "CogVideoXTransformer3DModel": Tiny(COGVIDEOX, cogvideox, before=lambda length: 6),
    "CogVideoXTransformer3DModel/1.5": Tiny(
        {**COGVIDEOX, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
        lambda: cogvideox(frames=6),
        before=lambda length: 6,
    ),
    "ConsisIDTransformer3DModel": Tiny(COGVIDEOX, cogvideox, before=lambda length: 6),
    "EasyAnimateTransformer3DModel": Tiny(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "time_embed_dim": 2,
            "text_embed_dim": 16,
            "num_layers": 2,
            "mmdit_layers": 1,
            "sample_width": 14,
            "sample_height": 10,
        },
        plain,
        before=lambda length: 6,
    ),
    "LTXVideoTransformer3DModel": Tiny(LTX, ltx),
    "LTXVideoTransformer3DModel/conditions": Tiny(
        LTX,
        lambda: ltx(
            hidden_states=torch.randn(B, 105 + 35 + 6, 4),
            num_frames=None,
            height=None,
            width=None,
            video_coords=coordinates((2, 1, 6, 0.0), (1, 5, 7, 9.0), (3, 5, 7, 0.0))[:, :, 6:],
        ),
        before=lambda length: 41,
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 2,
            "audio_out_channels": 2,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        },
        ltx2,
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        {
            **HEADS,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 24,
            "in_channels": 4,
            "audio_in_channels": 3,
            "text_dim": 16,
            "freq_dim": 32,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        packed,
        before=lambda length: length - 105,
    ),
    "MochiTransformer3DModel": Tiny(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 6,
        },
        lambda: even(encoder_attention_mask=padding(6, 3).bool()),
    ),
    "AllegroTransformer3DModel": Tiny(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_height": 10,
            "sample_width": 14,
            "sample_frames": 3,
            "caption_channels": 16,
        },
        even,
    ),
    "CosmosTransformer3DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
        },
        cosmos,
    ),
    "Cosmos3OmniTransformer": Tiny(
        {
            "hidden_size": 24,
            "head_dim": 12,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "vocab_size": 8,
            "rope_axes_dim": (2, 2, 2),
            "sound_gen": True,
            "sound_dim": 3,
        },
        cosmos3,
        before=lambda length: 6,
        silent=6,
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        kandinsky5,
        tolerance=2e-3,
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
            "visual_cond": False,
            "in_audio_dim": 3,
            "out_audio_dim": 3,
        },
        kandinsky6,
        tolerance=2e-3,
    ),
}
TINY |= PICTURES
# classes that this release of diffusers does not have yet
for _key in [key for key in TINY if not hasattr(diffusers, key.partition("/")[0])]:
    del TINY[_key]
