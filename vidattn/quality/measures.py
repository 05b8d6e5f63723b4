"""The figures by which clips are compared with the dense ones, and which of them can be had.

Letters: F frames, H height, W width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vidattn.quality.flow import warp_error
from vidattn.quality.fvd import fvd
from vidattn.quality.likeness import ms_ssim, psnr, ssim
from vidattn.quality.lpips import lpips
from vidattn.quality.weights import has_weights, load_weights
from vidattn.support.registry import unknown

Videos = Sequence[Tensor]


@dataclass(frozen=True)
class Measure:
    """One figure about the clips of a method.

    Args:
        key: its name in reports.
        title: what it is called.
        form: how it is written, in the language of ``format``.
        unit: of what is written.
        compute: from clips and the dense ones in the same order, (F, 3, H, W) in [0, 1] each.
        network: the one whose weights it needs.
        is_slow: whether it takes long beside making the clips, so that it must be asked for.
        is_likeness: whether it compares with the dense clips, which then have none of their own.
        least_px: the smallest side a frame may have.
        least_clips: the fewest clips it takes.
    """

    key: str
    title: str
    form: str
    compute: Callable[[Videos, Videos], float]
    unit: str = ""
    network: str | None = None
    is_slow: bool = False
    is_likeness: bool = True
    least_px: int = 11
    least_clips: int = 1

    @property
    def column(self) -> str:
        """The title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def cell(self, value: float) -> str:
        """A value as tables show it."""
        return self.form.format(value)

    def why_not(self, side_px: int, num_clips: int) -> str | None:
        """What keeps it from being taken, if anything."""
        if side_px < self.least_px:
            return f"needs frames of at least {self.least_px} pixels on each side, got {side_px}"
        if num_clips < self.least_clips:
            return f"needs at least {self.least_clips} clips of a method: give more prompts"
        return None


def mean_of_pairs(measure: Callable[[Tensor, Tensor], float]) -> Callable[[Videos, Videos], float]:
    """The mean over clips of a measure of a clip and its dense one."""
    return lambda clips, dense: statistics.mean(measure(a, b) for a, b in zip(clips, dense))


def _warp_error(clips: Videos, dense: Videos) -> float:
    return statistics.mean(warp_error(clip) for clip in clips)


MEASURES = {
    "psnr": Measure("psnr_db", "PSNR", "{:.2f}", mean_of_pairs(psnr), unit="dB", least_px=1),
    "ssim": Measure("ssim", "SSIM", "{:.4f}", mean_of_pairs(ssim)),
    "ms-ssim": Measure("ms_ssim", "MS-SSIM", "{:.4f}", mean_of_pairs(ms_ssim)),
    "lpips": Measure(
        "lpips", "LPIPS", "{:.4f}", mean_of_pairs(lpips), network="lpips", least_px=32
    ),
    "fvd": Measure("fvd", "FVD", "{:.0f}", fvd, network="i3d", is_slow=True, least_clips=2),
    "warp": Measure(
        "warp_error", "warp error", "{:.2e}", _warp_error, network="raft", is_slow=True,
        is_likeness=False, least_px=128,
    ),
}  # fmt: skip


def choose_measures(names: str | None, *, side_px: int, num_clips: int) -> list[Measure]:
    """The measures of a comma-separated list; by default the fast ones that can be had.

    Args:
        side_px: the smaller side of a frame.
        num_clips: clips of each method.

    Raises:
        ValueError: an unknown name, weights that have not been fetched, or clips that one of those
            named cannot take.
    """
    if names is None:
        return [
            measure
            for measure in MEASURES.values()
            if not measure.is_slow
            and (measure.network is None or has_weights(measure.network))
            and measure.why_not(side_px, num_clips) is None
        ]
    asked = list(MEASURES) if names == "all" else [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
        if (why := MEASURES[name].why_not(side_px, num_clips)) is not None:
            raise ValueError(f"--metrics {name} {why}")
        if (network := MEASURES[name].network) is not None:
            load_weights(network)
    return [MEASURES[name] for name in dict.fromkeys(asked)]
