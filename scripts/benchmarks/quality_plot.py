"""The plots of scripts/bench_quality.py: what is best at a density, and every method by itself.

They show the rows of the table, clip for clip. Points of two densities are joined where they are
means over the same clips, so that the line between them means something.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vidattn.draw import EMPTY, FAINT, FULL, INK, QUERY
from vidattn.methods import method_class
from vidattn.planning.pattern import PatternMethod

PANELS = {"psnr_db": "PSNR, dB", "ssim": "SSIM"}
GREEN = "#2b9348"


def is_pattern(row: dict) -> bool:
    """Whether a method is a pattern of the grid, the same for every content."""
    return row["method"] != "schedule" and issubclass(method_class(row["method"]), PatternMethod)


def is_read(row: dict) -> bool:
    """Whether a method finds in queries and keys what it keeps."""
    return row["method"] != "schedule" and not is_pattern(row)


# what is best among which rows, and its colour
KINDS: dict[str, tuple[Callable[[dict], bool], str]] = {
    "mixed by head": (lambda row: row["method"] == "schedule", GREEN),
    "by content": (lambda row: is_read(row) and not row["rectify"], FULL),
    "by content, rectified": (lambda row: is_read(row) and row["rectify"], FULL),
    "pattern of the grid": (lambda row: is_pattern(row) and not row["rectify"], QUERY),
    "pattern, rectified": (lambda row: is_pattern(row) and row["rectify"], QUERY),
}


def draw_frontier(report: dict) -> Figure:
    """PSNR and SSIM over density of the best method of each kind, with dense attention."""
    figure = Figure(figsize=(12.5, 5.2), facecolor="white", dpi=130)
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.045, right=0.99, top=0.81, bottom=0.11, wspace=0.1)
    _header(figure, "The best method of each kind", report)
    for panel, key in zip(axes, PANELS):
        found = {}
        for kind, (belongs, colour) in KINDS.items():
            rows = best(filter(belongs, report["rows"]), key)
            if rows:
                _points(panel, rows, key, colour)
                found[kind] = rows, colour
        _name_kinds(panel, found, key)
        _name_dense(panel, key)
        panel.set_xlim(0.08, 1.04)
        panel.set_title(PANELS[key], loc="left", color=INK, size=11, weight="bold")
        panel.set_xlabel("density: share of the pairs of video tokens read", color=FAINT, size=9)
        _plain(panel)
    return figure


def best(rows: Iterable[dict], key: str) -> list[dict]:
    """The row with the highest mean at every density that was asked for."""
    found: dict[float, dict] = {}
    for row in rows:
        if row["asked"] not in found or row[key]["mean"] > found[row["asked"]][key]["mean"]:
            found[row["asked"]] = row
    return [found[asked] for asked in sorted(found)]


def draw_methods(report: dict, key: str = "psnr_db") -> Figure:
    """A panel for every method, with all others behind it."""
    rows = report["rows"]
    methods = sorted({row["method"] for row in rows}, key=lambda name: (name == "schedule", name))
    columns = min(4, max(1, len(methods)))
    num_rows = max(1, -(-len(methods) // columns))
    height = 0.95 + 1.75 * num_rows
    figure = Figure(figsize=(12.5, height), facecolor="white", dpi=130)
    panels = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.045, right=0.99, top=1 - 0.95 / height, bottom=0.5 / height, wspace=0.06, hspace=0.24
    )
    _header(figure, f"{PANELS[key].split(',')[0]} of every method", report)
    for x, words, colour in ((0.66, "plain", FULL), (0.72, "rectified", QUERY)):
        figure.text(x, 1 - 0.3 / height, words, color=colour, size=10, weight="bold")
    figure.text(0.81, 1 - 0.3 / height, "all others, plain or rectified", color=FAINT, size=10)
    for panel, method in zip(panels.flat, methods):
        panel.plot(
            [row["density"] for row in rows], [row[key]["mean"] for row in rows], "o",
            color="#c9d1da", markersize=2.5, zorder=1,
        )  # fmt: skip
        for rectify, colour in ((False, FULL), (True, QUERY)):
            _points(panel, [x for x in rows if (x["method"], x["rectify"]) == (method, rectify)],
                    key, colour)  # fmt: skip
        panel.set_title(method, loc="left", color=INK, size=9.5, weight="bold", pad=3)
        _plain(panel)
    for panel in panels.flat[len(methods) :]:
        panel.set_axis_off()
    figure.supxlabel("density: share of the pairs of video tokens read", color=FAINT, size=9)
    return figure


def _header(figure: Figure, title: str, report: dict) -> None:
    height, setting = figure.get_figheight(), report["setting"]
    figure.text(0.045, 1 - 0.3 / height, title, color=INK, size=13, weight="bold")
    counts: dict[tuple[int, bool], list[float]] = {}
    for row in report["rows"]:
        asked = counts.setdefault((len(row["clips"]), row["rectify"]), [])
        asked += [row["asked"]] * (row["asked"] not in asked)
    clips = [
        f"{count} at {' and '.join(f'{x:g}' for x in asked)}{', rectified' if rectified else ''}"
        for (count, rectified), asked in counts.items()
    ]
    words = f"Likeness to the dense clip, {setting['frames']} frames of the bundled model"
    words += f"; clips to a point: {'; '.join(clips)}; 95 % intervals" if clips else ""
    figure.text(0.045, 1 - 0.53 / height, words, color=FAINT, size=9)


def _points(panel: Axes, rows: Sequence[dict], key: str, colour: str) -> None:
    """Means and intervals, joined where they are of the same clips; hollow where rectified."""
    rows = sorted(rows, key=lambda row: row["density"])
    x, y = [row["density"] for row in rows], [row[key]["mean"] for row in rows]
    for i, (row, after) in enumerate(zip(rows, rows[1:])):
        if row["clips"] == after["clips"]:
            panel.plot(x[i : i + 2], y[i : i + 2], color=colour, linewidth=1.4)
    for row, place in zip(rows, zip(x, y)):
        low, high = row[key]["interval"] or [row[key]["mean"]] * 2
        panel.plot(place[:1] * 2, (low, high), color=f"{colour}66", linewidth=2)
        panel.plot(
            *place, "s" if row["rectify"] else "o", color=colour, markersize=5.5,
            markerfacecolor="white" if row["rectify"] else colour,
        )  # fmt: skip


def _name_kinds(panel: Axes, found: dict[str, tuple[list[dict], str]], key: str) -> None:
    """The name of a kind beside its last point, and of the methods that are best in it."""
    low, high = panel.get_ylim()
    lines = []
    for kind, (rows, colour) in found.items():
        names = " and ".join(dict.fromkeys(row["method"] for row in rows))
        words = f"{kind}: {'tuned schedule' if names == 'schedule' else names}"
        lines.append((rows[-1][key]["mean"], rows[-1]["density"], words, colour))
    lines.sort()
    ys = spread([y for y, *_ in lines], 0.062 * (high - low))
    for (y, x, words, colour), at in zip(lines, ys):
        panel.annotate(
            words, (x, y), (0.5, at), color=colour, size=9.5, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6,
                        "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved apart to at least a gap, by as little as need be to either side."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _ends(groups[-1], gap)[0] < _ends(groups[-2], gap)[1] + gap:
            last = groups.pop()
            groups[-1] += last
    return [x for group in groups for x in np.linspace(*_ends(group, gap), len(group)).tolist()]


def _ends(group: Sequence[float], gap: float) -> tuple[float, float]:
    middle, half = float(np.mean(group)), gap * (len(group) - 1) / 2
    return middle - half, middle + half


def _name_dense(panel: Axes, key: str) -> None:
    if key == "ssim":
        panel.plot(1, 1, "o", color=INK, markersize=5.5)
        panel.annotate("dense", (1, 1), (-9, 0), textcoords="offset points", size=9.5,
                       color=INK, ha="right", va="center")  # fmt: skip
        return
    top = panel.get_ylim()[1]
    panel.annotate("dense: no difference", (1, top), (0.96, top), size=9.5, color=INK, ha="right",
                   va="top", annotation_clip=False)  # fmt: skip
    panel.plot(1, top, "^", color=INK, markersize=7, clip_on=False)


def _plain(panel: Axes) -> None:
    panel.tick_params(colors=FAINT, labelsize=8.5, length=0)
    panel.grid(color=EMPTY, linewidth=0.8)
    panel.set_axisbelow(True)
    for spine in panel.spines.values():
        spine.set_visible(False)
