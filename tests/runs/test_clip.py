"""A pipeline that makes pictures, run as the commands run those of videos."""

import diffusers
import imageio.v3 as imageio
import pytest
import torch

from tests.pipelines.tiny import build
from vidattn.choice import Choice
from vidattn.runs.clip import Guards, make_clip
from vidattn.runs.request import Request, resolve
from vidattn.runs.video import write_video


@pytest.fixture
def pipe():
    """Flux with a VAE, and embeddings in place of text encoders."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=4, latent_channels=1, shift_factor=0.0
    )
    flux = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=build("FluxTransformer2DModel"),
    )
    words = torch.randn(1, 6, 16), torch.randn(1, 8), torch.zeros(6, 3)
    flux.encode_prompt = lambda **options: words
    return flux


def test_a_picture_is_a_clip_of_one_frame(pipe, tmp_path):
    request = resolve(pipe, Request("a dog", height=22, width=26, num_inference_steps=3))
    clips = [
        make_clip(pipe, request, Choice(name), Guards(dense_layers=0, dense_steps=0))
        for name in ("dense", "msw_msa")
    ]
    assert [tuple(clip.frames.shape) for clip in clips] == [(1, 3, 22, 26)] * 2
    assert not torch.equal(clips[0].frames, clips[1].frames)
    assert len(clips[1].steps_ms) == 3 and clips[1].report.num_sparse == 6
    write_video(tmp_path / "dog.png", clips[1].frames, fps=8)
    written = torch.from_numpy(imageio.imread(tmp_path / "dog.png")).permute(2, 0, 1) / 255
    assert (written - clips[1].frames[0]).abs().max() <= 0.5 / 255 + 1e-6


def test_a_png_holds_one_frame(tmp_path):
    with pytest.raises(ValueError, match="a png holds one frame, got 2"):
        write_video(tmp_path / "two.png", torch.zeros(2, 3, 8, 8), fps=8)
