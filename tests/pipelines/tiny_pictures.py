"""Small transformers that make pictures, and what to call them with; ``tiny`` adds them to its own.

Their grid is one frame of 11 rows and 13 columns where the model can do that.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.pipelines.tiny_inputs import B, Tiny, coordinates, padding, text, timestep

SIZE = (1, 11, 13)
NUM = 11 * 13
# a reference picture of 5 x 7 behind it
REFERENCE = 5 * 7
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def square() -> torch.Tensor:
    """(B, C, H, W) latents, in patches of two."""
    return torch.randn(B, 4, 2 * 11, 2 * 13)


def whole(**more: object) -> dict[str, object]:
    """For models that patch the latents themselves."""
    given = {"hidden_states": square(), "timestep": timestep(), "encoder_hidden_states": text()}
    return given | more


def positions(num_axes: int = 3, *, reference: bool = False) -> torch.Tensor:
    """(S, axes) of the picture, and of a reference behind it."""
    stretches = [(*SIZE, 0.0), (1, 5, 7, 8.0)][: 1 + reference]
    ids = coordinates(*stretches)[0].T / torch.tensor([8, 32, 32])
    return torch.nn.functional.pad(ids, (0, num_axes - 3))


def packed(num_axes: int = 3, *, reference: bool = False, **more: object) -> dict[str, object]:
    """For models that are given patches with their positions."""
    return {
        "hidden_states": torch.randn(B, NUM + reference * REFERENCE, 4),
        "timestep": timestep() / 1000,
        "encoder_hidden_states": text(),
        "img_ids": positions(num_axes, reference=reference),
        "txt_ids": torch.zeros(6, num_axes),
        **more,
    }


def joint_mask() -> torch.Tensor:
    """(B, S) bool, six and three tokens of text, and the picture."""
    return torch.nn.functional.pad(padding(6, 3).bool(), (0, NUM), value=True)


def chroma(dtype: torch.dtype) -> dict[str, object]:
    return packed(attention_mask=joint_mask().to(dtype))


def pooled() -> torch.Tensor:
    return torch.randn(B, 8)


FLUX_LIKE = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
FLUX = {**FLUX_LIKE, "pooled_projection_dim": 8}
CHROMA = {
    **FLUX_LIKE,
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 8,
    "approximator_layers": 1,
}
FLUX2 = {**FLUX_LIKE, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False}
SD3 = {
    **HEADS,
    "sample_size": 26,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
}
QWEN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 1,
    "num_layers": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
QWEN21 = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "context_in_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


def qwen(*shapes: tuple[int, int, int], **more: object) -> dict[str, object]:
    length = sum(t * h * w for t, h, w in shapes)
    return {
        "hidden_states": torch.randn(B, length, 4),
        "timestep": timestep() / 1000,
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": padding(6, 3).bool(),
        "img_shapes": [list(shapes)] * B,
        **more,
    }


def qwen21(*, reference: bool = False) -> dict[str, object]:
    """Six tokens of text, of which slots of a reference of 4 x 6 interrupt the first four."""
    shapes = [(1, 4, 6)] * reference + [(1, 8, 12)]
    slots = [False] * 4 + [True] * (6 * reference) + [False] * 2 + [True] * 24
    num_text = len(slots) - 24
    return {
        "hidden_states": torch.randn(B, sum(h * w for _, h, w in shapes), 4),
        "timestep": torch.full((1,), 0.5),
        "encoder_hidden_states": text(num_text),
        "encoder_hidden_states_mask": padding(num_text, num_text - 1, length=num_text).bool(),
        "img_shapes": [shapes] * B,
        "img_mask": torch.tensor([slots] * B),
    }


def hidream(latents: torch.Tensor) -> dict[str, object]:
    return {
        "hidden_states": latents,
        "timesteps": timestep(),
        "encoder_hidden_states_t5": text(3),
        "encoder_hidden_states_llama3": torch.randn(2, B, 4, 16),
        "pooled_embeds": pooled(),
    }


HIDREAM = {
    **HEADS,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "caption_channels": [16, 16],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": (2, 2, 4),
    "max_resolution": (40, 42),
    "llama_layers": [0, 1],
}
COGVIEW = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def cogview(**more: object) -> dict[str, object]:
    corners = {"target_size": torch.full((B, 2), 300.0), "crop_coords": torch.zeros(B, 2)}
    return whole(**corners, **more)


JOYIMAGE = {
    "in_channels": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [2, 2, 4],
}


def ideogram4() -> dict[str, object]:
    """Text of six and three tokens, padded in front."""
    length, numbers = 6 + NUM, torch.arange(6 + NUM)
    is_text = (numbers < 6) & (numbers >= torch.tensor([[0], [3]]))
    places = torch.cat([torch.arange(6.0)[:, None].expand(-1, 3), positions() + 100])
    return {
        "hidden_states": torch.randn(B, length, 4),
        "timestep": timestep() / 1000,
        "encoder_hidden_states": text(length),
        "position_ids": places.long().expand(B, -1, -1),
        "segment_ids": torch.where(is_text | (numbers >= 6), 1, -1),
        "indicator": torch.where(numbers >= 6, 2, torch.where(is_text, 3, 0)),
    }


def omnigen() -> dict[str, object]:
    """Text of six and three tokens, padded in front, each reading what is before it."""
    length = 7 + NUM
    mask = torch.ones(length, length).tril()
    mask[7:] = 1
    mask = mask.repeat(B, 1, 1)
    mask[1, :, :3] = 0
    return {
        "hidden_states": square(),
        "timestep": timestep() / 1000,
        "input_ids": torch.randint(1, 8, (B, 6)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(B, 1),
    }


def six(length: int) -> int:
    return 6


PICTURES: dict[str, Tiny] = {
    "FluxTransformer2DModel": Tiny(FLUX, lambda: packed(pooled_projections=pooled()), before=six),
    "FluxTransformer2DModel/reference": Tiny(
        FLUX, lambda: packed(reference=True, pooled_projections=pooled()), before=six
    ),
    "ChromaTransformer2DModel": Tiny(CHROMA, lambda: chroma(torch.bool), before=six),
    # what its pipeline gives: a weight of e for words, as of 1 for padding
    "ChromaTransformer2DModel/weights": Tiny(CHROMA, lambda: chroma(torch.float32), before=six),
    "LongCatImageTransformer2DModel": Tiny(FLUX, packed, before=six),
    "OvisImageTransformer2DModel": Tiny({**FLUX_LIKE, "out_channels": 4}, packed, before=six),
    "BriaTransformer2DModel": Tiny(FLUX, packed, before=six),
    "BriaFiboTransformer2DModel": Tiny(
        {**FLUX, "text_encoder_dim": 8},
        lambda: packed(
            text_encoder_layers=[text(6, 8), text(6, 8)],
            joint_attention_kwargs={"attention_mask": joint_mask()[:, None, None]},
        ),
        before=six,
    ),
    "Flux2Transformer2DModel": Tiny(FLUX2, lambda: packed(4), before=six),
    "Flux2Transformer2DModel/reference": Tiny(FLUX2, lambda: packed(4, reference=True), before=six),
    "Flux3Transformer2DModel": Tiny(
        {
            **{k: v for k, v in FLUX2.items() if k != "guidance_embeds"},
            "cond_in_channels": 4,
        },
        lambda: packed(
            4,
            image_cond_hidden_states=torch.randn(B, REFERENCE, 4),
            image_cond_ids=positions(4, reference=True)[NUM:],
        ),
        # some blocks see the picture alone
        before=lambda length: 6 if length > NUM else 0,
    ),
    "Krea2Transformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": torch.randn(B, NUM, 4),
            "timestep": timestep() / 1000,
            "encoder_hidden_states": torch.randn(B, 6, 2, 16),
            "encoder_attention_mask": padding(6, 3).bool(),
            "position_ids": torch.cat([torch.zeros(6, 3), positions()]),
        },
        before=six,
    ),
    "SD3Transformer2DModel": Tiny(SD3, lambda: whole(pooled_projections=pooled())),
    "SD3Transformer2DModel/3.5": Tiny(
        {**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: whole(pooled_projections=pooled()),
    ),
    "QwenImageTransformer2DModel": Tiny(QWEN, lambda: qwen(SIZE), before=six),
    "QwenImageTransformer2DModel/reference": Tiny(
        {**QWEN, "zero_cond_t": True}, lambda: qwen(SIZE, (1, 5, 7)), before=six
    ),
    "QwenImageTransformer2DModel/layers": Tiny(
        {**QWEN, "use_layer3d_rope": True, "use_additional_t_cond": True},
        lambda: qwen(*[(1, 7, 9)] * 4, additional_t_cond=torch.zeros(B, dtype=torch.long)),
        size=(3, 7, 9),
        before=six,
    ),
    "QwenImage21Transformer2DModel": Tiny(QWEN21, qwen21, size=(1, 8, 12), before=six, silent=6),
    "QwenImage21Transformer2DModel/reference": Tiny(
        QWEN21,
        lambda: qwen21(reference=True),
        size=(1, 8, 12),
        before=lambda length: 30,
        silent=30,
    ),
    "ZImageTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 2, 2],
            "axes_lens": [128, 32, 32],
        },
        lambda: {
            "x": [torch.randn(4, 1, 22, 26) for _ in range(B)],
            "t": torch.full((B,), 0.5),
            "cap_feats": [torch.randn(6, 16), torch.randn(33, 16)],
        },
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (2, 2),
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (4, 4),
        },
        lambda: whole(
            encoder_attention_mask=padding(6, 3),
            encoder_hidden_states_2=text(4, 8),
            encoder_attention_mask_2=padding(2, 4, length=4),
        ),
    ),
    "LuminaNextDiT2DModel": Tiny(
        {
            "sample_size": 26,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "cross_attention_dim": 16,
        },
        lambda: whole(
            encoder_mask=padding(6, 3),
            image_rotary_emb=torch.polar(torch.ones(384, 384, 4), torch.randn(384, 384, 4)),
            cross_attention_kwargs={},
        ),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 16,
        },
        lambda: whole(encoder_attention_mask=padding(5, 5)),
        # a refiner sees the picture alone
        before=lambda length: length - NUM,
    ),
    "PixArtTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 26,
        },
        lambda: whole(
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=padding(6, 3),
        ),
    ),
    "DiTTransformer2DModel": Tiny(
        {**HEADS, "num_layers": 2, "sample_size": 26, "num_embeds_ada_norm": 8},
        lambda: {
            "hidden_states": torch.randn(B, 4, 26, 26),
            "timestep": torch.full((B,), 500),
            "class_labels": torch.arange(B),
        },
        size=(1, 13, 13),
    ),
    "HunyuanDiT2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 6,
            "text_len_t5": 4,
            "sample_size": 26,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: whole(
            text_embedding_mask=padding(6, 3),
            encoder_hidden_states_t5=text(4),
            text_embedding_mask_t5=padding(2, 4, length=4),
            image_rotary_emb=(torch.randn(NUM, 8), torch.randn(NUM, 8)),
        ),
    ),
    "HiDreamImageTransformer2DModel": Tiny(HIDREAM, lambda: hidream(square())),
    "HiDreamImageTransformer2DModel/square": Tiny(
        HIDREAM, lambda: hidream(torch.randn(B, 4, 26, 26)), size=(1, 13, 13)
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {
            **HEADS,
            "sample_size": 26,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
        },
        whole,
        before=lambda length: 14,
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {**COGVIEW, "sample_size": 26},
        lambda: cogview(original_size=torch.full((B, 2), 300.0)),
        before=six,
    ),
    "CogView4Transformer2DModel": Tiny(
        {**COGVIEW, "rope_axes_dim": (32, 32)},
        lambda: cogview(original_size=torch.full((B, 2), 300.0)),
        before=six,
    ),
    "GlmImageTransformer2DModel": Tiny(
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 8},
        lambda: cogview(
            prior_token_id=torch.randint(8, (B, NUM)),
            prior_token_drop=torch.zeros(B, NUM, dtype=torch.bool),
        ),
        before=six,
    ),
    "PRXTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        lambda: whole(attention_mask=padding(6, 3).bool()),
        before=six,
        silent=6,
    ),
    "UNet2DConditionModel": Tiny(
        {
            "sample_size": 26,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        lambda: {
            "sample": torch.randn(B, 4, 11, 13),
            "timestep": timestep(),
            "encoder_hidden_states": text(),
        },
        other_sizes=((1, 6, 7),),
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        JOYIMAGE,
        lambda: whole(hidden_states=torch.randn(B, 2, 4, 1, 22, 26)),
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        JOYIMAGE,
        lambda: whole(
            hidden_states=torch.randn(B, NUM + 40, 4, 1, 2, 2),
            encoder_hidden_states_mask=padding(6, 3),
            shape_list=[[SIZE, (1, 5, 7)], [SIZE, (1, 5, 8)]],
        ),
    ),
    "Ideogram4Transformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "intermediate_size": 16,
            "adaln_dim": 8,
            "llm_features_dim": 16,
            "mrope_section": (2, 1, 1),
        },
        ideogram4,
        before=six,
    ),
    "OmniGenTransformer2DModel": Tiny(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 8,
            "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
            "pos_embed_max_size": 16,
            "time_step_dim": 8,
        },
        omnigen,
        # text, and the time
        before=lambda length: 7,
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "text_in_dim": 16,
            "rope_axes_dim": (2, 2, 4),
        },
        lambda: {
            "hidden_states": square(),
            "timestep": timestep(),
            "text_bth": text(),
            "text_lens": torch.tensor([6, 3]),
        },
    ),
}
PICTURES = {
    key: case if case.size != (3, 5, 7) else replace(case, size=SIZE)
    for key, case in PICTURES.items()
}
