"""The case of a seed and a number, always the same one."""

import math
from collections.abc import Sequence
from random import Random

from fuzzing.cases import Case
from fuzzing.inputs import MASKS, STRIDES, VALUES
from fuzzing.options import draw_options
from fuzzing.planning import PATTERNS
from fuzzing.plans import MADE
from fuzzing.refusals import draw_bad
from fuzzing.states import STATES

from vidattn.kernels.quantise import PRECISIONS
from vidattn.methods import list_methods

# how many of a thousand cases are of a kind
KINDS = {
    "attend": 357,
    "pattern": 200,
    "content": 270,
    "neighborhood_attention": 80,
    "refusal": 90,
    # each takes a second
    "compile": 3,
}
EXTENTS = (1, 1, 2, 3, 4, 5, 7, 8, 11, 13, 17)
TEXTS = (0, 0, 0, 1, 3, 11, 37, 130)
DIMS = (1, 2, 3, 5, 8, 8, 16, 16, 24, 32, 40, 64, 80, 128, 256)
ENGINES = ("auto", "cpp", "torch", "reference")
# tokens at most, of the video and of the attention of all samples and heads together
MOST_TOKENS = {"attend": 500, "pattern": 400, "content": 260, "neighborhood_attention": 400,
               # interpreted
               "triton": 30}  # fmt: skip
MOST_PAIRS = 800_000
# most of the time fewer, since many small cases find more than a few large ones
SIZES = (12, 40, 80, 120, 500)


def draw(seed: int, number: int, engines: Sequence[str] = ENGINES) -> Case:
    """The case of a number, on one of the engines."""
    rng = Random(f"{seed}:{number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "refusal":
        bad, method, options = draw_bad(rng)
        return Case(
            kind, (2, 3, 4), 5, batch=2, key_heads=2, group=2, method=method, options=options,
            bad=bad, engine=rng.choice(engines), seed=number,
        )  # fmt: skip
    engine = rng.choice(engines)
    most = MOST_TOKENS.get(engine, MOST_TOKENS.get(kind, 300))
    fields = _draw_shape(rng, min(most, rng.choice(SIZES)))
    fields |= {"kind": kind, "seed": rng.randrange(1 << 30), "engine": engine}
    fields |= _DRAW[kind](rng, Case(**fields))
    fields |= _draw_call(rng, Case(**fields))
    return Case(**fields | _draw_engine(rng, Case(**fields)))


def _draw_shape(rng: Random, most: int) -> dict:
    while True:
        size = tuple(rng.choice(EXTENTS) for _ in range(3))
        text = rng.choice(TEXTS)
        if math.prod(size) <= most and text <= 4 * math.prod(size) + 3:
            break
    batch, key_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 1, 2))
    if rng.random() < 0.03:
        batch = 0
    while batch * key_heads * group * (math.prod(size) + text) ** 2 > MOST_PAIRS:
        batch, key_heads, group = min(batch, 1), max(key_heads - 1, 1), 1
        if key_heads == 1:
            break
    return {
        "size": size, "text": text, "text_first": text > 0 and rng.random() < 0.4, "batch": batch,
        "key_heads": key_heads, "group": group, "dim": rng.choice(DIMS),
    }  # fmt: skip


def _draw_call(rng: Random, case: Case) -> dict:
    """How the attention is called."""
    call = {
        "dtype": rng.choices(("float32", "float16", "bfloat16", "float64"), (5, 2, 2, 1))[0],
        "values": rng.choice(VALUES) if rng.random() < 0.6 else "normal",
        "scale": rng.choice((0.05, 1.0, -0.3, 0.0)) if rng.random() < 0.2 else None,
        "strides": rng.choice(STRIDES) if rng.random() < 0.4 else "plain",
        "gradients": rng.random() < 0.5,
        "lse": rng.random() < 0.5 and case.kind != "neighborhood_attention",
    }
    if case.kind != "neighborhood_attention" and rng.random() < 0.4:
        call["key_mask"] = rng.choice(MASKS)
    if rng.random() < 0.3 and case.method not in MADE and case.kind != "compile":
        call["states"] = tuple(rng.sample(list(STATES), rng.choice((1, 1, 2))))
    if case.kind == "attend" and rng.random() < 0.12:
        call |= {"precision": rng.choice(list(PRECISIONS)), "gradients": False}
    return call


def _draw_engine(rng: Random, case: Case) -> dict:
    """What keeps an engine to what it says it can do."""
    engine = case.engine
    if case.kind == "neighborhood_attention" and (case.options.get("bias") or rng.random() < 0.3):
        # the only one for biases
        return {"engine": rng.choice(("auto", "halo"))}
    if case.precision is not None:
        return {"engine": rng.choice(("auto", "torch"))}
    if engine == "flex":
        limits = {"gradients": False, "lse": False, "dtype": "float32"}
        return limits if case.dtype == "float64" else limits | {"dtype": case.dtype}
    if engine == "triton":
        # its interpreter knows no bfloat16
        return {"dtype": "float16" if case.dtype == "float16" else "float32"}
    if engine == "cpp" and case.dtype == "float64":
        return {"dtype": "float32"}
    return {}


def _any_plan(rng: Random, case: Case) -> dict:
    name = rng.choice((*list_methods(), *MADE, *MADE))
    return {"method": name, "options": {} if name in MADE else draw_options(rng, name, case.grid)}


def _pattern(rng: Random, case: Case) -> dict:
    name = rng.choice(PATTERNS)
    return {"method": name, "options": draw_options(rng, name, case.grid)}


def _content(rng: Random, case: Case) -> dict:
    name = rng.choice([x for x in list_methods() if x not in PATTERNS])
    options = draw_options(rng, name, case.grid)
    return {"method": name, "options": options, "again": rng.random() < 0.2}


def _neighborhood(rng: Random, case: Case) -> dict:
    axes = rng.choice((1, 2, 3))
    size = (1,) * (3 - axes) + case.size[3 - axes :]
    window = tuple(rng.randint(1, extent + 2) for extent in size[3 - axes :])
    options = {"axes": axes, "window": window}
    if rng.random() < 0.5:
        options["stride"] = tuple(rng.randint(1, edge) for edge in window)
    if rng.random() < 0.5:
        options["dilation"] = tuple(rng.randint(1, 3) for _ in window)
    if rng.random() < 0.5:
        options["causal"] = tuple(rng.random() < 0.5 for _ in window)
    if rng.random() < 0.4:
        options["layout"] = "heads_last"
    if rng.random() < 0.4:
        options["bias"] = True
    return {"size": size, "options": options, "text_first": False}


_DRAW = {
    "attend": _any_plan,
    "pattern": _pattern,
    "content": _content,
    "neighborhood_attention": _neighborhood,
    "compile": _any_plan,
}
