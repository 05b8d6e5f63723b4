"""More motion and a steadier shape, from the attention across frames.

Source: Bu et al., "ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a
Training-free Way", arXiv:2410.06241 (BroadWay in its first version), for models with attention
across time alone. Both of its parts are told here of attention over the whole video:

- Fourier-based motion enhancement multiplies the high frequencies of the map along the frames that
  are read. A filter of the map's rows gives the same as that filter of the values, which lets any
  pattern do. The factor is as given; the authors' also keeps the energy of the map, which is never
  formed here.
- Temporal self-guidance brings the maps of later layers nearer to that of an earlier one. The
  values of a later layer are attended to a second time, with the queries and keys of the earlier
  one and everything to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vidattn.guidance import Guide, GuidedCall


@dataclass(frozen=True)
class BroadWay(Guide):
    """More motion and a steadier shape, in the steps that settle both.

    Args:
        motion: factor of what changes fast from frame to frame, from 1 for none.
        low: the part of the frequencies, from 0 to 1, that are slow and stay as they are.
        consistency: how far the maps of later layers go to that of ``anchor``, from 0 to 1.
        anchor: the layer whose map it is; none: that after a quarter of them.
        steps: the part of the denoising steps in which it guides, from 0 to 1.
    """

    motion: float = 1.5
    low: float = 0.25
    consistency: float = 0.0
    anchor: int | None = None
    steps: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.motion >= 1:
            raise ValueError(f"motion must be at least 1, got {self.motion!r}")
        if not (0 <= self.low < 1 and 0 <= self.consistency <= 1):
            raise ValueError(
                f"low must be from 0 to below 1 and consistency from 0 to 1, got low={self.low!r} "
                f"and consistency={self.consistency!r}"
            )

    def check(self, num_layers: int, num_heads: int | None) -> None:
        """Refuse an anchor that is no layer with others behind it.

        Raises:
            ValueError: as said.
        """
        if self.consistency and not 0 <= self._anchor(num_layers) < num_layers - 1:
            raise ValueError(
                f"anchor is layer {self._anchor(num_layers)}, and those with another behind them "
                f"are 0 to {num_layers - 2}"
            )

    def attend(self, call: GuidedCall) -> Tensor:
        """(B, H, S, D) attention with both parts."""
        v = self.enhanced(call) if self.motion > 1 else call.v
        out = call.sparse(call.q, call.k, v)
        anchor = self._anchor(call.num_layers)
        if not self.consistency or call.layer < anchor:
            return out
        if call.layer == anchor:
            call.memory["anchor"] = call.q, call.k
            return out
        if "anchor" not in call.memory:
            raise ValueError(
                f"layer {call.layer} runs before layer {anchor}: give another anchor, or "
                "consistency=0"
            )
        q, k = cast(tuple[Tensor, Tensor], call.memory["anchor"])
        if q.shape != call.q.shape or k.shape != call.k.shape:
            raise ValueError(
                f"layer {call.layer} has queries of {tuple(call.q.shape)}, and the anchor "
                f"{tuple(q.shape)}: give an anchor that is like the layers behind it, or "
                "consistency=0"
            )
        return torch.lerp(out, call.dense(q, k, v), self.consistency)

    def enhanced(self, call: GuidedCall) -> Tensor:
        """(B, K, S, D) values, what changes fast along the frames being multiplied."""
        grid = call.grid
        video = call.video(call.v).unflatten(-2, (grid.t, grid.h * grid.w))
        spectrum = torch.fft.rfft(video.float(), dim=2)
        share = torch.fft.rfftfreq(grid.t, 0.5, device=video.device)
        spectrum = spectrum * (share > self.low)[:, None, None]
        fast = torch.fft.irfft(spectrum, n=grid.t, dim=2)
        v = call.v.clone()
        call.video(v).add_(((self.motion - 1) * fast).to(v.dtype).flatten(2, 3))
        return v

    def _anchor(self, num_layers: int) -> int:
        return num_layers // 4 if self.anchor is None else self.anchor
