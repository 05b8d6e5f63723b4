"""Anchor attention against a loop over tiles, written from the definition."""

import itertools

import pytest
import torch

from tests.grids import AWKWARD
from tests.planning.content_cases import coherent, tokens_of
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.planning.reading import Reading

GRIDS = [g for g in AWKWARD if g.num_video_tokens < 150]
TILE, SCALE = (2, 2, 2), 0.3


def oracle(method, plan, grid: Grid, q, k, key_mask) -> torch.Tensor:
    """(B, H, nv, nv) bool."""
    nv, group = plan.layout.num_video_blocks, q.shape[1] // k.shape[1]
    tokens = [tokens_of(plan.layout, block) for block in range(nv)]
    cells = [tuple(x // 2 for x in grid.coords()[t[0]].tolist()) for t in tokens]
    kept = torch.zeros(*q.shape[:2], nv, nv, dtype=torch.bool)
    for b, h in itertools.product(*map(range, q.shape[:2])):
        differences = {}
        for i in range(nv):
            query = q[b, h, tokens[i]].double().mean(0)
            best = {}
            for j in range(nv):
                keys = [t for t in tokens[j] if key_mask[b, t]]
                scores = (SCALE * k[b, h // group, keys].double() @ query).tolist()
                best[j] = max(scores, default=-torch.inf)
            near = [
                j
                for j in range(nv)
                if all(abs(x - y) <= 1 for x, y in zip(cells[i][1:], cells[j][1:]))
                and (abs(cells[i][0] - cells[j][0]) <= 1 or cells[j][0] == 0)
            ]
            kept[b, h, i, near] = True
            if method.density is not None:
                ranked = sorted((j for j in range(nv) if j not in near), key=lambda j: -best[j])
                held = 0
                for j in near + ranked:
                    # half of the density, to the nearest block
                    if held + len(tokens[j]) / 2 <= method.density / 2 * grid.num_video_tokens:
                        kept[b, h, i, j] = True
                    held += len(tokens[j])
            top = max(best[j] for j in near)
            differences |= {(i, j): top - best[j] for j in range(nv) if not kept[b, h, i, j]}
        size = grid.num_video_tokens**2
        held = sum(len(tokens[i]) * len(tokens[j]) for i, j in kept[b, h].nonzero().tolist())
        for (i, j), difference in sorted(differences.items(), key=lambda x: x[1]):
            if difference == torch.inf or method.density is None and difference > method.theta:
                break
            if method.density is not None and held >= method.density * size:
                break
            kept[b, h, i, j] = True
            held += len(tokens[i]) * len(tokens[j])
    return kept


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{"theta": 1.5}, {"density": 0.61}, {"density": 0.9}], ids=str)
def test_blocks_follow_the_definition(grid, options):
    method = create_method("anchor", near=1, tile=TILE, **options)
    q, k, _ = (x.double() for x in coherent(grid, heads=4, dim=8))
    k, key_mask = k[:, ::2], torch.ones(2, grid.num_tokens, dtype=torch.bool)
    if grid.num_video_tokens > 50:
        key_mask[1, grid.video_start : grid.video_start + 60 : 3] = False
    plan = method.plan(grid, Reading(q, k, scale=SCALE, key_mask=key_mask))
    nv, nb, lists = plan.layout.num_video_blocks, plan.layout.num_blocks, plan.lists
    blocks = torch.zeros(lists.batch * lists.heads * nb, nb, dtype=torch.bool)
    blocks[lists.row_of_entry, lists.key_block.long()] = True
    blocks = blocks.view(lists.batch, lists.heads, nb, nb)
    expected = oracle(method, plan, grid, q, k, key_mask)
    assert torch.equal(blocks[:, :, :nv, :nv].expand_as(expected), expected)
    assert blocks[:, :, nv:].all() and blocks[..., nv:].all()


def test_a_sample_is_planned_alone():
    grid = Grid(3, 7, 9, text=3)
    q, k, _ = coherent(grid)
    method = create_method("anchor", density=0.5, near=1, tile=TILE)
    together = method.plan(grid, Reading(q, k)).mask()
    assert 0.4 < together.double().mean() < 0.7
    for b in range(2):
        assert torch.equal(
            method.plan(grid, Reading(q[b : b + 1], k[b : b + 1])).mask()[0], together[b]
        )


def test_density_is_met_and_full_budget_is_dense():
    grid = Grid(9, 12, 10)
    q, k, _ = coherent(grid)
    for density in (0.25, 0.6):
        plan = create_method("anchor", density=density, near=0, tile=TILE).plan(grid, Reading(q, k))
        assert plan.density == pytest.approx(density, rel=0.02)
    assert create_method("anchor", density=1.0).plan(grid, Reading(q, k)).is_dense
    assert create_method("anchor", theta=1e9, tile=TILE).plan(grid, Reading(q, k)).is_dense


def test_what_softmax_ignores_changes_nothing():
    grid = Grid(3, 7, 9)
    q, k, _ = coherent(grid)
    q, k = q.double(), k.double()
    method = create_method("anchor", theta=2.0, tile=TILE)
    plan = method.plan(grid, Reading(q, k))
    assert plan.density < 0.9 and torch.equal(
        plan.mask(), method.plan(grid, Reading(q, k + 3)).mask()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": -1.0}, "theta must be a difference"),
        ({"theta": float("nan")}, "theta must be a difference"),
        ({"density": 0}, "density must be above 0"),
        ({"near": -1}, "near must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("anchor", **options)
