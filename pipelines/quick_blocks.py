"""Blocks of Wan's transformer, computed faster on a CPU from the same parameters.

Diffusers writes a float32 tensor for every step between its matrix products: here each norm with
its modulation, each norm of queries and keys with its rotary embedding, and each gated sum is one
pass over the tokens. Attention and matrix products stay as they are.

Letters: B batch, S tokens, L text tokens, C channels, D head dim.
"""

from __future__ import annotations

import threading

from diffusers.models.activations import GELU
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from vidattn.kernels.tokens_cpu import add_scaled, can_run, gelu, layer_norm, rms_norm


class QuickRMSNorm:
    """Stands for the forward of the norm of queries or keys; parameters are read at every call."""

    def __init__(self, module: nn.RMSNorm):
        self.module = module
        # what the block that runs in a thread has them turned by
        self._given = threading.local()

    def turn(self, rotary: tuple[Tensor, Tensor] | None) -> None:
        """Let the next calls of this thread turn by these cosines and sines, None for no turn."""
        self._given.rotary = rotary

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of (B, S, C)."""
        rotary = getattr(self._given, "rotary", None)
        if rotary is None and not can_run(x):
            return nn.RMSNorm.forward(self.module, x)
        weight = self.module.weight
        return rms_norm(x, None if weight is None else weight.float(),
                        eps=self.module.eps, rotary=rotary)  # fmt: skip


class QuickGELU:
    """Stands for the forward of the first layer of a feed-forward part, and its GELU."""

    def __init__(self, module: GELU):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """(B, S, C) to the wider channels."""
        wide = self.module.proj(x)
        return gelu(wide) if can_run(wide) else self.module.gelu(wide)


class QuickBlock:
    """Stands for the forward of one block; parameters are read at every call."""

    def __init__(self, module: WanTransformerBlock):
        self.module = module

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """(B, S, C) of video, (B, L, C) of text, and modulation (B, 6, C) or (B, S, 6, C)."""
        block, hidden = self.module, hidden_states
        if not can_run(hidden) or not isinstance(block.attn1.processor, WanAttnProcessor):
            return WanTransformerBlock.forward(
                block, hidden_states, encoder_hidden_states, temb, rotary_emb
            )
        parts = block.scale_shift_table + temb.float()
        parts = parts if parts.ndim == 4 else parts.unsqueeze(1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts.unbind(2)
        normed = layer_norm(hidden, scale=scale, shift=shift, plus=1.0, eps=block.norm1.eps)
        hidden = add_scaled(hidden, self._attend(normed, rotary_emb), gate)
        hidden = hidden + block.attn2(self._norm(hidden), encoder_hidden_states, None, None)
        normed = layer_norm(hidden, scale=ff_scale, shift=ff_shift, plus=1.0, eps=block.norm3.eps)
        return add_scaled(hidden, block.ffn(normed), ff_gate)

    def _attend(self, normed: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Self-attention, whose norms of queries and keys turn them too."""
        attn = self.module.attn1
        norms = attn.norm_q.forward, attn.norm_k.forward
        try:
            for norm in norms:
                norm.turn(rotary)
            return attn(normed, None, None, None)
        finally:
            for norm in norms:
                norm.turn(None)

    def _norm(self, hidden: Tensor) -> Tensor:
        """What cross-attention is given."""
        norm = self.module.norm2
        if not isinstance(norm, FP32LayerNorm):
            return norm(hidden)
        scale, shift = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        return layer_norm(hidden, scale=scale, shift=shift, eps=norm.eps)


def quicken_blocks(transformer: nn.Module) -> None:
    """Let the blocks of Wan in a transformer, if it has some, run so on a CPU.

    What needs gradients, is compiled, or has a processor of somebody's own, and other devices and
    dtypes, keep the code they have. Results differ by the rounding of the dtype.
    """
    for block in transformer.modules():
        if type(block) is not WanTransformerBlock:
            continue
        if any(type(norm) is not FP32LayerNorm for norm in (block.norm1, block.norm3)):
            continue
        norms = [getattr(a, n) for a in (block.attn1, block.attn2) for n in ("norm_q", "norm_k")]
        if any(type(norm) is not nn.RMSNorm for norm in norms):
            continue
        for norm in norms:
            norm.forward = QuickRMSNorm(norm)
        block.forward = QuickBlock(block)
        first = block.ffn.net[0]
        if type(first) is GELU and first.approximate == "tanh":
            first.forward = QuickGELU(first)
