"""Away from what the model makes where some of its heads see less of the video.

Source: Ahn et al., "Fine-Grained Perturbation Guidance via Attention Head Selection",
arXiv:2506.10978: heads that differ in what they are for (shape, style, light) are perturbed one by
one, their maps going part of the way to the identity. With whole layers, and all of the way, it is
perturbed-attention guidance (Ahn et al., arXiv:2403.17377). The map itself is never formed: as it
goes to the identity, the output goes to the values. In a sequence with text, tokens of the video
are perturbed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidattn.guidance import Guide, GuidedCall


@dataclass(frozen=True)
class SoftPAG(Guide):
    """Away from a pass in which chosen heads see less of the video than they do.

    Args:
        heads: which, as LAYER:HEAD, or LAYER for all of a layer; none: all of the middle layer.
            ``search_heads`` finds those that help most.
        scale: how far away: c becomes c + scale * (c - p), for the output c of a pass with the
            prompt and p of the one that is perturbed. The guidance of the pipeline follows.
        strength: how far their attention goes to the identity, from 0 to 1.
    """

    heads: tuple[str, ...] | None = None
    scale: float = 0.5
    strength: float = 1.0

    has_second_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength!r}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale!r}")
        if self.heads is not None:
            if not self.heads or isinstance(self.heads, str):
                raise ValueError(f"heads must be such as ('2:0', '3'), got {self.heads!r}")
            for text in self.heads:
                _read(text)

    def check(self, num_layers: int, num_heads: int | None) -> None:
        """Refuse heads that the model has not.

        Raises:
            ValueError: as said.
        """
        for text in self.heads or ():
            layer, head = _read(text)
            if layer >= num_layers or _is_beyond(head, num_heads):
                raise ValueError(
                    f"heads has {text!r}, and the model has layers 0 to {num_layers - 1}"
                    + ("" if num_heads is None else f" of {num_heads} heads")
                )

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """The output of a pass, moved away from that of the perturbed one."""
        return first + self.scale * (first - second)

    def attend(self, call: GuidedCall) -> Tensor:
        """(B, H, S, D) attention, of the chosen heads partly the values."""
        out = call.sparse(call.q, call.k, call.v)
        heads = self._heads_of(call)
        if not heads:
            return out
        at = torch.tensor(heads, device=out.device)
        groups = call.q.shape[1] // call.v.shape[1]
        values, seen = call.video(call.v)[:, at // groups], call.video(out)[:, at]
        out = out.clone()
        call.video(out)[:, at] = torch.lerp(seen, values.to(seen.dtype), self.strength)
        return out

    def _heads_of(self, call: GuidedCall) -> list[int]:
        everything = list(range(call.num_heads))
        if self.heads is None:
            return everything if call.layer == call.num_layers // 2 else []
        found = [head for layer, head in map(_read, self.heads) if layer == call.layer]
        if any(_is_beyond(head, call.num_heads) for head in found):
            raise ValueError(f"layer {call.layer} has {call.num_heads} heads, got {self.heads}")
        return everything if None in found else sorted({x for x in found if x is not None})


def _read(text: str) -> tuple[int, int | None]:
    """The layer and the head of "LAYER:HEAD", None for all heads of "LAYER".

    Raises:
        ValueError: something else.
    """
    layer, colon, head = str(text).partition(":")
    if not layer.isdecimal() or colon and not head.isdecimal():
        raise ValueError(f"heads must be LAYER:HEAD or LAYER each, as 2:0, got {text!r}")
    return int(layer), int(head) if colon else None


def _is_beyond(head: int | None, num_heads: int | None) -> bool:
    """Whether there is no such head; None for all of them, and for a number that is not known."""
    return head is not None and num_heads is not None and head >= num_heads
