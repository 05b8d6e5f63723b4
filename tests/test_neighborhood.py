"""neighborhood_attention against a float64 loop over pairs, gradients included."""

import itertools
import math
from functools import lru_cache

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import TOLERANCE
from vidattn.halo_operator import _halo
from vidattn.neighborhood import neighborhood_attention


def sees(x, y, extent, window, stride, dilation, causal) -> bool:
    """Whether position x of an axis reads position y."""
    group, p = x % dilation, x // dilation
    n = math.ceil((extent - group) / dilation)
    k = min(window, n)
    if causal:
        leader = min((p // stride) * stride + stride - 1, n - 1)
        start, end = max(leader - k + 1, 0), p + 1
    else:
        leader = min((p // stride) * stride + stride // 2, n - 1)
        start = min(max(leader - k // 2, 0), n - k)
        end = start + k
    return y % dilation == group and start <= y // dilation < end


def every(value, size) -> tuple:
    """One value for each axis."""
    return tuple(value) if isinstance(value, tuple) else (value,) * len(size)


@lru_cache
def pairs(size, window, stride, dilation, causal):
    """(S, S) bool, and (S, S, axes) places in a bias table, one pair of tokens at a time."""
    axes = list(zip(size, window, stride, dilation, causal))
    seen = [[[sees(x, y, *axis) for y in range(axis[0])] for x in range(axis[0])] for axis in axes]
    places = list(itertools.product(*map(range, size)))
    mask = [[all(s[x][y] for s, x, y in zip(seen, a, b)) for b in places] for a in places]
    offset = [
        [
            [
                (y - x) // d + w - 1 if s[x][y] else 0
                for s, x, y, w, d in zip(seen, a, b, window, dilation)
            ]
            for b in places
        ]
        for a in places
    ]
    return torch.tensor(mask), torch.tensor(offset)


def expected(q, k, v, window, stride=1, dilation=1, causal=False, **extra):
    """Heads first, float64."""
    size, scale = q.shape[2:-1], extra.get("scale") or q.shape[-1] ** -0.5
    k, v, extra_k, extra_v = (
        None if x is None else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
        for x in (k, v, extra.get("extra_k"), extra.get("extra_v"))
    )
    mask, offset = pairs(size, *(every(x, size) for x in (window, stride, dilation, causal)))
    flat = [x.flatten(2, -2) for x in (q, k, v)]
    scores = flat[0] @ flat[1].mT * scale
    if extra.get("rel_bias") is not None:
        scores = scores + extra["rel_bias"][(slice(None), *offset.unbind(-1))]
    scores, values = scores.masked_fill(~mask, -math.inf), flat[2]
    if extra_k is not None:
        scores = torch.cat([scores, flat[0] @ extra_k.mT * scale], -1)
        values = torch.cat([values, extra_v], 2)
    return (scores.softmax(-1) @ values).view(q.shape)


def inputs(size, *, batch=2, heads=4, key_heads=4, head_dim=8, num_extra=0, window=None):
    """Tensors by argument name, heads first; a bias where a window is given."""
    size = tuple(size)
    found = {"q": torch.randn(batch, heads, *size, head_dim)}
    found |= {name: torch.randn(batch, key_heads, *size, head_dim) for name in "kv"}
    if num_extra:
        shape = (batch, key_heads, num_extra, head_dim)
        found |= {name: torch.randn(shape) for name in ("extra_k", "extra_v")}
    if window is not None:
        found["rel_bias"] = torch.randn(heads, *(2 * x - 1 for x in every(window, size)))
    return found


def assert_right(tensors, options, dtype=torch.float32, **how):
    """Output and gradients agree with float64, in either layout."""
    exact = {name: x.double().requires_grad_() for name, x in tensors.items()}
    out = expected(**exact, **options)
    pull = torch.randn(out.shape, dtype=torch.float64)
    answers = [out, *torch.autograd.grad(out, exact.values(), pull)]
    leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    given = dict(leaves)
    if how.get("layout") == "heads_last":
        given |= {name: x.movedim(1, -2) for name, x in leaves.items() if name != "rel_bias"}
    found = neighborhood_attention(**given, **options, **how)
    assert found.shape == given["q"].shape and found.dtype == dtype
    if how.get("layout") == "heads_last":
        found = found.movedim(-2, 1)
    results = [found, *torch.autograd.grad(found, leaves.values(), pull.to(dtype))]
    errors = {}
    for name, found, answer in zip(("out", *tensors), results, answers):
        # one key takes all weight: its score has no gradient
        least = 1e-2 * pull.norm()
        errors[name] = ((found - answer).norm() / answer.norm().clamp_min(least)).item()
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


CASES = {
    "a line": ((13,), {"window": 5}),
    "a line, strided and dilated": ((17,), {"window": 4, "stride": 3, "dilation": 2}),
    "a causal line": ((11,), {"window": 4, "stride": 2, "causal": True}),
    "a picture": ((7, 11), {"window": (3, 4)}),
    "a picture, dilated": ((9, 8), {"window": 3, "dilation": (2, 3)}),
    "blocks": ((6, 8), {"window": (3, 4), "stride": (3, 4)}),
    "a window as large as the picture": ((5, 6), {"window": (5, 6)}),
    "a window larger than the picture": ((3, 5), {"window": 7, "stride": 2}),
    "causal rows": ((5, 6), {"window": 3, "causal": (True, False)}),
    "a video": ((3, 5, 6), {"window": (2, 3, 5)}),
    "a video, all at once": (
        (5, 4, 7),
        {
            "window": (3, 2, 3),
            "stride": (2, 1, 3),
            "dilation": (1, 2, 2),
            "causal": (True, False, True),
        },
    ),  # fmt: skip
    "one frame": ((1, 6, 5), {"window": (1, 3, 3)}),
    "one token": ((1, 1), {"window": 1}),
}


@pytest.mark.parametrize("layout", ["heads_first", "heads_last"])
@pytest.mark.parametrize("backend", ["auto", "halo"])
@pytest.mark.parametrize("case", CASES)
def test_windows(case, backend, layout):
    size, options = CASES[case]
    assert_right(inputs(size), options, backend=backend, layout=layout)


@pytest.mark.parametrize("layout", ["heads_first", "heads_last"])
@pytest.mark.parametrize("case", CASES)
def test_bias_and_extra_tokens(case, layout):
    size, options = CASES[case]
    tensors = inputs(size, num_extra=3, window=options["window"])
    assert_right(tensors, options, layout=layout)


@pytest.mark.parametrize("backend", ["auto", "torch", "halo", "reference"])
def test_extra_tokens_and_grouped_queries(backend):
    tensors = inputs((4, 9), key_heads=2, num_extra=5)
    assert_right(tensors, {"window": 3, "scale": 0.5}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    tensors = inputs((5, 7), num_extra=2, window=3)
    tensors = {name: x.to(dtype).float() for name, x in tensors.items()}
    assert_right(tensors, {"window": 3}, dtype)


@pytest.fixture
def tiles_of(monkeypatch):
    """Set the edge of the tiles, which small sizes would not be cut into."""

    def set_edge(edge):
        monkeypatch.setattr("vidattn.halo_operator.EDGES", (edge,))
        _halo.cache_clear()

    yield set_edge
    _halo.cache_clear()


@pytest.mark.parametrize("edge", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_any_tile_gives_the_same(case, edge, tiles_of):
    tiles_of(edge)
    size, options = CASES[case]
    assert_right(inputs(size, batch=1, heads=2, key_heads=2, window=options["window"]), options)


@pytest.mark.parametrize("budget", [1, 5000, 20_000])
def test_any_amount_of_memory_gives_the_same(monkeypatch, budget, tiles_of):
    monkeypatch.setattr("vidattn.kernels.windows.neighborhood_torch.BUDGET", budget)
    tiles_of(2)
    few = {"batch": 1, "heads": 2, "key_heads": 2}
    assert_right(inputs((23,), window=3, num_extra=2), {"window": 3})
    assert_right(inputs((2, 6, 9), window=(2, 3, 3), **few), {"window": (2, 3, 3)})


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers(monkeypatch, num_workers):
    kernel = "vidattn.kernels.windows.neighborhood_torch"
    monkeypatch.setattr(f"{kernel}.SHARED_FROM", 0)
    monkeypatch.setattr(f"{kernel}.num_workers", lambda device: num_workers)
    assert_right(inputs((6, 7), batch=3, window=3), {"window": 3})


def test_large_scores():
    tensors = inputs((6, 7), window=3)
    tensors["rel_bias"] += 100
    assert_right(tensors, {"window": 3})


def test_large_queries():
    tensors = inputs((6, 7), head_dim=2)
    tensors["q"] *= 1000
    exact = expected(**{name: x.double() for name, x in tensors.items()}, window=3)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = neighborhood_attention(**leaves, window=3, backend="halo")
    grads = torch.autograd.grad(out.sum(), leaves.values())
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("backend", ["auto", "halo", "torch"])
def test_autocast_casts_as_pytorchs_attention_does(backend):
    tensors = inputs((5, 6), num_extra=2)
    expected = neighborhood_attention(
        **{name: x.bfloat16() for name, x in tensors.items()}, window=3, backend=backend
    )
    tensors["k"] = tensors["k"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_attention(**tensors, window=3, backend=backend)
    assert torch.equal(out, expected) and out.dtype == torch.bfloat16


def test_half_precision_trains_the_bias_in_its_own():
    tensors = inputs((5, 6), window=3)
    bias = tensors.pop("rel_bias").requires_grad_()
    q, k, v = (x.bfloat16() for x in tensors.values())
    out = neighborhood_attention(q, k, v, 3, rel_bias=bias)
    (grad,) = torch.autograd.grad(out.float().square().sum(), bias)
    assert out.dtype == torch.bfloat16 and grad.dtype == torch.float32 and grad.any()


def test_the_operator_is_sound():
    tensors = inputs((5, 6), window=3, batch=1, heads=2, key_heads=2)
    q, k, v = (tensors[x].view(1, 2, 1, 5, 6, 8).requires_grad_() for x in "qkv")
    bias = tensors["rel_bias"].view(2, 1, 5, 5).requires_grad_()
    rule = ([1, 3, 3], [1, 1, 2], [1, 2, 1], [False, False, True], 0.3)
    # what torch.compile does beyond these takes most of a minute
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for table in (bias, None):
        op, arguments = torch.ops.vidattn.neighborhood.default, (q, k, v, table, *rule)
        torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("window", [3, None])
def test_the_operator_compiles_to_one_graph(window):
    tensors = inputs((5, 6), window=window, num_extra=2)

    def run(**tensors):
        return neighborhood_attention(**tensors, window=3).square().sum()

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        total = call(**leaves)
        results.append([total.detach(), *torch.autograd.grad(total, leaves.values())])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("window", [3, None])
def test_on_meta(window):
    tensors = {name: x.to("meta") for name, x in inputs((5, 6), window=window).items()}
    out = neighborhood_attention(**tensors, window=3)
    assert out.shape == tensors["q"].shape and out.device.type == "meta"


def test_it_is_public():
    assert vidattn.neighborhood_attention is neighborhood_attention


WRONG = {
    "a list": (lambda x: {"v": x["v"].tolist(), "layout": "heads_last"}, "Tensor, Tensor, list"),
    "a number of extra keys": (lambda x: {"extra_k": 2}, "extra_k must be a tensor, got int"),
    "two axes missing": (lambda x: {"q": x["q"][0, 0]}, "with 1 to 3 axes"),
    "another size": (lambda x: {"k": x["k"][:, :, :3], "v": x["v"][:, :, :3]}, "must agree in"),
    "a window for three axes": (lambda x: {"window": (3, 3, 3)}, "window must be one int, or one"),
    "an empty window": (lambda x: {"window": 0}, "window must be"),
    "a stride too long": (lambda x: {"stride": 4}, "stride must not exceed window"),
    "causal by number": (lambda x: {"causal": (1, 0)}, "causal must be one bool"),
    "a table for another window": (lambda x: {"window": 5}, r"rel_bias must be .* = \(4, 9, 9\)"),
    "keys alone": (lambda x: {"extra_v": None}, "extra_k and extra_v go together"),
    "keys for other heads": (lambda x: {"extra_k": x["extra_k"][:, :3]}, "extra_k must have the"),
    "fewer values": (lambda x: {"extra_v": x["extra_v"][:, :, :1]}, "must agree"),
    "mixed dtypes": (lambda x: {"v": x["v"].double()}, "must share dtype and device"),
    "an unknown layout": (lambda x: {"layout": "heads_frist"}, "did you mean 'heads_first'"),
    "an unknown backend": (lambda x: {"backend": "hallo"}, "did you mean 'halo'"),
    "a backend without bias": (lambda x: {"backend": "torch"}, "takes no rel_bias; 'halo' does"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    change, message = WRONG[case]
    tensors = {**inputs((5, 6), window=3, num_extra=2), "window": 3}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**{**tensors, **change(tensors)})
