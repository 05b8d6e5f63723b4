"""Every family on its real classes: dense is the model, sparse is the model with a masked softmax.

The mask is put together here from the plan of the video alone and from what ``tiny`` says about the
place of the video in the sequence, not from what the family says.
"""

import importlib
import inspect
import pkgutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import vidattn
from tests.pipelines.tiny import TINY, build
from vidattn.pipelines.family import families, known_models

METHODS = {
    "neighborhood": {"window": (3, 3, 5), "stride": (1, 1, 2)},
    "radial": {"near": 0, "decay": 0.25, "tile": (1, 4, 4)},
}
cases = pytest.mark.parametrize("key", TINY)


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(key):
        if key not in built:
            built[key] = build(key)
        return built[key]

    return get


class MaskedSoftmax(TorchFunctionMode):
    """Puts a masked softmax in float64 in the place of the attention over the video."""

    def __init__(self, case, mask):
        super().__init__()
        self.case, self.mask, self.calls = case, mask, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, scale=None, **rest):
        length, silent = key.shape[2], self.case.silent
        is_other = query.shape[2] + silent != length or length < self.case.num_video
        if is_other or rest.get("is_causal"):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, **rest)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        self.calls += 1
        start, stop = self.case.before(length), self.case.before(length) + self.case.num_video
        keep = torch.ones(length, length, dtype=torch.bool)
        keep[start:stop, start:stop] = self.mask
        keep = keep[silent:]
        scores = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            assert attn_mask.dtype == torch.bool
            keep = keep & attn_mask
        weights = scores.masked_fill(~keep, float("-inf")).softmax(-1).nan_to_num(0.0)
        return (weights @ value.double()).to(value.dtype)


def mask_of(method, case):
    """(S, S) bool, who reads whom; to a chunk of those that wait the video ends with it."""
    t, h, w = case.size
    chunk = case.chunk or t
    mask = torch.zeros(case.num_video, case.num_video, dtype=torch.bool)
    for stop in range(chunk, t + 1, chunk):
        grid = vidattn.Grid(stop, h, w)
        asked = slice((stop - chunk) * h * w, grid.num_tokens)
        plan = vidattn.plan(method, grid, **METHODS[method])
        mask[asked, : grid.num_tokens] = plan.mask()[0, 0, asked]
    return mask


def relative_rms(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_every_known_model_has_a_tiny_one():
    assert {key.partition("/")[0] for key in TINY} == set(known_models())


def test_every_transformer_of_diffusers_is_patched_or_refused_by_name():
    """What a new release brings is noticed."""
    patched, found = set(known_models()), set()
    for folder in (diffusers.models.transformers, diffusers.models.unets):
        for entry in pkgutil.iter_modules(folder.__path__):
            module = importlib.import_module(f"{folder.__name__}.{entry.name}")
            found |= {
                name
                for name, thing in vars(module).items()
                if inspect.isclass(thing)
                and issubclass(thing, diffusers.ModelMixin)
                and thing.__module__ == module.__name__
            }
    refused = {name for family in families() if family.refuse for name in family.models}
    strangers = {name for name in found - patched - refused if "2D" not in name}
    assert len(found) > 70 and not strangers


def test_no_class_is_claimed_twice():
    names = [name for family in families() for name in family.models]
    assert len(names) == len(set(names))


@cases
@torch.no_grad()
def test_dense_is_the_model_bit_for_bit(models, key):
    case, model = TINY[key], models(key)
    expected = case.call(model)
    with vidattn.patch(model, "dense") as handle:
        assert torch.equal(case.call(model), expected)
    report = handle.report()
    assert report.num_sparse == 0 and report.num_dense > 0 and report.num_passes == 1
    assert torch.equal(case.call(model), expected)


@pytest.mark.parametrize("method", METHODS)
@cases
@torch.no_grad()
def test_sparse_is_the_model_with_a_masked_softmax(models, key, method):
    case, model = TINY[key], models(key)
    dense = case.call(model)
    plan = vidattn.plan(method, vidattn.Grid(*case.size), **METHODS[method])
    if plan.density > 0.9:
        pytest.skip("radial reads one frame whole")
    mask = mask_of(method, case)
    with MaskedSoftmax(case, mask) as reference:
        expected = case.call(model)
    with vidattn.patch(model, method, dense_layers=0, **METHODS[method]) as handle:
        actual = case.call(model)
    report = handle.report()
    assert report.num_sparse == reference.calls > 0 and report.num_dense == 0
    assert report.density == pytest.approx(mask.double().mean().item())
    assert relative_rms(actual, expected) < case.tolerance
    assert relative_rms(actual, dense) > 20 * relative_rms(actual, expected)
    assert torch.equal(case.call(model), dense)
