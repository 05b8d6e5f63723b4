"""A step of a video model for scripts/bench_gpu.py: blocks of the shape of Wan 2.1 14B.

Weights are random and the model is written here, so that a machine needs nothing but PyTorch. What
a step of Wan has beside its blocks is small.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from benchmarks.gpu_times import Row, Sizes, on_plan
from torch import Tensor, nn

from vidattn.attention import attend
from vidattn.kernels.engines.dense import dense_attention
from vidattn.methods import create_method
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYERS, TEXT = 6, 512
# of the width of a layer of Wan 2.1 14B, 5120
WIDENED = 2.7


class Block(nn.Module):
    """Self-attention, attention to the text, and a perceptron."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        width = heads * head_dim
        hidden = int(WIDENED * width)
        self.own, self.own_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.text = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.text_out = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor, text: Tensor, attention: Attention) -> Tensor:
        """(B, S, width) from the same, and (B, text, width)."""
        q, k, v = self.own(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
        mixed = attention(*map(self._apart, (self.norm_q(q), self.norm_k(k), v)))
        x = x + self.own_out(mixed.transpose(1, 2).flatten(2))
        k, v = map(self._apart, self.text(text).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(self._apart(self.query(x)), k, v)
        x = x + self.text_out(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.wide(F.layer_norm(x, x.shape[-1:])), approximate="tanh")
        return x + self.narrow(hidden)

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def step(sizes: Sizes) -> Iterator[Row]:
    """One pass through some layers, planning included, dense and by some methods."""
    heads, width = sizes.planning_heads, sizes.planning_heads * sizes.head_dim
    with torch.device(sizes.device):
        layers = [Block(heads, sizes.head_dim).to(sizes.dtype) for _ in range(LAYERS)]
        x = torch.randn(1, sizes.grid.num_tokens, width, dtype=sizes.dtype)
        text = torch.randn(1, TEXT, width, dtype=sizes.dtype)
    for name, attention in _attentions(sizes).items():
        yield f"{name}, {LAYERS} layers", partial(_timed, sizes, layers, x, text, attention)


def _timed(
    sizes: Sizes, layers: list[Block], x: Tensor, text: Tensor, attention: Attention
) -> dict:
    @torch.no_grad()
    def run() -> None:
        out = x
        for layer in layers:
            out = layer(out, text, attention)

    return {"ms": sizes.timed(run, 0)["ms"]}


def _attentions(sizes: Sizes) -> dict[str, Attention]:
    """What the layers attend by: PyTorch, one plan for all, or a search in each."""
    large, small = sizes.tiles
    fixed = sizes.plan("radial", density=sizes.density)
    share = {"density": sizes.density}
    return {
        "dense": dense_attention,
        "dense, PyTorch's choice": F.scaled_dot_product_attention,
        "radial": partial(on_plan, plan=fixed, backend=sizes.engine),
        "topk, short blocks": _searching(sizes, create_method("topk", tile=small, **share)),
        "topk, long blocks": _searching(sizes, create_method("topk", tile=large, **share)),
        "svg": _searching(sizes, create_method("svg", **share)),
    }


def _searching(sizes: Sizes, method: Method) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, method.plan(sizes.grid, Reading(q, k)), backend=sizes.engine)

    return attention
