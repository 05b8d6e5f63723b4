"""Attention in windows, in C++ and in PyTorch, against one query at a time in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.attention_cases import TOLERANCE, relative_rms
from vidattn.kernels.cpp import compiler
from vidattn.kernels.cpp.processor import SETS, instruction_sets
from vidattn.kernels.windows import window_attention_cpu, window_attention_torch
from vidattn.kernels.windows.packed_windows import packed_windows
from vidattn.kernels.windows.windows import halo_windows, shifted_windows

needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
SHIFTED, PADDED = shifted_windows((5, 9), (3, 4), (1, 2))
# windows, tokens of queries and keys, numbers of a key and of a value, options
CASES = {
    "shifted": (SHIFTED, 72, 72, 7, 7, {"bias", "packed"}),
    "cosines": (SHIFTED, 72, 72, 16, 16, {"bias", "is_cosine", "packed"}),
    "other values": (SHIFTED, 72, 72, 5, 9, set()),
    "large windows": (shifted_windows((9, 8), (9, 8))[0], 72, 72, 8, 8, {"bias"}),
    "one token": (shifted_windows((2, 2), (1, 1))[0], 4, 4, 4, 4, {"bias"}),
    "halo": (halo_windows((6, 9), 3, 2), 54, 54, 6, 10, set()),
    "halo, every other query": (halo_windows((8, 4), 4, 1, 2), 8, 32, 8, 4, set()),
}
ENGINES = {
    "torch": (window_attention_torch.window_attention, torch.float64),
    "cpp": (window_attention_cpu.window_attention, torch.float32),
}


def slow(q, k, v, windows, *, scale, bias=None, is_cosine=False):
    """One query at a time."""
    D, rows = k.shape[-1], {}
    for index, (queries, keys) in enumerate(zip(windows.queries.tolist(), windows.keys.tolist())):
        some = [max(token, 0) for token in keys]
        real = torch.tensor(keys)[:, None, None] >= 0
        key, value = k[:, some] * real, v[:, some] * real
        for place, token in enumerate(queries):
            own = q[:, token, :, :D]
            if is_cosine:
                own, key = F.normalize(own, dim=-1), F.normalize(key, dim=-1)
            scores = (own[:, None] * key).sum(-1) * scale
            if windows.slots is not None:
                slots = windows.slots.to(q.dtype)
                scores = scores + (q[:, token, None, :, D:] * slots[:, None]).sum(-1)
            if bias is not None:
                scores = scores + bias[:, place].mT
            if windows.hidden is not None:
                scores = scores + windows.hidden[windows.kind[index], place, :, None]
            rows[token] = (scores.softmax(1)[..., None] * value).sum(1)
    return torch.stack([rows[token] for token in range(q.shape[1])], 1)


def make(case):
    """Leaves, options and what the output is pulled by."""
    windows, S, T, D, values, options = CASES[case]
    E = 0 if windows.slots is None else windows.slots.shape[1]
    n, m = windows.queries.shape[1], windows.keys.shape[1]
    leaves = {"q": torch.randn(2, S, 3, D + E), "k": torch.randn(2, T, 3, D)}
    leaves |= {"v": torch.randn(2, T, 3, values), "scale": torch.rand(3) + 0.5}
    if "bias" in options:
        leaves["bias"] = torch.randn(3, n, m)
    given = {"windows": windows, "is_cosine": "is_cosine" in options}
    return leaves, given, torch.randn(2, S, 3, values)


def results(engine, dtype, leaves, given, pull):
    """Output and gradients; scale has one only with cosines."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    out = engine(**leaves, **given)
    wanted = [x for name, x in leaves.items() if name != "scale" or given["is_cosine"]]
    return [out, *torch.autograd.grad(out, wanted, pull.to(dtype))]


def assert_right(engine, dtype, case):
    inputs = make(case)
    answers = results(slow, torch.float64, *inputs)
    for found, answer in zip(results(engine, dtype, *inputs), answers, strict=True):
        assert found.dtype == dtype and relative_rms(found, answer) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["torch", pytest.param("cpp", marks=needs_compiler)])
def test_windows(engine, case):
    assert_right(*ENGINES[engine], case)


@needs_compiler
@pytest.mark.parametrize("name", SETS)
def test_instruction_sets(name, monkeypatch):
    if name not in instruction_sets() or "bf16" in name:
        pytest.skip(f"{name} is not there, or not for float32")
    monkeypatch.setattr(window_attention_cpu, "instruction_set", lambda dtype: name)
    for case in ("cosines", "halo"):
        assert_right(*ENGINES["cpp"], case)


@needs_compiler
@pytest.mark.parametrize("case", ["cosines", "halo"])
def test_threads_share_the_work(case, monkeypatch):
    monkeypatch.setattr(window_attention_cpu, "PART_FLOPS", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_right(*ENGINES["cpp"], case)
    finally:
        torch.set_num_threads(before)


def packed(q, k, v, windows, scale, bias=None, is_cosine=False):
    assert windows is SHIFTED
    qkv = torch.stack([q, k, v], 2)
    return packed_windows(qkv, scale, bias, (5, 9), (3, 4), (1, 2), is_cosine)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [case for case in CASES if "packed" in CASES[case][-1]])
def test_packed_tensors(case, dtype):
    assert_right(packed, dtype, case)
    if dtype == torch.float32:
        assert_right(torch.compile(packed, fullgraph=True, backend="aot_eager"), dtype, case)


def penalty_gradients(engine, dtype, leaves, given, pull):
    """Gradients of the square of a gradient."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    wanted = [x for name, x in leaves.items() if name != "scale" or given["is_cosine"]]
    out = engine(**leaves, **given)
    grads = torch.autograd.grad(out, wanted, pull.to(dtype), create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in grads), wanted)


@needs_compiler
@pytest.mark.parametrize(
    ("engine", "case"),
    [(window_attention_cpu.window_attention, case) for case in ("other values", "cosines", "halo")]
    + [(packed, "shifted"), (packed, "cosines")],
)
def test_gradients_have_gradients(engine, case):
    inputs = make(case)
    answers = penalty_gradients(slow, torch.float64, *inputs)
    for found, answer in zip(penalty_gradients(engine, torch.float32, *inputs), answers):
        assert relative_rms(found, answer) < TOLERANCE[torch.float32]


WRONG = {
    "another dtype": ({"k": torch.zeros(2, 72, 3, 7).double()}, "takes float32 tensors on the CPU"),
    "other windows": (
        {"windows": shifted_windows((6, 6), (3, 4))[0]},
        "queries of all windows does not fit: got 48, needed 72",
    ),
    "a short bias": ({"bias": torch.zeros(3, 12, 11)}, r"bias does not fit: got \(3, 12, 11\)"),
    "a scale of another size": ({"scale": torch.ones(1)}, r"scale does not fit: got \(1,\)"),
    "keys of another batch": ({"k": torch.zeros(1, 72, 3, 7)}, r"k does not fit: got \(1, 3\)"),
    "long queries": ({"q": torch.zeros(2, 72, 3, 9)}, "q does not fit: got 9, needed 7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    leaves, given, _ = make("shifted")
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        window_attention_cpu.window_attention(**leaves | given | change)
