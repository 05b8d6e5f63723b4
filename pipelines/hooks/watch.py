"""Shows what the attention layers of a model are given while it runs densely.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from vidattn.grid import Grid
from vidattn.pipelines.hooks.intercept import Layer
from vidattn.pipelines.patch import Handle, patch
from vidattn.pipelines.site import Site
from vidattn.planning.reading import Reading


@dataclass(frozen=True, eq=False)
class Sight:
    """One call of one attention layer.

    Args:
        transformer: its name among the components of the pipeline.
        layer: number of the layer in its transformer.
        step: of denoising, from 0.
        q: (B, H, S, D), in the order of ``grid``.
        k: (B, K, S, D), likewise.
        v: likewise.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.
    """

    transformer: str
    layer: int
    step: int
    grid: Grid
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    key_mask: Tensor | None

    @property
    def reading(self) -> Reading:
        """What a method is told of the call."""
        return Reading(self.q, self.k, self.scale, self.key_mask)


@contextmanager
def watching(pipe_or_transformer: object, look: Callable[[Sight], None]) -> Iterator[Handle]:
    """Show every call to ``look`` while a model runs in a with block; its outputs do not change.

    Args:
        pipe_or_transformer: as for ``patch``.
    """
    with patch(pipe_or_transformer, "dense") as handle:
        for site in handle.sites:
            for layer in site.layers:
                layer.owner = _Tap(site, look)
        yield handle


class _Tap:
    """Stands between the layers of a site and the site."""

    def __init__(self, site: Site, look: Callable[[Sight], None]):
        self._site, self._look = site, look
        self.skipped, self.cannot = site.skipped, site.cannot
        self.check_gradient = site.check_gradient

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, mine: Tensor | None = None
    ) -> Tensor:
        """(B, H, S, D) attention of a layer, as the site computes it."""
        site, current = self._site, self._site.passes.current()
        step = current.step
        call = site.find_video(layer, current, q, k, mask, scale)
        if call.chunk is not None:
            raise ValueError(
                f"chunks of {call.chunk} frames of {site.name} wait for each other, and what is "
                "shown of a call has no word for that: give a method or a schedule yourself"
            )
        qkv = (call.to_grid(x.detach()) for x in (q, k, v))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        self._look(Sight(site.name, layer.index, step, call.grid, *qkv, factor, call.keys))
        return site.attend(layer, q, k, v, mask, scale, mine)
