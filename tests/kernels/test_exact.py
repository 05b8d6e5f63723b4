"""Attention to everything takes the faster engine, which is measured once, and gives the same."""

import json
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.attention_cases import relative_rms
from vidattn.kernels import figures
from vidattn.kernels.engines import exact
from vidattn.kernels.engines.exact import exact_attention, exact_engine, only_pytorch, whole_lists

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# over the length from which calls are looked at, and uneven
S = 331


@pytest.fixture
def faster(monkeypatch):
    """Ours is the faster one, also in short calls; the kinds that were asked for."""
    asked = []
    monkeypatch.setattr(exact, "LEAST_FLOPS", 0)
    monkeypatch.setattr(exact, "speed_of", lambda kind: asked.append(kind) or 2.0)
    return asked


def inputs(dtype=torch.float32, key_heads=2, tokens=S, requires_grad=False):
    shapes = [(2, heads, tokens, 24) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_gives_attention_and_its_gradients(dtype, masked, key_heads, faster):
    given = inputs(dtype, key_heads, requires_grad=True)
    keys = torch.rand(2, S) < 0.7 if masked else None
    assert exact_engine(*given) == "cpp"
    out = exact_attention(*given, key_mask=keys, scale=0.3)
    pull = torch.randn_like(out)
    found = torch.autograd.grad(out, given, pull)
    exactly = [x.detach().double().requires_grad_() for x in given]
    mask = None if keys is None else keys[:, None, None]
    expected = F.scaled_dot_product_attention(*exactly, mask, scale=0.3, enable_gqa=True)
    wanted = torch.autograd.grad(expected, exactly, pull.double())
    assert faster[-1].has_gradient
    for x, y in zip((out, *found), (expected, *wanted)):
        assert x.dtype == dtype and relative_rms(x, y) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [128, 208, 321, 1280, 4097])
def test_lists_read_everything_in_even_blocks(tokens):
    lists = whole_lists(tokens)
    lists.check(tokens)
    assert lists.num_blocks**2 == lists.key_block.numel() and lists.num_partial == 0
    assert lists.order[lists.order >= 0].tolist() == list(range(tokens))
    assert lists.order.numel() - tokens < exact.VECTOR * lists.num_blocks
    assert lists.block <= exact.MOST_SLOTS + exact.VECTOR


OTHERS = {
    "short": lambda: inputs(tokens=64),
    "of other tokens": lambda: [x[:, :, : S - i] for i, x in zip((0, 1, 1), inputs())],
    "wide": lambda: [torch.randn(1, 1, S, 257) for _ in range(3)],
    "float64": lambda: inputs(torch.float64),
    "mixed": lambda: [inputs()[0], *inputs(torch.bfloat16)[1:]],
    "elsewhere": lambda: [x.to("meta") for x in inputs()],
    "of a subclass": lambda: [x.as_subclass(type("Mine", (torch.Tensor,), {})) for x in inputs()],
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_ours_stays_pytorchs(case, faster):
    assert exact_engine(*OTHERS[case]()) == "pytorch"


def test_who_chose_a_kernel_keeps_it(faster):
    given = inputs()
    with sdpa_kernel(SDPBackend.MATH):
        assert exact_engine(*given) == "pytorch"
    with only_pytorch():
        assert exact_engine(*given) == "pytorch"
    seen = []
    torch.func.vmap(lambda x: seen.append(exact_engine(*given)) or x)(given[0])
    assert seen == ["pytorch"]
    assert exact_engine(*given) == "cpp"


def test_short_calls_are_not_measured(monkeypatch):
    monkeypatch.setattr(exact, "speed_of", None)
    assert exact_engine(*inputs()) == "pytorch"


def test_autocast_decides_the_dtype(faster):
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = exact_attention(*given)
        expected = F.scaled_dot_product_attention(*given, enable_gqa=True)
    assert faster[-1].dtype == out.dtype == expected.dtype == torch.bfloat16
    assert relative_rms(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "cache_folder", lambda: tmp_path)
    exact.speed_of.cache_clear()
    yield tmp_path
    exact.speed_of.cache_clear()


@pytest.mark.parametrize("has_gradient", [False, True])
def test_it_is_measured_once_and_kept(folder, has_gradient, monkeypatch):
    monkeypatch.setattr(exact, "MEASURED_FLOPS", 1e6)
    monkeypatch.setattr(exact, "agreed", statistics.median)
    kind = exact.Kind(torch.float32, 16, 128, has_gradient, torch.get_num_threads())
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = exact.speed_of(kind)
    assert 0.01 < found < 100 and torch.equal(torch.get_rng_state(), state)
    (name,) = json.loads((folder / "figures.json").read_text())
    assert str(kind) in name and torch.__version__ in name and figures.cpu_name() in name
    monkeypatch.setattr(exact, "_measure", None)
    exact.speed_of.cache_clear()
    assert exact.speed_of(kind) == found


def test_a_busy_machine_decides_nothing(folder, monkeypatch):
    monkeypatch.setattr(exact, "MEASURED_FLOPS", 1e6)
    monkeypatch.setattr(exact, "agreed", lambda ratios: None)
    kind = exact.Kind(torch.float32, 16, 128, False, torch.get_num_threads())
    assert exact.speed_of(kind) == 1 and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("ratios", "found"),
    [
        # one round of seven was disturbed on either side
        ([0.2, 1.1, 1.12, 1.15, 1.2, 1.3, 9.0], 1.15),
        # noisy, but ours wins, or PyTorch's, in every one of them
        ([1.2, 1.4, 1.9, 2.2, 2.6, 3.0, 3.4], 2.2),
        ([0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0], 0.5),
        # quiet, and as fast
        ([1.0, 1.0, 1.02, 1.04, 1.07, 1.1, 1.1], 1.04),
        ([0.5, 0.6, 0.9, 1.1, 1.4, 2.0, 2.1], None),
    ],
)
def test_rounds_agree_on_which_is_faster(ratios, found):
    assert exact.agreed(ratios[::-1]) == found


def test_a_broken_file_of_figures_is_written_anew(folder):
    (folder / "figures.json").write_text("{")
    assert figures.kept("a", lambda: 2) == 2.0 and figures.kept("b", lambda: 3) == 3.0
    assert figures.kept("a", lambda: 5) == 2.0
    assert [x.name for x in folder.iterdir()] == ["figures.json"]


def test_without_a_compiler_it_is_pytorchs(folder, monkeypatch):
    monkeypatch.setattr(exact.block_sparse_cpu, "missing", lambda dtype: "no compiler")
    assert exact.speed_of(exact.Kind(torch.float32, 16, 128, False, 1)) == 0
