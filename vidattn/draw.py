"""Pictures of plans: which key blocks each query block reads, and what one token sees of a video.

Letters: S tokens, N slots, E listed blocks, m cells of the block map along one side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vidattn.plan import AnyPlan, Plan
from vidattn.planning.visible import visible_keys
from vidattn.simulation.work import speedup_bound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL, PARTIAL, EMPTY, QUERY = "#1f5fa8", "#8fbbe8", "#e9edf2", "#f2571f"
INK, FAINT = "#1b2330", "#6b7684"
MAP_CELLS = 420


def draw(
    plans: Mapping[str, AnyPlan],
    *,
    query: int | None = None,
    head: int = 0,
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """A figure with one row per plan: its block map, and the keys that one query token reads.

    Memory follows the plan, never the square of the sequence.

    Args:
        plans: title and plan of each row.
        query: the token whose keys are shown, by its place in the sequence; the middle of the
            video by default.
        head: the head to draw where a plan differs from head to head.
        notes: words beside some titles, such as that queries and keys were made up.

    Raises:
        ValueError: no plan, one with keys of other tokens, or a query or head that is not there.

    >>> draw({"radial": vidattn.plan("radial", vidattn.Grid(9, 16, 28))}).savefig("radial.png")
    """
    from matplotlib.figure import Figure

    if not plans:
        raise ValueError("draw needs at least one plan, got none")
    height = 0.42 + 3.85 * len(plans)
    figure = Figure(figsize=(12.5, height), facecolor="white", dpi=130)
    rows = figure.add_gridspec(
        len(plans), 2, width_ratios=(1, 3.05), wspace=0.05, hspace=0.25,
        left=0.03, right=0.985, top=1 - 0.52 / height, bottom=0.72 / height,
    )  # fmt: skip
    for row, (title, plan) in enumerate(plans.items()):
        token = middle_token(plan) if query is None else query
        plan.check_square("a picture")
        figures = _figures(plan)
        plan = plan.of_row(0, head)
        left, right = (figure.add_subplot(rows[row, column]) for column in (0, 1))
        _draw_blocks(left, plan)
        _draw_frames(right, plan, token)
        box = rows[row, :].get_position(figure)
        y = box.y1 + 0.12 / height
        heading = figure.text(box.x0, y, title, size=13, weight="bold", color=INK)
        if note := (notes or {}).get(title):
            left.annotate(
                note, (1, 0), xycoords=heading, xytext=(8, 2), textcoords="offset points",
                size=10, style="italic", color=QUERY, annotation_clip=False,
            )  # fmt: skip
        figure.text(box.x1, y, figures, size=10, color=INK, ha="right")
    _draw_legend(figure)
    return figure


def middle_token(plan: AnyPlan) -> int:
    """The token in the middle of the video, by its place in the sequence."""
    t, h, w = plan.grid.size
    return plan.grid.video_start + ((t // 2) * h + h // 2) * w + w // 2


def keys_of(plan: Plan, query: int, head: int = 0) -> Tensor:
    """(S,) bool, the keys that one query token of the first sample reads.

    Raises:
        ValueError: a query or head that is not there.
    """
    if not 0 <= query < plan.grid.num_tokens:
        raise ValueError(f"query must be a token from 0 to {plan.grid.num_tokens - 1}, got {query}")
    head = _first_row(plan, head) // plan.layout.num_blocks
    return visible_keys(plan, torch.tensor([query]))[0, head, 0]


def block_map(plan: Plan, cells: int = MAP_CELLS, head: int = 0) -> tuple[Tensor, Tensor]:
    """Two (m, m) floats: the share of each cell in whole blocks, and in partial blocks.

    A cell is one pair of blocks, or several where a plan has more than ``cells`` blocks to a side.
    """
    lists, nb = plan.lists, plan.layout.num_blocks
    m = min(nb, cells)
    cell_of_block = torch.arange(nb) * m // nb
    per_cell = torch.bincount(cell_of_block, minlength=m)
    begin = _first_row(plan, head)
    span = slice(int(lists.row_start[begin]), int(lists.row_start[begin + nb]))
    query = cell_of_block[lists.row_of_entry[span] % nb]
    cell = query * m + cell_of_block[lists.key_block[span].long()]
    partial = lists.is_partial[span]
    area = per_cell[:, None] * per_cell
    full, part = (
        torch.bincount(cell[which], minlength=m * m).view(m, m) / area
        for which in (~partial, partial)
    )
    return full, part


def _first_row(plan: Plan, head: int) -> int:
    if not 0 <= head < max(plan.lists.heads, 1) and plan.lists.heads > 1:
        raise ValueError(f"head must be from 0 to {plan.lists.heads - 1}, got {head}")
    return (head if plan.lists.heads > 1 else 0) * plan.layout.num_blocks


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _draw_blocks(axes: Axes, plan: Plan) -> None:
    full, part = (x.numpy()[..., None] for x in block_map(plan))
    picture = _rgb(EMPTY) * (1 - full - part) + _rgb(FULL) * full + _rgb(PARTIAL) * part
    smooth = "nearest" if len(full) < 160 else "antialiased"
    axes.imshow(picture.clip(0, 1), interpolation=smooth)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    nb = plan.layout.num_blocks
    axes.set_xlabel(
        f"{nb:,} blocks of keys, {plan.layout.block} tokens each", color=FAINT, size=8.5
    )
    axes.set_ylabel("blocks of queries", color=FAINT, size=8.5)


def _draw_frames(axes: Axes, plan: Plan, query: int) -> None:
    grid, read = plan.grid, keys_of(plan, query)
    video = read[grid.video_start : grid.video_start + grid.num_video_tokens].view(grid.size)
    columns = _columns(grid.t, grid.h, grid.w)
    rows = -(-grid.t // columns)
    gap = max(1, round(0.09 * max(grid.h, grid.w)))
    top = round(0.16 * max(grid.h, grid.w / 2)) + gap
    canvas = np.ones((rows * (grid.h + top), columns * (grid.w + gap) - gap, 3))
    place = query - grid.video_start
    for frame in range(grid.t):
        y = (frame // columns) * (grid.h + top) + top
        x = (frame % columns) * (grid.w + gap)
        tile = np.where(video[frame].numpy()[..., None], _rgb(FULL), _rgb(EMPTY))
        canvas[y : y + grid.h, x : x + grid.w] = tile
        here = 0 <= place < grid.num_video_tokens and place // (grid.h * grid.w) == frame
        axes.text(
            x - 0.5, y - 0.5 - 0.02 * grid.h, f"t {frame}", size=7.5, va="bottom",
            color=QUERY if here else FAINT,
        )  # fmt: skip
        if here:
            row, column = divmod(place % (grid.h * grid.w), grid.w)
            axes.plot(
                x + column, y + row, "o", color=QUERY, markersize=5.5,
                markeredgecolor="white", markeredgewidth=1.1,
            )  # fmt: skip
    axes.imshow(canvas, interpolation="nearest" if grid.w * columns < 900 else "antialiased")
    axes.set_axis_off()
    axes.set_anchor("NW")
    count = int(video.sum())
    words = f"One query token reads {count:,} of {grid.num_video_tokens:,} video keys"
    if grid.text:
        words += f" and {int(read.sum()) - count:,} of {grid.text:,} text keys"
    axes.text(0, -0.033, words, transform=axes.transAxes, size=8.5, color=FAINT, va="top")


def _draw_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    words = {"read": FULL, "block read in part": PARTIAL, "not read": EMPTY}
    handles = [
        Line2D([], [], marker="s", linestyle="", color=color, markersize=8, label=word)
        for word, color in words.items()
    ]
    handles.append(Line2D([], [], marker="o", linestyle="", color=QUERY, label="the query token"))
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.02, 0), ncols=4, frameon=False,
        fontsize=8.5, labelcolor=FAINT, handletextpad=0.1, columnspacing=1.6,
    )  # fmt: skip


def _columns(t: int, h: int, w: int, aspect: float = 2.9) -> int:
    """The number of frames to a row at which t frames of h x w fill a box of an aspect best."""

    def scale(columns: int) -> float:
        rows = -(-t // columns)
        return min(aspect / (columns * w * 1.09), 1 / (rows * (h + 0.16 * w)))

    return max(range(1, t + 1), key=scale)


def _figures(plan: AnyPlan) -> str:
    grid = plan.grid
    text = f" + {grid.text} text" if grid.text else ""
    return (
        f"{grid.t} × {grid.h} × {grid.w} tokens{text}    density {plan.density:.3f}    "
        f"visited {plan.visited_density:.3f}    attention at most {speedup_bound(plan):.1f}× faster"
    )
