"""What a guide is: options, and what it makes of each attention call of a model.

A guide is one file in vidattn/guides with a frozen dataclass; nothing else has to know about it.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N tokens of the video in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vidattn.grid import Grid


@dataclass(frozen=True, eq=False)
class GuidedCall:
    """One attention call of one layer, in a pass that is guided.

    Args:
        layer: number of the layer in its transformer.
        num_layers: how many there are.
        num_heads: H.
        grid: where the video stands among the tokens.
        q: (B, H, S, D), in the order of ``grid``; text tokens without queries have zeros.
        k: (B, K, S, D), likewise.
        v: likewise.
        sparse: attention of the layer as it is patched: (B, H, S, D) of q, k and v.
        dense: attention to everything, likewise.
        memory: what a guide keeps from one layer of a pass to the next.
    """

    layer: int
    num_layers: int
    num_heads: int
    grid: Grid
    q: Tensor
    k: Tensor
    v: Tensor
    sparse: Callable[[Tensor, Tensor, Tensor], Tensor]
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    memory: dict[str, object]

    def video(self, x: Tensor) -> Tensor:
        """(..., N, D) of the (..., S, D) in the order of the grid, which shares its memory."""
        return x[..., self.grid.video_start : self.grid.video_start + self.grid.num_video_tokens, :]


@dataclass(frozen=True)
class Guide:
    """Options of a guide.

    Args:
        steps: the part of the denoising steps in which it guides, from 0 to 1.
    """

    steps: tuple[float, float] = (0.0, 1.0)

    # whether the transformer runs once more in each step that is guided, with the guide at work in
    # that pass alone, and ``combine`` gives the output
    has_second_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        first, last = self.steps
        if not 0 <= first < last <= 1:
            raise ValueError(
                f"steps must be two parts of the denoising steps, as 0,0.5 for the first half, "
                f"got {self.steps!r}"
            )

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """What a caller may set, by name."""
        return {field.name: field for field in dataclasses.fields(cls)}

    def check(self, num_layers: int, num_heads: int | None) -> None:
        """Refuse a model that the options are not for; ``num_heads`` is None where layers differ.

        Raises:
            ValueError: a layer or head that it has not.
        """

    def is_at_work(self, step: int, num_steps: int) -> bool:
        """Whether it guides a denoising step, from 0."""
        return self.steps[0] * num_steps <= step < self.steps[1] * num_steps

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """The output for those of a pass, and of a second one in which the guide was at work."""
        raise NotImplementedError

    def attend(self, call: GuidedCall) -> Tensor:
        """(B, H, S, D) attention in the order of the grid, guided; calls ``sparse`` once."""
        raise NotImplementedError
