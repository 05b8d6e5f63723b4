"""What the layers of the bundled model attend to while it makes a clip."""

from functools import lru_cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from vidattn.pipelines.hooks.watch import Sight, watching

BUNDLE = Path(__file__).parents[1] / "assets" / "tiny-t2v"


@lru_cache(maxsize=1)
def recorded() -> tuple[Sight, ...]:
    """Every layer in the second of two steps: 4 heads, 9x16x16 tokens, half of them noise."""
    pipe = DiffusionPipeline.from_pretrained(BUNDLE)
    pipe.set_progress_bar_config(disable=True)
    seen: list[Sight] = []
    with watching(pipe, seen.append):
        pipe(
            "a red bag moving left over a dark background",
            height=128, width=128, num_frames=33, num_inference_steps=2, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    return tuple(sight for sight in seen if sight.step == 1)
