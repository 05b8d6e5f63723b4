"""Clips encoded once: the transformer trains on these files and never waits for the VAE.

n clips, C latent channels; latents are (n, C, t, h, w), every leading part of t being itself
the encoding of a shorter clip, since the encoder is causal.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from t2v.data import Clips, Scene
from t2v.precision import fast_products
from t2v.team import Team
from t2v.vae import encode_moments, normalise


def _file(work: Path, size: list[int], team: Team) -> Path:
    name = "x".join(map(str, size))
    return work / f"latents_{name}_{team.rank}_of_{team.size}.safetensors"


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan, clips: Clips, kinds: list[dict], work: Path, team: Team
) -> None:
    """Encode this worker's share of `count` clips of each (frames, height, width) `size`."""
    number = {scene: i for i, scene in enumerate(clips.scenes)}
    for order, kind in enumerate(kinds):
        size, path = tuple(kind["size"]), _file(work, kind["size"], team)
        if path.exists():
            continue
        latents, scenes = [], []
        mine = range(team.rank, kind["count"], team.size)
        bar = team.bar(0, len(mine), f"latents {size}")
        for index in mine:
            clip, scene = clips.sample((order + 2) * 10**7 + index, size)
            with fast_products():
                mean = encode_moments(vae, clip[None]).chunk(2, dim=1)[0]
            latents.append(normalise(vae, mean[0].float()).half())
            scenes.append(number[scene])
            bar.update()
        bar.close()
        partial = path.with_suffix(".partial")
        save_file({"latents": torch.stack(latents), "scenes": torch.tensor(scenes)}, partial)
        partial.replace(path)


class LatentPool:
    """This worker's encoded clips of one size."""

    def __init__(self, clips: Clips, size: list[int], work: Path, team: Team) -> None:
        path = _file(work, size, team)
        if not path.exists():
            raise ValueError(f"{path} is missing; list size {size} under flow.clips in the config")
        tensors = load_file(path)
        self.latents, self.scenes = tensors["latents"], tensors["scenes"]
        self.names = clips.scenes

    def draw(
        self, picks: list[int], frames: int, window: int | None = None
    ) -> tuple[torch.Tensor, list[Scene]]:
        """The first `frames` latent frames of the picked clips as (B, C, frames, h, w).

        A `window` cuts as many rows and columns, at a place that the pick settles.
        """
        chosen = [p % len(self.latents) for p in picks]
        latents = self.latents[chosen, :, :frames].float()
        if window is not None:
            room = latents.shape[-1] - window + 1
            places = [divmod(p // len(self.latents) % room**2, room) for p in picks]
            cuts = [x[..., r : r + window, c : c + window] for x, (r, c) in zip(latents, places)]
            latents = torch.stack(cuts)
        return latents, [self.names[self.scenes[p]] for p in chosen]
