"""Transformers by name: their token grids, and the work they do beside self-attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml

from vidattn.support.registry import unknown
from vidattn.support.resources import resource

if TYPE_CHECKING:
    from vidattn.grid import Grid, Size


@dataclass(frozen=True)
class VideoModel:
    """One transformer; the fields are explained in configs/video_models.yaml."""

    name: str
    source: str
    heads: int
    head_dim: int
    layers: int
    patch: Size
    projections: int
    mlp: tuple[int, int]
    steps: int
    passes: int
    size: Size
    text: int = 0
    text_first: bool = False
    cross_tokens: int = 0
    experts: int = 1

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.heads * self.head_dim

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """The token grid of a video of so many frames and pixels.

        Raises:
            ValueError: a size that the model does not cut into whole tokens, or several frames of
                one that makes pictures.
        """
        # brings in PyTorch, which those who ask for a name only should not wait for
        from vidattn.grid import Grid

        pt, ph, pw = self.patch
        if self.size[0] == 1 and num_frames != 1:
            raise ValueError(f"{self.name} makes pictures, of 1 frame, got {num_frames} frames")
        if num_frames < 1 or (num_frames - 1) % pt or height % ph or width % pw:
            raise ValueError(
                f"{self.name} takes {pt}n + 1 frames and multiples of {ph} x {pw} pixels, "
                f"got {num_frames}x{height}x{width}"
            )
        frames = (num_frames - 1) // pt + 1
        return Grid(frames, height // ph, width // pw, self.text, self.text_first)

    def linear_flops(self, grid: Grid) -> float:
        """Floating-point operations of one layer's matrices on the video tokens."""
        matrices, mlp_width = self.mlp
        weights = self.projections * self.dim**2 + matrices * self.dim * mlp_width
        return 2.0 * grid.num_video_tokens * weights

    def cross_flops(self, grid: Grid) -> float:
        """Floating-point operations of one layer's cross attention."""
        return 4.0 * grid.num_video_tokens * self.cross_tokens * self.dim


@lru_cache
def _models() -> dict[str, VideoModel]:
    text = resource("configs/video_models.yaml").read_text(encoding="utf-8")
    models = {}
    for name, entry in yaml.safe_load(text).items():
        words: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in entry.items()
        }
        models[name] = VideoModel(name=name, **words)
    return models


def list_video_models() -> list[str]:
    """Names of the models whose sizes are known."""
    return list(_models())


def find_video_model(name: str) -> VideoModel:
    """A model by name.

    Raises:
        ValueError: no such model; the nearest names are listed.

    >>> find_video_model("wan2.1-14b").grid(81, 720, 1280).size
    (21, 45, 80)
    """
    if name not in _models():
        raise unknown("model", name, list_video_models())
    return _models()[name]
