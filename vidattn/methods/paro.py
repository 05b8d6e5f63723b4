"""PARO: each head in the order of the axes in which its attention gathers in few blocks.

Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized
Attention in Visual Generation Models", arXiv:2506.16054. Orders and masks come from a calibration
file (``vidattn calibrate``): they do not depend on the content, there is a mask for each of the
first steps and one for the others. Without a file every generation is calibrated as it runs: the
first sparse step settles the orders, at the price of six times dense attention, and each of the
first steps its mask, the last of which serves the rest. Every sample has orders and masks of its
own. A block reads itself, and others by a threshold on their attention that meets the density.
In low precision, products are rounded block by block (see ``Plan.with_precision``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vidattn.grid import Grid, raster_layout
from vidattn.kernels.quantise import PRECISIONS
from vidattn.plan import AnyPlan
from vidattn.planning.calibration import Calibration, load_calibration
from vidattn.planning.content import Content
from vidattn.planning.method import Method, check_share, run_state
from vidattn.planning.reading import Memory, Reading
from vidattn.planning.reorder import order_mass, order_scores, ordered_plan, select_blocks
from vidattn.planning.selection import first_best
from vidattn.support.registry import unknown


@dataclass(frozen=True, kw_only=True)
class Paro(Method):
    """The blocks with the most attention, in the best of the six orders of t, h and w.

    Args:
        density: kept share of the video pairs, above 0 and at most 1; that of a calibration file
            is the file's.
        calibration: path of the file; without one the first steps of a generation are calibration.
        early: first denoising steps with a mask of their own, without a file.
        block: tokens of one block, without a file.
        precision: of the products: "int8_qk", "int8", or "int8_qk_int4_pv"; that of the tensors
            when not given. Only the forward pass has them.

    Raises:
        ValueError: a value out of range, or a file that is none; from ``plan``, a file for another
            grid or too few layers.
    """

    density: float = 0.3
    calibration: str | None = None
    early: int = 3
    block: int = 64
    precision: str | None = None
    # whose part of the file is used
    layer: int = run_state(0)
    step: int = run_state(0)

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        for name in ("early", "block"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.calibration is not None:
            load_calibration(self.calibration)

    @property
    def reads_content(self) -> bool:
        """Whether there is no file that says what to read."""
        return self.calibration is None

    def at(self, layer: int) -> Paro:
        """The method with the layer's part of the file."""
        return self if self.calibration is None else replace(self, layer=layer)

    def in_step(self, step: int) -> Paro:
        """The method with the step's part of the file."""
        if self.calibration is None:
            return self
        return replace(self, step=min(step, len(load_calibration(self.calibration).masks) - 1))

    def misfit(self, transformer: str, layers: int, heads: int | None) -> str | None:
        """What the file was made for, if it is another model."""
        if self.calibration is None:
            return None
        found = load_calibration(self.calibration)
        of, here = (found.transformer, *found.orders.shape), (transformer, layers, heads)
        for what, wanted, given in zip(("transformer", "layers", "heads"), of, here):
            if given is not None and wanted != given:
                return (
                    f"calibration '{self.calibration}' is for another model: it has {what} "
                    f"{wanted}, the model here has {given}"
                )
        return None

    def keeps(self, made: int, now: int, num_steps: int | None) -> bool:
        """Whether the plan is past the early steps, which each have their own."""
        return now > made >= self.early - 1

    def plan(self, grid: Grid, reading: Reading | None = None) -> AnyPlan:
        """The blocks of every head, from the file or from queries and keys."""
        return self.plan_with_memory(grid, reading)[0]

    def plan_with_memory(
        self, grid: Grid, reading: Reading | None = None
    ) -> tuple[AnyPlan, Memory]:
        """The plan, with the orders of the heads."""
        self.check(grid)
        if self.calibration is not None:
            return self._from_file(grid).with_precision(self.precision), ()
        content = Content.of(grid, raster_layout(grid, self.block).to, reading)
        plan, orders = content.by_sample(self._search)
        return plan.with_precision(self.precision), orders

    def _search(self, content: Content) -> tuple[AnyPlan, Tensor]:
        """The blocks of one sample in the orders of its heads, and these."""
        grid, q, k = content.grid, content.q, content.k
        given = {"scale": content.scale, "key_mask": content.key_mask}
        orders = content.memory
        if orders is None or len(orders) != q.shape[1]:
            orders = first_best(order_scores(grid, q, k, self.block, **given))
        mass = order_mass(grid, q, k, self.block, orders, **given)
        blocks = select_blocks(grid, mass, self.block, self.density)
        return ordered_plan(grid, blocks, self.block, orders), orders

    def check(self, grid: Grid) -> None:
        """Refuse another grid, or more layers, than the file is for."""
        if self.calibration is not None:
            self._file_for(grid)

    def _from_file(self, grid: Grid) -> AnyPlan:
        found = self._file_for(grid)
        blocks = found.masks[min(self.step, len(found.masks) - 1), self.layer]
        return ordered_plan(grid, blocks[None], found.block, found.orders[self.layer])

    def _file_for(self, grid: Grid) -> Calibration:
        found = load_calibration(self.calibration)
        if found.size != grid.size:
            raise ValueError(
                f"calibration '{self.calibration}' is for a video of {found.size} tokens, this one "
                f"has {grid.size}: calibrate at this size"
            )
        if self.layer >= len(found.orders):
            raise ValueError(
                f"calibration '{self.calibration}' has {len(found.orders)} layers, asked for "
                f"layer {self.layer}, counted from 0"
            )
        return found
