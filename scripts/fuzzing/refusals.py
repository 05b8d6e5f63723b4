"""Bad values: each has to be refused with a ValueError that names what was given.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

import typing
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from fuzzing.cases import Case, Wrong
from fuzzing.inputs import Inputs, make_inputs
from fuzzing.plans import make_plan

import vidattn
from vidattn.grid import Grid
from vidattn.methods import create_method, list_methods, method_class
from vidattn.planning.reading import Reading

NAN, INF = float("nan"), float("inf")
# by the type of an option: values of which none is one
BAD = {
    float: (NAN, INF, -INF, "0.3", (0.5,), {}),
    int: (2.5, "3", NAN, (1, 2), {}, -1),
    bool: ("yes", 2, 0.5, (), {}),
    str: ("nonsense", 3, (), 1.5),
    tuple: ((1, 2, 3, 4), (1,), (), (1, 2.5, 3), (1, "2", 3), "333", (0, 1, 1), 2.5, {}, -1),
}
# values among them that are fine for some options; a path may be any word
FINE = {"near": ((0, 1, 1),), "theta": (INF,)}
PATHS = {"calibration"}


def draw_bad(rng: Random) -> tuple[str, str, dict[str, Any]]:
    """What is given a bad value: its kind, the method and the options."""
    if rng.random() < 0.5:
        return rng.choice(list(_ATTEND)), "neighborhood", {"window": 3}
    if rng.random() < 0.1:
        return rng.choice(list(_GRIDS)), "dense", {}
    if rng.random() < 0.2:
        return rng.choice(list(_CONTENT)), rng.choice(_content_methods()), {}
    name = rng.choice(list_methods())
    hints = typing.get_type_hints(method_class(name))
    fields = [x for x in method_class(name).options() if x not in PATHS]
    if not fields:
        return "no such option", name, {"densty": "densty"}
    option = rng.choice(fields)
    kinds = _kinds(hints[option])
    values = [x for kind in kinds for x in BAD[kind] if _is_bad(x, kinds)]
    value = rng.choice([x for x in values if x not in FINE.get(option, ())])
    return "option", name, {option: value}


def _content_methods() -> list[str]:
    return [name for name in list_methods() if create_method(name).reads_content]


def _kinds(hint: Any) -> list[type]:
    """The types of a hint, each by the kind in ``BAD``."""
    parts = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    if not parts:
        parts = (hint,)
    found = [tuple if typing.get_origin(x) is tuple else x for x in parts]
    return [x for x in found if x in BAD]


def _is_bad(value: Any, kinds: list[type]) -> bool:
    """Whether a value is bad for every one of some types."""
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value == -1
    if int in kinds and float not in kinds and value == 2 and bool in kinds:
        return False
    return all(any(value is x for x in BAD[kind]) or not isinstance(value, kind) for kind in kinds)


def check_refused(case: Case) -> None:
    """Raise Wrong unless a bad value is refused with a ValueError that names it."""
    call, bad = _prepare(case)
    try:
        call()
    except ValueError as error:
        message = str(error)
    except Exception as error:
        raise Wrong(f"refused with {type(error).__name__}", f"{error}"[:200]) from None
    else:
        raise Wrong("a bad value is accepted", case.bad)
    if bad and not any(name in message for value in bad for name in _names(value)):
        raise Wrong("the refusal does not name what was given", message[:200])


def _names(value: Any) -> tuple[str, ...]:
    """What may stand for a value in a message, any of them."""
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape)), str(value.dtype), str(value.device)
    # None is what was not given
    return str(value), repr(value), type(value).__name__, *(("give",) if value is None else ())


def _prepare(case: Case) -> tuple[Callable[[], object], list[Any]]:
    """What should raise, and the bad values that it should name, one of them at least."""
    if case.bad in _GRIDS:
        return _GRIDS[case.bad], []
    inputs = make_inputs(case)
    if case.bad in ("option", "no such option"):
        return lambda: _plan_with_options(case, inputs), list(case.options.values())
    given = {name: getattr(inputs, name) for name in ("q", "k", "v", "key_mask")}
    given |= {"scale": case.scale}
    if case.bad in _CONTENT:
        bad = _CONTENT[case.bad](given)
        given |= bad
        del given["v"]
        return lambda: vidattn.plan(case.method, case.grid, **given), list(bad.values())
    given |= {"plan": make_plan(case, inputs), "backend": case.engine}
    bad = _ATTEND[case.bad](given)
    return lambda: vidattn.attend(**(given | bad)), list(bad.values())


def _plan_with_options(case: Case, inputs: Inputs) -> object:
    method = create_method(case.method, **case.options)
    return method.plan(case.grid, Reading(inputs.q, inputs.k))


_GRIDS: dict[str, Callable[[], object]] = {
    "grid without frames": lambda: Grid(0, 2, 2),
    "grid of a float": lambda: Grid(2.0, 2, 2),
    "grid of a string": lambda: Grid("2", 2, 2),
    "grid of a bool": lambda: Grid(True, 2, 2),
    "grid of a negative text": lambda: Grid(2, 2, 2, text=-1),
    "grid of no text": lambda: Grid(2, 2, 2, text=None),
    "grid of a text_first that is no bool": lambda: Grid(2, 2, 2, text=1, text_first="no"),
}


def _every(change: Callable[[torch.Tensor], Any]) -> Callable[[dict], dict]:
    return lambda x: {name: change(x[name]) for name in "qkv"}


def _one(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict], dict]:
    return lambda x: {name: change(x[name])}


_MASK = {
    "mask of floats": lambda x: {"key_mask": torch.ones(x["q"].shape[0], x["q"].shape[2])},
    "mask of a list": lambda x: {"key_mask": [[True] * x["q"].shape[2]] * x["q"].shape[0]},
    "mask of another length": lambda x: {
        "key_mask": torch.ones(x["q"].shape[0], x["q"].shape[2] + 1, dtype=torch.bool)
    },
    "mask of one axis": lambda x: {"key_mask": torch.ones(x["q"].shape[2], dtype=torch.bool)},
    "mask of another batch": lambda x: {
        "key_mask": torch.ones(x["q"].shape[0] + 1, x["q"].shape[2], dtype=torch.bool)
    },
    "mask that is a number": lambda x: {"key_mask": 1},
}
_SCALE = {
    "scale of a string": lambda x: {"scale": "0.5"},
    "scale of a list": lambda x: {"scale": [0.5]},
    "scale that is complex": lambda x: {"scale": 1j},
}
_TENSORS = {
    "q is None": lambda x: {"q": None},
    "k is None": lambda x: {"k": None},
    "q is a list": _one("q", lambda q: q.tolist()),
    "q of three axes": _one("q", lambda q: q[0]),
    "k of three axes": _one("k", lambda k: k[0]),
    "q of five axes": _one("q", lambda q: q[None]),
    "k of another batch": _one("k", lambda k: torch.cat([k, k])),
    "k of another head dim": _one("k", lambda k: torch.cat([k, k], -1)),
    "k of no heads": _one("k", lambda k: k[:, :0]),
    "q of no heads": _one("q", lambda q: q[:, :0]),
    "q of another dtype": _one("q", lambda q: q.to(torch.complex64)),
    "k on another device": _one("k", lambda k: k.to("meta")),
    "heads that do not divide": lambda x: {
        "k": torch.cat([x["q"], x["q"][:, :1]], 1), "v": torch.cat([x["q"], x["q"][:, :1]], 1)
    },
}  # fmt: skip
_ATTEND = {
    **_MASK, **_SCALE, **_TENSORS,
    "v is None": lambda x: {"v": None},
    "v of another length": _one("v", lambda v: v[:, :, 1:]),
    "v of another head dim": _one("v", lambda v: v[..., :1]),
    "v of another dtype": _one("v", lambda v: v.double() if v.dtype != torch.float64 else v.half()),
    "integers": _every(lambda x: x.long()),
    "complex numbers": _every(lambda x: x.to(torch.complex64)),
    "another length": _every(lambda x: x[:, :, 1:]),
    "no numbers to a head": _every(lambda x: x[..., :0]),
    "plan is None": lambda x: {"plan": None},
    "plan is a grid": lambda x: {"plan": x["plan"].grid},
    "plan is a name": lambda x: {"plan": "radial"},
    "backend that is none": lambda x: {"backend": "cuda"},
    "backend is None": lambda x: {"backend": None},
    "mask on another device": lambda x: {"key_mask": torch.ones(
        x["q"].shape[0], x["q"].shape[2], dtype=torch.bool, device="meta")},
}  # fmt: skip
# of planning
_CONTENT = {f"planned, {what}": change for what, change in {
    **_MASK, **_SCALE, **_TENSORS,
    "another length": lambda x: {"q": x["q"][:, :, 1:], "k": x["k"][:, :, 1:]},
    "integers": lambda x: {"q": x["q"].long(), "k": x["k"].long()},
}.items()}  # fmt: skip
