"""Top-k attention against a loop over its definition, and against the formula of others."""

import math

import pytest
import torch

from tests.planning.content_cases import (
    by_tokens,
    coherent,
    dense_weights,
    peer_scores,
    recall_of,
    rows_of,
    tokens_of,
)
from tests.recorded import recorded
from vidattn.grid import Grid, tile_layout_on
from vidattn.methods.topk import TopK
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.reading import Reading
from vidattn.planning.selection import select_count, select_share
from vidattn.quality.fidelity import recall

GRIDS = [Grid(5, 9, 4, text=11), Grid(1, 6, 10, text=3, text_first=True), Grid(7, 3, 13)]
TILE = (2, 4, 4)


def shares_of_row(q, k, layout, nv, b, h, i):
    """What a query block gives the key blocks by their means, and their sizes, slowly."""
    blocks = [tokens_of(layout, j) for j in range(nv)]
    query = q[b, h, blocks[i]].double().mean(0)
    keys = [k[b, h, tokens].double().mean(0) for tokens in blocks]
    weights = [len(x) * math.exp(0.25 * float(query @ key)) for x, key in zip(blocks, keys)]
    return weights, [len(x) for x in blocks]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{"density": 0.3}, {"mass": 0.7}], ids=str)
def test_rows_hold_the_best_blocks(grid, options):
    q, k, _ = coherent(grid)
    plan = TopK(tile=TILE, **options).plan(grid, Reading(q, k))
    rows, nv = rows_of(plan), plan.layout.num_video_blocks
    for b in range(2):
        for h in range(3):
            for i in range(nv):
                weights, sizes = shares_of_row(q, k, plan.layout, nv, b, h, i)
                if "density" in options:
                    expected = by_tokens(weights, sizes, 0.3, i)
                else:
                    expected, total = set(), 0.0
                    for j in sorted(range(nv), key=lambda j: -weights[j]):
                        if total >= 0.7 * sum(weights):
                            break
                        expected.add(j)
                        total += weights[j]
                    expected.add(i)
                assert set(rows[b, h, i].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("density", [0.2, 0.4])
def test_recall_is_that_of_others_or_more(density):
    grid = Grid(5, 9, 10)
    q, k, _ = coherent(grid, batch=1, heads=4)
    # a mean of keys that no softmax sees
    k = k + 2
    weights = dense_weights(q, k, 0.25)
    layout = tile_layout_on(grid, (2, 4, 4), q.device)
    content = Content(grid, layout, q, k, 0.25)
    blocks = select_share(peer_scores(content), content.tokens, density)
    theirs = Plan.from_blocks(grid, layout, blocks)
    ours = TopK(density=density, tile=(2, 4, 4)).plan(grid, Reading(q, k))
    assert abs(ours.density - theirs.density) < 0.02
    assert recall_of(ours, weights) > recall_of(theirs, weights) + 0.1


@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_recall_is_that_of_spargeattn_or_more_on_the_bundled_model(density):
    for seen in recorded():
        # means of runs of 128 queries and of 64 keys, without the mean of the keys
        queries = seen.q.unflatten(2, (-1, 128)).mean(3)
        keys = (seen.k - seen.k.mean(2, keepdim=True)).unflatten(2, (-1, 64)).mean(3)
        scores = (seen.scale * queries @ keys.mT).softmax(-1)
        chosen = select_count(scores, max(1, int(density * keys.shape[2])))
        some = torch.arange(2, seen.grid.num_tokens, 9)
        weights = dense_weights(seen.q[:, :, some], seen.k, seen.scale)
        mass = weights.unflatten(-1, (-1, 64)).sum(-1)
        theirs = (mass * chosen[:, :, some // 128]).sum(-1).mean()
        same = chosen.double().mean().item()
        plan = TopK(density=same).plan(seen.grid, seen.reading)
        assert plan.density == pytest.approx(same, abs=0.01)
        assert recall(seen.q, seen.k, plan, some, scale=seen.scale).mean() > theirs


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0.0}, "density must be"), ({"mass": 1.5}, "mass must be")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopK(**options)
