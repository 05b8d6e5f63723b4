"""AnnCA: a chunk reads only the words of the prompt that some of its queries are near to.

After Fast Autoregressive Video Diffusion (2602.01801), of which there is no public code. Most words
of a long prompt are not in the picture at any moment. Which are is seen, head by head, on some
queries of the chunk, spread over it: the words with most of their attention are read by all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from vidattn.planning.method import check_share
from vidattn.streaming.cache import Part
from vidattn.streaming.policy import TextPolicy


@dataclass(frozen=True)
class AnnCA(TextPolicy):
    """Of the words of a prompt, those with most of the attention of a head are read.

    Args:
        keep: share of the words that are read.
        queries: of a chunk, that are asked; the more, the surer that no word is missed.
    """

    keep: float = 0.5
    queries: int = 512

    def __post_init__(self):
        check_share("keep", self.keep)
        self.at_least("queries", 1)

    def choose(self, q: Tensor, part: Part, scale: float) -> Part:
        """The words that a chunk reads."""
        num_words = part.k.shape[2]
        num_kept = math.ceil(self.keep * num_words)
        if num_kept == num_words:
            return part
        some = q[:, :, :: max(1, q.shape[2] // self.queries)]
        some = some.unflatten(1, (part.k.shape[1], -1)).flatten(2, 3)
        scores = some.float() @ part.k.float().mT * scale
        if part.weight is not None:
            scores = scores + part.weight.log()[:, :, None]
        kept = scores.softmax(-1).mean(2).topk(num_kept).indices
        rows = kept[..., None].expand(-1, -1, -1, part.k.shape[-1])
        weight = part.weight
        if weight is not None:
            weight = weight.expand(kept.shape[0], kept.shape[1], -1).gather(2, kept)
        return replace(part, k=part.k.gather(2, rows), v=part.v.gather(2, rows), weight=weight)
