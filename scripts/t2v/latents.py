"""Clips encoded once: the transformer trains on these files and never waits for the VAE.

n clips, C latent channels; latents are (n, C, t, h, w), every leading part of t being itself
the encoding of a shorter clip, since the encoder is causal.
"""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from t2v.checkpoint import read_fact, write_tensors
from t2v.precision import fast_products
from t2v.team import Team
from t2v.vae import encode_moments, normalise

# Clips in a file: what is lost when encoding is cut short.
SHARD = 250


def _files(work: Path, kind: dict, team: Team) -> dict[Path, range]:
    """This worker's files for clips of one size, with the places of their clips among all."""
    name = "x".join(map(str, kind["size"]))
    starts = range(team.rank * SHARD, kind["count"], team.size * SHARD)
    if not starts:
        least = (team.size - 1) * SHARD + 1
        raise ValueError(
            f"{kind['count']} clips of {name} leave some of {team.size} processes none, in files "
            f"of {SHARD}: ask for {least} at least"
        )
    return {
        work / f"latents_{name}_{start}.safetensors": range(
            start, min(start + SHARD, kind["count"])
        )
        for start in starts
    }


def _first_number(size: list[int]) -> int:
    """The number of the first clip of a size; no other use of clips comes near it."""
    frames, height, width = size
    return 10**9 + ((frames * 1000 + height) * 1000 + width) * 10**6


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _source(vae: AutoencoderKLWan) -> str:
    """A hash of what encodes: the decoder may change, the latents stay."""
    states = (vae.encoder.state_dict(), vae.quant_conv.state_dict())
    weights = [t.contiguous().numpy().tobytes() for state in states for t in state.values()]
    statistics = [str(vae.config.latents_mean), str(vae.config.latents_std)]
    return _digest(*weights, *(s.encode() for s in statistics))


def _shown(scenes: list) -> str:
    """A hash of what clips show."""
    return _digest(*(scene.caption.encode() for scene in scenes))


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips, kind: dict, work: Path, team: Team) -> None:
    """Encode this worker's share of the `count` clips of a (frames, height, width) `size`.

    Raises:
        ValueError: a file comes from another encoder or cannot be written.
    """
    source, size, first = _source(vae), tuple(kind["size"]), _first_number(kind["size"])
    files = _files(work, kind, team)
    bar = team.bar(0, sum(map(len, files.values())), f"latents {size}")
    for path, places in files.items():
        if path.exists() and (found := read_fact(path, "vae")) != source:
            raise ValueError(
                f"{path} was written by the encoder {found}, not {source}; delete the "
                "files latents_* there, or choose another work folder"
            )
        if path.exists() and len(places) == read_fact(path, "count"):
            bar.update(len(places))
            continue
        latents, scenes = [], []
        for place in places:
            clip, scene = clips.sample(first + place, size)
            with fast_products():
                mean = encode_moments(vae, clip[None]).chunk(2, dim=1)[0]
            latents.append(normalise(vae, mean[0].float()).half())
            scenes.append(scene)
            bar.update()
        facts = {"vae": source, "count": len(places), "scenes": _shown(scenes)}
        write_tensors(path, {"latents": torch.stack(latents)}, **facts)
    bar.close()


class LatentPool:
    """This worker's encoded clips of one size.

    Raises:
        ValueError: a file is missing, or its clips show something else by now.
    """

    def __init__(self, clips, kind: dict, work: Path, team: Team) -> None:
        first, parts, self.scenes = _first_number(kind["size"]), [], []
        for path, places in _files(work, kind, team).items():
            if not path.exists():
                raise ValueError(f"{path} is missing; train without cutting the encoding short")
            parts.append(load_file(path)["latents"])
            scenes = [clips.scene(first + place, tuple(kind["size"])) for place in places]
            if _shown(scenes) != read_fact(path, "scenes"):
                raise ValueError(f"{path} holds clips of other scenes; delete the files latents_*")
            self.scenes += scenes
        self.latents = torch.cat(parts)

    def draw(
        self, picks: list[int], frames: int, window: int | None = None
    ) -> tuple[torch.Tensor, list]:
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
        return latents, [self.scenes[p] for p in chosen]


class Pools:
    """The encoded clips of every size, encoded when they are first asked for.

    Args:
        kinds: `size` and `count` of each.
    """

    def __init__(self, vae: AutoencoderKLWan, clips, kinds: list[dict], work: Path, team: Team):
        self.vae, self.clips, self.work, self.team = vae, clips, work, team
        self._kinds = {tuple(kind["size"]): kind for kind in kinds}
        self._pools: dict[tuple[int, ...], LatentPool] = {}

    def of(self, size: list[int]) -> LatentPool:
        """This worker's clips of a size."""
        size = tuple(size)
        if size not in self._pools:
            kind = self._kinds[size]
            encode_clips(self.vae, self.clips, kind, self.work, self.team)
            self._pools[size] = LatentPool(self.clips, kind, self.work, self.team)
        return self._pools[size]
