"""How well a model classifies the images of a split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn


@dataclass(frozen=True)
class Scores:
    """Means over the images that can be read.

    Args:
        loss: cross-entropy.
        top1, top5: percent with the right class first, or among the first five.
        count: number of images.
        unreadable: number of images left out.
    """

    loss: float
    top1: float
    top5: float
    count: int
    unreadable: int

    def __str__(self) -> str:
        left_out = f"; {self.unreadable} cannot be read" if self.unreadable else ""
        return (
            f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f} "
            f"on {self.count} images{left_out}"
        )


@torch.no_grad()
def score(model: nn.Module, batches: Iterable, accelerator: Accelerator) -> Scores:
    """Scores over the batches of all processes; the model is left in evaluation mode.

    Args:
        batches: images (B, C, H, W), labels (B,) with -1 for an image to leave out, and anything.

    Raises:
        ValueError: no image can be read.
    """
    model.eval()
    # loss, top 1, top 5, count, left out
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for images, labels, _ in batches:
        labels = labels.to(accelerator.device)
        logits = model(images.to(accelerator.device)).float()
        is_read = labels >= 0
        sums[4] += (~is_read).sum()
        logits, labels = logits[is_read], labels[is_read]
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += ranked[:, 0].sum()
        sums[2] += ranked.sum()
        sums[3] += len(labels)
    loss, top1, top5, count, left_out = accelerator.reduce(sums, "sum").tolist()
    if not count:
        raise ValueError(f"none of the {int(left_out)} test images can be read")
    shares = (loss / count, 100 * top1 / count, 100 * top5 / count)
    return Scores(*shares, int(count), int(left_out))
