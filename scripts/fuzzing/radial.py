"""Radial attention by its definition, block pair by block pair, in Python floats.

Source: Li et al., arXiv:2506.19852, as ``vidattn/methods/radial.py`` documents it.
"""

import itertools
import math

import torch
from fuzzing.cases import Wrong
from fuzzing.definitions import EDGE, Size
from torch import Tensor

# decays that a density may have led to, as fine as the planner says it steps
DECAYS = [2 ** (i / 64) for i in range(-16 * 64, 8 * 64 + 1)]


def blocks_of_frame(size: Size, tile: Size, window: str) -> list[list[tuple[int, int]]]:
    """The (row, column) tokens of every block of a frame."""
    _, rows, columns = size
    if window == "raster":
        block = math.prod(tile)
        line = list(itertools.product(range(rows), range(columns)))
        return [line[i : i + block] for i in range(0, len(line), block)]
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in itertools.product(range(rows), range(columns)):
        found.setdefault((y // tile[1], x // tile[2]), []).append((y, x))
    return list(found.values())


def reaches(size: Size, blocks: list[list[tuple[int, int]]], window: str) -> list[list[float]]:
    """The width of a band at which one block begins to read another, from their centers."""
    _, rows, columns = size
    centers = [tuple(sum(x) / len(x) for x in zip(*block)) for block in blocks]
    found = []
    for (y, x), (v, u) in itertools.product(centers, repeat=2):
        if window == "raster":
            found.append(abs((y - v) * columns + x - u))
        else:
            # a window of 2 L tokens with the shape of the frame
            found.append(2 * max((y - v) ** 2 * columns / rows, (x - u) ** 2 * rows / columns))
    return [found[i : i + len(blocks)] for i in range(0, len(found), len(blocks))]


class Radial:
    """The definition on one grid.

    Args:
        by_density: whether windows are those of a density, which go below a block.
    """

    def __init__(self, size: Size, tile: Size, window: str, by_density: bool):
        self.size, self.tile, self.by_density = size, tile, by_density
        blocks = blocks_of_frame(size, tile, window)
        self.reach = torch.tensor(reaches(size, blocks, window), dtype=torch.float64)
        self.of_token = torch.empty(size[1] * size[2], dtype=torch.long)
        for number, block in enumerate(blocks):
            self.of_token[[y * size[2] + x for y, x in block]] = number
        count = torch.bincount(self.of_token).double() / len(self.of_token)
        self.share = count[:, None] * count
        frame = torch.arange(size[0])
        self.apart = (frame[:, None] - frame).abs()

    def window(self, distance: int, decay: float) -> tuple[float, float]:
        """How far two frames see each other, and of how many distances one is kept."""
        tokens, block = self.size[1] * self.size[2], math.prod(self.tile)
        width = 2 ** tokens.bit_length() / 2 ** distance.bit_length() * decay
        if self.by_density:
            return width, max(math.ceil(1 / width - EDGE), 1)
        return max(width, block), max(block / width, 1)

    def pairs(self, decay: float, near: int, sink: bool) -> Tensor:
        """(t, t, m, m): 1 where blocks read each other, 0 where not, -1 for either."""
        found = []
        for distance in range(self.size[0]):
            if distance <= near:
                found.append(torch.ones(self.reach.shape))
                continue
            width, every = self.window(distance, decay)
            keep = (self.reach <= width).float()
            keep[(self.reach - width).abs() < EDGE * width] = -1
            if abs(every % 1 - 0.5) < EDGE:
                keep[keep == 1] = -1
            elif distance % round(every):
                keep[:] = 0
            found.append(keep)
        pairs = torch.stack(found)[self.apart]
        if sink:
            pairs[:, 0] = 1
        return pairs

    def densities(self, near: int, sink: bool) -> Tensor:
        """Kept share of the video pairs with each of ``DECAYS``."""
        reach, order = self.reach.flatten().sort()
        within = torch.cat([torch.zeros(1), self.share.flatten()[order].cumsum(0)])
        t, kept = self.size[0], torch.zeros(len(DECAYS), dtype=torch.float64)
        for distance in range(t):
            rules = [self.window(distance, decay) for decay in DECAYS]
            seen = within[torch.searchsorted(reach, torch.tensor([x for x, _ in rules]).double())]
            seen = seen * torch.tensor([distance % round(every) == 0 for _, every in rules])
            seen = torch.ones_like(seen) if distance <= near else seen
            frames = t if distance == 0 else 2 * (t - distance)
            kept += (frames - sink) * seen + sink
        return kept / t**2

    def check_decay(self, seen: Tensor, decay: float, near: int, sink: bool) -> None:
        """Raise Wrong unless an (N, N) mask is that of a decay."""
        made, pairs = self.pairs(decay, near, sink), self.of_blocks(seen)
        if not ((made == -1) | (made == pairs)).all():
            raise Wrong("radial differs from its definition")

    def check_density(self, seen: Tensor, density: float, nears, sinks) -> None:
        """Raise Wrong unless an (N, N) mask lies between those of two decays a step apart.

        Args:
            nears, sinks: what may be read whole.
        """
        pairs, found = self.of_blocks(seen), seen.double().mean().item()
        if not any(self._is_between(pairs, found, *x) for x in itertools.product(nears, sinks)):
            raise Wrong("radial fitted to a density is that of no decay")
        unit = (
            torch.stack([self.share[self.reach == x].sum() for x in self.reach.unique()]).max()
            * 2
            / self.size[0]
        )
        if abs(found - density) > unit + 0.005 + 0.05 * density:
            raise Wrong("radial is far from its density", f"{found:.3f}, not {density}")

    def _is_between(self, pairs: Tensor, found: float, near: int, sink: bool) -> bool:
        kept = self.densities(near, sink)
        for i in ((kept[:-2] <= found + 1e-6) & (kept[2:] >= found - 1e-6)).nonzero().flatten():
            narrow, wide = (self.pairs(DECAYS[int(j)], near, sink) for j in (i, i + 2))
            # which distances are left out is not a matter of more or less
            either = (wide != 0) | (narrow != 0)
            if not ((narrow == 1) & ~pairs).any() and not (pairs & ~either).any():
                return True
        # windows of whole frames
        return found > kept[-1] - 1e-6 and bool(pairs.all())

    def of_blocks(self, seen: Tensor) -> Tensor:
        """(t, t, m, m) bool of an (N, N) mask of whole blocks.

        Raises:
            Wrong: it cuts a block.
        """
        t, m = self.size[0], self.reach.shape[0]
        first = torch.tensor([(self.of_token == i).nonzero()[0].item() for i in range(m)])
        by_frame = seen.view(t, len(self.of_token), t, -1).transpose(1, 2)
        pairs = by_frame[:, :, first][..., first]
        if not torch.equal(pairs[:, :, self.of_token][..., self.of_token], by_frame):
            raise Wrong("radial cuts a block")
        return pairs
