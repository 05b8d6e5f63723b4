"""What PARO finds out about a model before it runs: an order and masks for every head, in a file.

Letters: L layers, H heads, T steps with masks of their own, nv video blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidattn.grid import Grid, Size
from vidattn.planning.reorder import order_mass, order_scores, select_blocks
from vidattn.planning.selection import first_best
from vidattn.support.steady import steadily

KEY = "vidattn.planning.calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Orders and masks of a model on one grid.

    Args:
        transformer: name of the model's class.
        size: (t, h, w) of the video.
        block: tokens to a block.
        density: kept share of the video pairs.
        orders: (L, H) int64, indices into ``ORDERS``.
        masks: (T, L, H, nv, nv) bool; step i uses the i-th, all later steps the last.
    """

    transformer: str
    size: Size
    block: int
    density: float
    orders: Tensor
    masks: Tensor

    def save(self, path: Path) -> None:
        """Write it as safetensors, with what it is for as JSON in the header."""
        head = {"transformer": self.transformer, "size": self.size, "block": self.block}
        head |= {"density": self.density, "shape": list(self.masks.shape)}
        packed = np.packbits(self.masks.cpu().numpy())
        tensors = {"orders": self.orders.cpu(), "masks": torch.from_numpy(packed)}
        save_file(tensors, path, metadata={KEY: json.dumps(head)})


def load_calibration(path: str | Path) -> Calibration:
    """Read what ``Calibration.save`` wrote.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    path = Path(path)
    try:
        facts = path.stat()
    except OSError as error:
        raise ValueError(
            f"calibration '{path}' cannot be read ({error.strerror}): `vidattn calibrate` makes one"
        ) from error
    return _load(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _load(path: Path, changed_ns: int, num_bytes: int) -> Calibration:
    try:
        with safe_open(path, "pt") as file:
            head = json.loads((file.metadata() or {})[KEY])
            orders, packed = file.get_tensor("orders"), file.get_tensor("masks")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"'{path}' is no calibration file of vidattn ({error}): `vidattn calibrate` makes one"
        ) from error
    shape = head.pop("shape")
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    masks = torch.from_numpy(bits).view(shape).bool()
    return Calibration(**head | {"size": tuple(head["size"])}, orders=orders, masks=masks)


class Calibrator:
    """Adds up the attention of a model's layers over calibration runs.

    The first call of a layer settles the orders of its heads.

    Args:
        transformer: name of the model's class.
        layers: how many layers it has.
        density: share of the video pairs to keep.
        steps: masks for steps 0, 1, ... ``steps`` - 2 alone, and one for all later steps.
        block: tokens to a block.
    """

    def __init__(self, transformer: str, layers: int, density: float, steps: int, block: int):
        self.transformer, self.layers, self.steps = transformer, layers, steps
        self.density, self.block = density, block
        self._size: Size | None = None
        self._orders: dict[int, Tensor] = {}
        self._mass: dict[tuple[int, int], Tensor] = {}

    @steadily
    def add(
        self,
        layer: int,
        step: int,
        grid: Grid,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        key_mask: Tensor | None = None,
    ) -> None:
        """Take in one call of a layer, (B, H, S, D) queries and (B, K, S, D) keys.

        Raises:
            ValueError: its grid is another than that of the calls before.
        """
        if self._size not in (None, grid.size):
            raise ValueError(f"calibration runs must share one grid: {self._size}, {grid.size}")
        self._size, given = grid.size, {"scale": scale, "key_mask": key_mask}
        if layer not in self._orders:
            self._orders[layer] = first_best(order_scores(grid, q, k, self.block, **given))
        mass = order_mass(grid, q, k, self.block, self._orders[layer], **given).sum(0).cpu()
        key = layer, min(step, self.steps - 1)
        self._mass[key] = self._mass[key] + mass if key in self._mass else mass

    def finish(self) -> Calibration:
        """What was found.

        Raises:
            ValueError: a layer never attended at one of the steps.
        """
        wanted = [(layer, step) for step in range(self.steps) for layer in range(self.layers)]
        for layer, step in wanted:
            if (layer, step) not in self._mass:
                raise ValueError(
                    f"layer {layer} never attended at step {step}: calibrate with at least "
                    f"{self.steps} denoising steps and no guards"
                )
        grid = Grid(*self._size)
        masks = [
            select_blocks(grid, self._mass[layer, step], self.block, self.density)
            for layer, step in wanted
        ]
        orders = torch.stack([self._orders[layer].cpu() for layer in range(self.layers)])
        masks = torch.stack(masks).unflatten(0, (self.steps, self.layers))
        return Calibration(self.transformer, self._size, self.block, self.density, orders, masks)
