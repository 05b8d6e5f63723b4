"""Valid options of every method, at random; one that is not known here gets a density."""

from collections.abc import Callable
from random import Random
from typing import Any

from vidattn.grid import Grid
from vidattn.methods import method_class

Options = dict[str, Any]
DENSITIES = (0.02, 0.1, 0.25, 0.4, 0.6, 0.9, 1.0)


def draw_options(rng: Random, name: str, grid: Grid) -> Options:
    """Options that the method says it takes, on this grid or any other."""
    known = method_class(name).options()
    options = _BY_METHOD.get(name, _any if "density" in known else _none)(rng, grid)
    if "tile" in known and name != "radial" and rng.random() < 0.6:
        options["tile"] = tuple(rng.choice((1, 1, 2, 3, 4)) for _ in range(3))
    if "rectify" in known and rng.random() < 0.25:
        options["rectify"] = True
    return options


def _some(rng: Random, **choices: Callable[[], Any]) -> Options:
    """Each option with even odds; the others keep their defaults."""
    return {name: choose() for name, choose in choices.items() if rng.random() < 0.6}


def _size(rng: Random, low: int, high: int) -> int | tuple[int, int, int]:
    """One number for all axes, or three."""
    if rng.random() < 0.3:
        return rng.randint(low, high)
    return tuple(rng.randint(low, high) for _ in range(3))


def _neighborhood(rng: Random, grid: Grid) -> Options:
    window = tuple(rng.randint(1, extent + 2) for extent in grid.size)
    options = {"window": window}
    if rng.random() < 0.5:
        options["stride"] = tuple(rng.randint(1, edge) for edge in window)
    if rng.random() < 0.5:
        options["dilation"] = _size(rng, 1, 4)
    if rng.random() < 0.5:
        options["causal"] = tuple(rng.random() < 0.5 for _ in range(3))
    if rng.random() < 0.2:
        options = {"window": min(window), "causal": rng.random() < 0.5}
    return options


def _radial(rng: Random, grid: Grid) -> Options:
    options = _some(
        rng,
        window=lambda: rng.choice(("tile", "raster")),
        near=lambda: rng.choice((0, 1, 2, 3, 50)),
        sink=lambda: rng.random() < 0.5,
        tile=lambda: (1, rng.randint(1, 4), rng.randint(1, 4)),
    )
    if rng.random() < 0.4:
        return options | {"density": rng.choice(DENSITIES)}
    return options | {"decay": 2 ** rng.uniform(-5, 2)}


def _sliding_tile(rng: Random, grid: Grid) -> Options:
    if rng.random() < 0.4:
        return {"density": rng.choice(DENSITIES)}
    return _some(rng, window=lambda: _size(rng, 1, 5))


def _freeswim(rng: Random, grid: Grid) -> Options:
    window = (rng.randint(1, grid.h + 2), rng.randint(1, grid.w + 2))
    return {"window": window} | _some(rng, sharpen=lambda: rng.random() < 0.5)


def _lvsa(rng: Random, grid: Grid) -> Options:
    options = _some(rng, step=lambda: rng.randint(0, 9))
    if rng.random() < 0.4:
        return options | {"density": rng.choice(DENSITIES)}
    anchors = {"anchors": lambda: rng.randint(1, grid.t + 1)}
    return options | _some(rng, near=lambda: rng.randint(0, 3), **anchors)


def _msw_msa(rng: Random, grid: Grid) -> Options:
    windows = (rng.randint(1, grid.h + 1), rng.randint(1, grid.w + 1))
    options = {"windows": windows, "shifts": rng.randint(1, 5)}
    return options | _some(rng, step=lambda: rng.randint(0, options["shifts"] - 1))


def _tesa(rng: Random, grid: Grid) -> Options:
    return _some(rng, window=lambda: _size(rng, 1, 6), layer=lambda: rng.randint(0, 1))


def _power(rng: Random, grid: Grid) -> Options:
    options = _some(rng, axes=lambda: rng.randint(1, 3))
    if rng.random() < 0.4:
        return options | {"density": rng.choice(DENSITIES)}
    return options | _some(rng, near=lambda: _size(rng, 0, 2))


def _strided(rng: Random, grid: Grid) -> Options:
    options = _some(rng, stride=lambda: rng.randint(1, 9), layer=lambda: rng.randint(0, 5))
    if rng.random() < 0.4:
        return options | {"density": rng.choice(DENSITIES)}
    return options | _some(rng, near=lambda: _size(rng, 0, 2))


def _topk(rng: Random, grid: Grid) -> Options:
    if rng.random() < 0.3:
        return {"mass": rng.choice(DENSITIES)}
    return _any(rng, grid)


def _vmoba(rng: Random, grid: Grid) -> Options:
    options = _some(
        rng,
        partition=lambda: rng.choice(("time", "space", "cube", "cycle")),
        granularity=lambda: rng.choice(("block", "query")),
        chunks=lambda: rng.randint(1, 30),
    )
    if rng.random() < 0.3:
        return options | {"select": "topk"} | _some(rng, topk=lambda: rng.randint(0, 5))
    options["select"] = rng.choice(("global", "query"))
    budget = rng.choice(("tau", "density"))
    return options | {budget: rng.choice(DENSITIES)}


def _svg(rng: Random, grid: Grid) -> Options:
    return _any(rng, grid) | _some(
        rng, rows=lambda: rng.choice((1, 3, 17, 200)), sink=lambda: rng.random() < 0.5
    )


def _adaspa(rng: Random, grid: Grid) -> Options:
    return _any(rng, grid) | _some(rng, recall=lambda: rng.choice((None, 0.5, 0.8)))


def _anchor(rng: Random, grid: Grid) -> Options:
    options = _some(rng, theta=lambda: rng.choice((0.0, 0.5, 3.0, 12.0)))
    options |= _some(rng, near=lambda: _size(rng, 0, 1))
    return options | (_any(rng, grid) if rng.random() < 0.5 else {})


def _cluster(rng: Random, grid: Grid) -> Options:
    options = _some(
        rng,
        iterations=lambda: rng.randint(0, 3),
        block=lambda: rng.randint(1, 9),
        least=lambda: rng.choice((0.05, 0.3, 1.0)),
        mass=lambda: rng.choice((0.3, 0.9)),
    )
    return options | (_any(rng, grid) if rng.random() < 0.5 else {})


def _paro(rng: Random, grid: Grid) -> Options:
    return _any(rng, grid) | _some(rng, block=lambda: rng.choice((1, 4, 7, 16, 64)))


def _rectified(rng: Random, grid: Grid) -> Options:
    return _any(rng, grid) | _some(
        rng,
        mass=lambda: rng.choice((0.1, 0.3, 0.9)),
        near=lambda: rng.choice((None, 0, 1)),
        first_frame=lambda: rng.random() < 0.5,
        rectify=lambda: False,
    )


def _vertical_slash(rng: Random, grid: Grid) -> Options:
    return _any(rng, grid) | _some(
        rng, vertical=lambda: rng.choice((0.0, 0.3, 1.0)), samples=lambda: rng.choice((1, 9, 128))
    )


def _none(rng: Random, grid: Grid) -> Options:
    return {}


def _any(rng: Random, grid: Grid) -> Options:
    return {"density": rng.choice(DENSITIES)}


def _sla(rng: Random, grid: Grid) -> Options:
    features = {"features": lambda: rng.choice(("softmax", "elu", "relu"))}
    return _any(rng, grid) | _some(rng, **features, negligible=lambda: rng.choice(DENSITIES))


_BY_METHOD = {
    "adaspa": _adaspa,
    "anchor": _anchor,
    "cluster": _cluster,
    "freeswim": _freeswim,
    "lvsa": _lvsa,
    "msw_msa": _msw_msa,
    "neighborhood": _neighborhood,
    "paro": _paro,
    "power": _power,
    "radial": _radial,
    "rectified": _rectified,
    "sla": _sla,
    "sliding_tile": _sliding_tile,
    "strided": _strided,
    "svg": _svg,
    "tesa": _tesa,
    "topk": _topk,
    "vertical_slash": _vertical_slash,
    "vmoba": _vmoba,
    "vsa": _any,
}
