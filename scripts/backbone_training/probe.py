"""Efficient probing: attention that pools the last feature map of a frozen backbone.

Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
arXiv 2506.10178. Letters: B batch, N tokens, C channels, Q queries.
"""

import torch
from torch import Tensor, nn


class EfficientProbe(nn.Module):
    """Learned queries that read tokens as they are, each a part of the channels of the values.

    Args:
        channels: of the tokens.
        num_classes: of the classifier behind the pooling.
        num_queries: must divide the channels.
    """

    def __init__(self, channels: int, num_classes: int, num_queries: int):
        super().__init__()
        if channels % num_queries:
            divisors = [n for n in range(1, channels + 1) if channels % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - num_queries))
            raise ValueError(
                f"tune.queries is {num_queries}; it must divide the {channels} channels "
                f"of the last feature map, such as {nearest}"
            )
        self.queries = nn.Parameter(torch.randn(num_queries, channels) * 0.02)
        self.values = nn.Linear(channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores (B, num_classes) of tokens (B, N, C)."""
        scale = tokens.shape[-1] ** -0.5
        # [B, Q, N]
        shares = (self.queries * scale @ tokens.transpose(1, 2)).softmax(dim=-1)
        # [B, Q, N, C / Q]
        values = self.values(tokens).unflatten(-1, (len(self.queries), -1)).transpose(1, 2)
        pooled = (shares[:, :, None] @ values).flatten(1)
        return self.classifier(self.norm(pooled))


class Probed(nn.Module):
    """A backbone of timm's whose tokens a probe reads in place of its head."""

    def __init__(self, backbone: nn.Module, num_classes: int, num_queries: int):
        super().__init__()
        backbone.reset_classifier(0)
        self.backbone = backbone.requires_grad_(False)
        self.probe = EfficientProbe(backbone.num_features, num_classes, num_queries)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of images (B, C, H, W)."""
        return self.probe(as_tokens(self.backbone, self.backbone.forward_features(images)))


def as_tokens(backbone: nn.Module, features: Tensor) -> Tensor:
    """(B, N, C) from what `forward_features` gives, whose layout the backbone states."""
    if features.ndim == 3:
        # class and register tokens summarise the picture already; the probe pools it itself
        return features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)
