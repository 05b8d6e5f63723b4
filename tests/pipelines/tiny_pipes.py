"""Whole pipelines with random weights, small enough for a test."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from transformers import T5Config, T5EncoderModel

from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import WAN

# wide enough for blocks of 32 weights
WAN_16 = {**WAN, "in_channels": 16, "out_channels": 16, "attention_head_dim": 16, "ffn_dim": 32}
# 17 frames of 80 x 112 pixels: a grid of 5 x 5 x 7
WAN_CALL = {"height": 80, "width": 112, "num_frames": 17, "num_inference_steps": 4}


class Tokenizer:
    """Turns letters into numbers."""

    model_max_length = 8

    def __call__(self, prompts, max_length=model_max_length, **options):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            letters = torch.tensor([ord(letter) % 30 + 1 for letter in prompt[:max_length]] + [1])
            row[: letters.numel()] = letters[:max_length]
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


def wan(two_experts: bool = False) -> WanPipeline:
    """Wan with everything in it, or with the two experts of 2.2."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers = [WanTransformer3DModel(**WAN_16).eval() for _ in range(1 + two_experts)]
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        text_encoder = T5EncoderModel(config).eval()
    pipe = WanPipeline(
        tokenizer=Tokenizer(),
        text_encoder=text_encoder,
        transformer=transformers[0],
        transformer_2=transformers[1] if two_experts else None,
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=0.875 if two_experts else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_wan(pipe: WanPipeline, **changes: object) -> torch.Tensor:
    """The latents of a clip."""
    options = {"max_sequence_length": 8, "output_type": "latent", **WAN_CALL, **changes}
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", negative_prompt="bad", generator=generator, **options).frames


def cogvideox() -> CogVideoXPipeline:
    """CogVideoX without a text encoder and with nothing that decodes."""
    pipe = CogVideoXPipeline(
        None, None, None, build("CogVideoXTransformer3DModel"), CogVideoXDDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mochi() -> MochiPipeline:
    """Mochi without a text encoder and with nothing that decodes."""
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("MochiTransformer3DModel"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_joint(pipe: object, **changes: object) -> torch.Tensor:
    """The latents of a clip of a pipeline that takes prompts as embeddings."""
    case = TINY[f"{type(pipe.transformer).__name__}"]
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 1, 6, 16, generator=generator)
    options = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    if isinstance(pipe, MochiPipeline):
        mask = torch.ones(1, 6, dtype=torch.bool)
        options |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}
        options["negative_prompt_attention_mask"][:, 2:] = False
    size = {"height": 80, "width": 112, "num_frames": 9 if case else 0}
    if isinstance(pipe, MochiPipeline):
        size["num_frames"] = 13
    options |= {**size, "num_inference_steps": 4, "generator": generator, "output_type": "latent"}
    return pipe(**{**options, **changes}).frames
