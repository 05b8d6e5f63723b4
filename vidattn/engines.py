"""Which engine runs a call: the only place where one is chosen.

An engine is a module of ``kernels``. Its ``attention`` takes q, k, v, block lists and the options
that its ``TAKES`` names, and gives the output with the log-sum-exp. Its ``obstacle`` is given all
options, and says what keeps the engine from a call and what to do, or None where nothing does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType

import torch

from vidattn.kernels.constant import constant_result
from vidattn.kernels.engines import (
    block_sparse_cpu,
    block_sparse_torch,
    block_sparse_triton,
    flash,
    flex,
    quantised,
    quantised_triton,
    reference,
)
from vidattn.kernels.scoring import block_mass, block_mass_triton

ENGINES = {
    "triton": block_sparse_triton,
    "cpp": block_sparse_cpu,
    "torch": block_sparse_torch,
    "flex": flex,
    "flash": flash,
    "reference": reference,
}
BACKENDS = ("auto", *ENGINES)
# of plans with a precision of their own
QUANTISED = {"triton": quantised_triton, "torch": quantised}
# of the masses of pairs of blocks: these have ``block_mass`` and ``dense_mass`` for ``attention``
MASSES = {"triton": block_mass_triton, "torch": block_mass}
# what is tried where nobody chose, in this order
ON_CPU = ("cpp", "torch")
ON_OTHERS = ("flash", "triton", "flex", "torch")
log = logging.getLogger("vidattn")


def engine_for(
    call: tuple, options: Mapping[str, object], backend: str = "auto"
) -> tuple[str, ModuleType]:
    """What runs attention: the engine that was asked for, or the one that is chosen.

    Args:
        call: q, k, v and block lists.
        options: all that any engine takes by name.
        backend: name of an engine, or "auto".

    Raises:
        ValueError: the engine that was asked for cannot do this.
    """
    precision, what, engines = options["precision"], "attention", ENGINES
    if precision is not None:
        what, engines = f"{precision} attention", QUANTISED
        if backend not in ("auto", *engines):
            raise ValueError(
                f"the {backend!r} engine does not run plans of precision {precision!r}: use "
                'backend="torch", "triton" on an NVIDIA GPU, or plan.with_precision(None)'
            )
    if options["key_bias"] is not None or call[-1].keys is not None:
        engines = {name: x for name, x in engines.items() if "key_bias" in x.TAKES}
        if backend not in ("auto", *engines):
            raise ValueError(
                f"the {backend!r} engine takes neither weights of keys nor keys of other tokens: "
                'use backend="auto"'
            )
    name = choose(what, engines, call, options, backend)
    return name, engines[name]


def choose(
    what: str,
    engines: Mapping[str, ModuleType],
    call: tuple,
    options: Mapping[str, object],
    backend: str = "auto",
) -> str:
    """The engine that was asked for, else the first one without an obstacle, told in the log once.

    Args:
        what: they compute, for the log.
        engines: by name; "torch" is among them, and has no obstacle.
        call: q, k and what else they take by position.
        options: all that any of them takes by name.
        backend: name of an engine, or "auto".

    Raises:
        ValueError: the obstacle of the engine that was asked for.
    """
    if backend != "auto":
        if (obstacle := engines[backend].obstacle(*call, **options)) is not None:
            raise ValueError(obstacle)
        return backend
    q = call[0]
    for name in ON_CPU if q.device.type == "cpu" else ON_OTHERS:
        if name in engines and _is_for(engines[name], call, options):
            return _told(what, name, q.dtype, q.device)
    raise AssertionError('"torch" has an obstacle')


def _is_for(engine: ModuleType, call: tuple, options: Mapping[str, object]) -> bool:
    if engine.obstacle(*call, **options) is not None:
        return False
    return engine is not flash or flash.is_faster(*call, **options)


@lru_cache
@constant_result
def _told(what: str, engine: str, dtype: torch.dtype, device: torch.device) -> str:
    log.info("%s in %s on %s runs on the %r engine", what, dtype, device, engine)
    return engine
