"""Every ContentMethod by the same rules; a new file is tested as it is."""

from itertools import product

import pytest
import torch

from tests.planning.content_cases import coherent, dense_weights
from tests.recorded import recorded
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods import create_method, list_methods, method_class
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.reading import Reading
from vidattn.quality.fidelity import fidelity

NAMES = [name for name in list_methods() if issubclass(method_class(name), ContentMethod)]
# a head of these reads other tiles because of its number
NUMBERED = {"strided"}
GRIDS = [Grid(5, 9, 4, text=11), Grid(1, 6, 10, text=3, text_first=True), Grid(7, 3, 13)]


def options_of(name: str) -> set[str]:
    return set(method_class(name).options())


def method(name: str, **options):
    """A method with those of the options that it has."""
    known = options_of(name)
    return create_method(name, **{key: x for key, x in options.items() if key in known})


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_and_heads_are_planned_on_their_own(name, grid):
    q, k, v = coherent(grid)
    # heads that may share a density are told not to
    this = method(name, density=0.4, tile=(2, 2, 2), rectify=True, recall=None)
    plan = this.plan(grid, Reading(q, k))
    mask, out = plan.mask().expand(2, 3, -1, -1), attend(q, k, v, plan)
    for b, h in ((0, 2), (1, 0)):
        heads = slice(3) if name in NUMBERED else slice(h, h + 1)
        one = [x[b : b + 1, heads] for x in (q, k, v)]
        alone = this.plan(grid, Reading(*one[:2]))
        assert torch.equal(alone.mask()[0], mask[b, heads])
        torch.testing.assert_close(attend(*one, alone)[0], out[b, heads], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "paro"])
@pytest.mark.parametrize("value", [0.0, 0.3, None])
def test_ties_are_broken_alike_alone_and_in_a_batch(name, value):
    """Constant queries and keys: every score is the same, up to what rounding makes of it."""
    grid = Grid(5, 6, 7, text=3)
    q, k = (torch.full((3, 4, grid.num_tokens, 16), value or 0.0) for _ in range(2))
    if value is None:
        # one sample of them beside others
        q[1:], k[1:] = torch.randn(2, 2, 4, grid.num_tokens, 16)
        q[:1], k[:1] = 0.7, 0.1
    together = create_method(name).plan(grid, Reading(q, k)).mask().expand(3, 4, -1, -1)
    for b in range(3):
        alone = create_method(name).plan(grid, Reading(q[b : b + 1], k[b : b + 1])).mask()
        assert torch.equal(alone[0].expand(4, -1, -1), together[b])


@pytest.mark.parametrize("name", [*NAMES, "paro"])
def test_every_query_reads_its_block(name):
    """However little is asked for, and however far another block is ahead."""
    grid = Grid(1, 12, 16, text=9)
    q, k = (1e3 * torch.randn(2, 2, grid.num_tokens, 8) for _ in range(2))
    small = ({"density": 0.08}, {"mass": 0.01, "least": 0.01}, {"density": 0.08, "sink": True})
    for options in small:
        # by the content alone, wherever there is a choice
        mask = method(name, **options, near=None if name == "rectified" else 0).plan(
            grid, Reading(q, k)
        )
        assert mask.mask().diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "paro"])
def test_a_sample_without_keys_gives_0_and_leaves_the_others(name, rectify):
    grid = GRIDS[0]
    q, k, v = coherent(grid)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1] = False
    this = method(name, rectify=rectify)
    plan = this.plan(grid, Reading(q, k, key_mask=key_mask))
    out = attend(q, k, v, plan, key_mask=key_mask)
    assert not out[1].any()
    alone = this.plan(grid, Reading(q[:1], k[:1]))
    torch.testing.assert_close(out[:1], attend(q[:1], k[:1], v[:1], alone))


# what is a full budget by other names; each is given to the methods that have the option
FULL = ({"density": 1.0}, {"mass": 1.0}, {"tau": 1.0}, {"theta": 1e9}, {"least": 1.0})
WAYS = {
    "select": ("global", "query"),
    "granularity": ("block", "query"),
    "partition": ("time", "cube"),
    "theta": (0.0, 12.0),
    "sink": (None, True),
    "vertical": (0.0, 0.5),
    "rectify": (False, True),
}


@pytest.mark.parametrize("full", FULL, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "paro"])
def test_a_full_budget_is_dense_whatever_else_is_chosen(name, full):
    known = options_of(name)
    if not known.issuperset(full):
        pytest.skip("has no such option")
    ways = {key: values for key, values in WAYS.items() if key in known and key not in full}
    for grid in (Grid(37, 3, 2), Grid(1, 5, 7, text=3)):
        q, k, _ = coherent(grid, batch=1, heads=2, dim=8)
        for chosen in product(*ways.values()):
            # the larger ones hide what rounding makes of small ones
            for size in (1.0, 1e-6, 0.0):
                this = create_method(name, **full, **dict(zip(ways, chosen)))
                assert this.plan(grid, Reading(size * q, size * k)).mask().all()


@pytest.mark.parametrize("full", FULL, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "paro"])
def test_a_full_budget_leaves_out_padded_keys_alone(name, full):
    if not options_of(name).issuperset(full):
        pytest.skip("has no such option")
    grid = Grid(5, 4, 6, text=3)
    q, k = torch.randn(2, 1, 2, grid.num_tokens, 8)
    key_mask = torch.rand(1, grid.num_tokens) < 0.7
    mask = create_method(name, **full).plan(grid, Reading(q, k, key_mask=key_mask)).mask()
    assert (mask | ~key_mask[:, None, None]).all()


@pytest.mark.parametrize("name", NAMES)
def test_padded_keys_change_nothing(name):
    grid = GRIDS[0]
    q, k, v = coherent(grid)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1, -4:] = False
    outs = []
    for value in (0.0, 9.0):
        k, v = (x.masked_fill(~key_mask[:, None, :, None], value) for x in (k, v))
        plan = method(name, rectify=True).plan(grid, Reading(q, k, key_mask=key_mask))
        outs.append(attend(q, k, v, plan, key_mask=key_mask))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_planned_and_rectified(name):
    q, k, v = coherent(GRIDS[0])
    this = method(name, density=0.4, rectify=True)
    outs = [
        attend(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            this.plan(GRIDS[0], Reading(q.to(dtype), k.to(dtype))),
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert outs[1].dtype == torch.float64
    torch.testing.assert_close(outs[0].double(), outs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if "density" in options_of(n)])
def test_a_full_budget_is_dense_attention(name, rectify):
    grid = GRIDS[0]
    q, k, v = coherent(grid)
    plan = method(name, density=1.0, rectify=rectify).plan(grid, Reading(q, k[:, :1], scale=0.2))
    assert plan.mask().all()
    expected = dense_weights(q, k[:, :1], 0.2) @ v.double()
    out = attend(q, k[:, :1].expand_as(v), v, plan, scale=0.2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if "density" in options_of(n)])
def test_a_density_is_met(name):
    grid = Grid(11, 13, 17)
    q, k, _ = coherent(grid, batch=1, heads=2)
    assert method(name, density=0.4).plan(grid, Reading(q, k)).density == pytest.approx(
        0.4, abs=0.05
    )


@pytest.mark.parametrize("name", NAMES)
def test_rectification_reduces_the_error_on_the_bundled_model(name):
    for seen in recorded()[1::3]:
        queries = torch.arange(2, seen.grid.num_tokens, 11)
        error, density = [], []
        for rectify in (False, True):
            this = method(name, density=0.25, rectify=rectify)
            plan = this.plan(seen.grid, seen.reading)
            given = {"scale": seen.scale, "queries": queries}
            error.append(fidelity(seen.q, seen.k, seen.v, plan, **given).output_error.mean())
            density.append(plan.density)
        assert density[1] == density[0] < 0.3
        assert error[1] < error[0]
