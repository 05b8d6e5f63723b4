"""Real clips and whole pipelines, small enough for a test of the training program."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import imageio.v2 as imageio
import numpy as np
import torch
import yaml
from runs import settings_file
from t2v.flow import build_tokenizer
from transformers import T5Config, T5EncoderModel
from video_training import settings

from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import COGVIDEOX, WAN

ROOT = Path(__file__).parents[2]

BUNDLED = str(ROOT / "assets" / "tiny-t2v")
CAPTION = "a red boot moving right over a dark background"


def write_clip(path: Path, frames: int = 9, height: int = 72, width: int = 96, fps: int = 16):
    """An mp4 in which a square moves two pixels a frame to the right; the frames come back."""
    pictures = np.full((frames, height, width, 3), 40, np.uint8)
    for number, picture in enumerate(pictures):
        left = 2 * number % (width - 20)
        picture[20:40, left : left + 20] = 255, 60, 0
    with imageio.get_writer(
        path, format="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=1
    ) as writer:
        for picture in pictures:
            writer.append_data(picture)
    return pictures


def write_set(folder: Path, count: int = 3, **clip) -> Path:
    """A folder of clips with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_clip(folder / f"clip{number}.mp4", **clip)
        (folder / f"clip{number}.txt").write_text(f"{CAPTION} {number}")
    return folder


def make_settings(source: Path, work: Path, **sections):
    """Settings of a run on the bundled model, some of them changed."""
    return settings_file.read_settings(
        settings.Settings, write_config(source, work, **sections), []
    )


def write_config(source: Path, work: Path, **sections) -> Path:
    """The file of such settings."""
    given = {
        "model": {"name": BUNDLED, "dtype": "float32"},
        "data": {
            "source": str(source),
            "cache": str(work.parent / "cache"),
            "buckets": [[9, 64, 96]],
        },
        "attention": {"method": "neighborhood", "options": {"window": 3}, "dense_steps": 0.0},
        "tune": {"r": 2, "lora_alpha": 4.0},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "run": {
            "output": str(work),
            "steps": 4,
            "precision": "fp32",
            "save_every": 2,
            "log_every": 1,
        }
        | {"checkpointing": False},
    }
    for section, values in sections.items():
        given[section] = given.get(section, {}) | values
    work.mkdir(parents=True, exist_ok=True)
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def _text_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(vocab_size=vocabulary, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _wan(two_experts: bool) -> tuple[type, dict]:
    channels = {"in_channels": 4, "out_channels": 4, "text_dim": 16}
    experts = [diffusers.WanTransformer3DModel(**WAN | channels) for _ in range(1 + two_experts)]
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline, {
        "transformer": experts[0],
        "transformer_2": experts[1] if two_experts else None,
        "vae": vae,
        "scheduler": scheduler,
        "boundary_ratio": 0.875 if two_experts else None,
    }


def wan_from_a_picture() -> tuple[type, dict]:
    """As of Wan 2.2: behind the latents a mask of four channels and a picture."""
    _, parts = _wan(False)
    channels = {"in_channels": 12, "out_channels": 4, "text_dim": 16}
    parts["transformer"] = diffusers.WanTransformer3DModel(**WAN | channels)
    none = dict.fromkeys(("image_encoder", "image_processor"))
    return diffusers.WanImageToVideoPipeline, parts | none


def _cogvideox() -> tuple[type, dict]:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    rotary = {"use_rotary_positional_embeddings": True, "sample_frames": 9}
    return diffusers.CogVideoXPipeline, {
        "transformer": diffusers.CogVideoXTransformer3DModel(**COGVIDEOX | rotary),
        "vae": vae,
        "scheduler": diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0
        ),
    }


def _ltx() -> tuple[type, dict]:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        scaling_factor=0.5,
    )
    vae.latents_mean += torch.tensor([0.1, -0.2, 0.3, 0.0])
    vae.latents_std *= torch.tensor([1.5, 2.0, 0.5, 1.0])
    return diffusers.LTXPipeline, {
        "transformer": build("LTXVideoTransformer3DModel"),
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024
        ),
    }


def _mochi() -> tuple[type, dict]:
    config = TINY["MochiTransformer3DModel"].config | {"in_channels": 12, "out_channels": 12}
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latent_channels=12,
    )
    return diffusers.MochiPipeline, {
        "transformer": diffusers.MochiTransformer3DModel(**config),
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    }


# the frames, height and width of a clip that is as small as each of them goes
PIPELINES = {
    "wan": (lambda: _wan(False), (9, 32, 48)),
    "wan two experts": (lambda: _wan(True), (9, 32, 48)),
    "cogvideox": (_cogvideox, (9, 80, 112)),
    "ltx": (_ltx, (9, 32, 64)),
    "mochi": (_mochi, (7, 32, 48)),
}


def write_pipeline(folder: Path, name: str) -> Path:
    """A whole pipeline with random weights, the same at every call, as a folder.

    Args:
        name: of PIPELINES, or "picture" for one that starts from a picture.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls, parts = (*PIPELINES.get(name, ()), wan_from_a_picture)[0]()
        tokenizer = build_tokenizer(dict.fromkeys(CAPTION.split()), {})
        pipe = cls(tokenizer=tokenizer, text_encoder=_text_encoder(len(tokenizer)), **parts)
    pipe.save_pretrained(folder)
    # the name that every release of transformers knows
    for file in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == cls.__name__
    return folder
