"""What a sparse plan is compared with: a masked softmax in float64 inside the unpatched model."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class MaskedSoftmax(TorchFunctionMode):
    """Puts a masked softmax in float64 in the place of the attention over the video.

    ``masks`` are those of the video, by the number of its tokens.
    """

    def __init__(self, case, masks):
        super().__init__()
        self.case, self.masks, self.calls = case, masks, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, scale=None, **rest):
        length, silent = key.shape[2], self.case.silent
        num_video = length if length in self.masks else self.case.num_video
        is_other = query.shape[2] + silent != length or length < num_video
        if is_other or rest.get("is_causal"):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, **rest)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        self.calls += 1
        start, stop = self.case.before(length), self.case.before(length) + num_video
        keep = torch.ones(length, length, dtype=torch.bool)
        keep[start:stop, start:stop] = self.masks[num_video]
        keep = keep[silent:]
        scores = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            keep = keep & attn_mask
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.masked_fill(~keep, float("-inf")).softmax(-1).nan_to_num(0.0)
        weights = self.edit(weights, slice(start, stop))
        return (weights @ value.double()).to(value.dtype)

    def edit(self, weights, video):
        """What is made of (B, H, queries, S) weights, the keys of the video being a slice."""
        return weights


def relative_rms(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
