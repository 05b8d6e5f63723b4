"""Every family on its real classes: dense is the model, sparse is the model with a masked softmax.

The mask is put together here from the plan of the video alone and from what ``tiny`` says about the
place of the video in the sequence, not from what the family says.
"""

import importlib
import inspect
import math
import pkgutil

import diffusers
import pytest
import torch

import vidattn
from tests.pipelines.masked_softmax import MaskedSoftmax, relative_rms
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


def mask_of(method, size, chunk):
    """(S, S) bool, who reads whom; to a chunk of those that wait the video ends with it."""
    t, h, w = size
    chunk = chunk or t
    mask = torch.zeros(t * h * w, t * h * w, dtype=torch.bool)
    for stop in range(chunk, t + 1, chunk):
        grid = vidattn.Grid(stop, h, w)
        asked = slice((stop - chunk) * h * w, grid.num_tokens)
        plan = vidattn.plan(method, grid, **METHODS[method])
        mask[asked, : grid.num_tokens] = plan.mask()[0, 0, asked]
    return mask


def test_every_known_model_has_a_tiny_one():
    assert {key.partition("/")[0] for key in TINY} == set(known_models())


def test_every_transformer_of_diffusers_is_patched_or_refused_by_name():
    """What a new release brings is noticed."""
    patched, found = set(known_models()), set()
    for name in ("transformers", "unets"):
        folder = importlib.import_module(f"diffusers.models.{name}")
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
    assert len(found) > 70 and not found - patched - refused


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
    sizes = (case.size, *case.other_sizes)
    masks = {math.prod(size): mask_of(method, size, case.chunk) for size in sizes}
    with MaskedSoftmax(case, masks) as reference:
        expected = case.call(model)
    with vidattn.patch(model, method, dense_layers=0, **METHODS[method]) as handle:
        actual = case.call(model)
    report = handle.report()
    assert report.num_sparse == reference.calls > 0 and report.num_dense == 0
    density = masks[case.num_video].double().mean().item()
    assert case.other_sizes or report.density == pytest.approx(density)
    assert relative_rms(actual, expected) < case.tolerance
    assert relative_rms(actual, dense) > 20 * relative_rms(actual, expected)
    assert torch.equal(case.call(model), dense)
