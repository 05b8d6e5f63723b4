"""Rectified attention against a loop over its definition."""

import math
from dataclasses import replace

import pytest
import torch

from tests.planning.content_cases import coherent, dense_weights, peer_scores, rows_of, tokens_of
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods.rectified import Rectified
from vidattn.planning.content import Content
from vidattn.planning.reading import Reading

GRIDS = [Grid(5, 9, 4, text=11), Grid(1, 6, 10, text=3, text_first=True), Grid(7, 5, 13)]
TILE = (1, 4, 4)


def tile_of_block(grid, block):
    _, nh, nw = (-(-extent // edge) for extent, edge in zip(grid.size, TILE))
    return block // (nh * nw), block // nw % nh, block % nw


def is_always_read(grid, i, j, near, first_frame):
    a, b = tile_of_block(grid, i), tile_of_block(grid, j)
    beside = near is not None and max(abs(x - y) for x, y in zip(a, b)) <= near
    # of a single frame it would be everything
    is_first = grid.t > TILE[0] and a[0] == b[0] == 0
    return i == j or beside or (first_frame and is_first)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"near": None, "first_frame": False, "mass": 0.8}], ids=str
)
def test_rows_hold_what_is_critical(grid, options):
    q, k, _ = coherent(grid)
    method = Rectified(tile=TILE, **options)
    plan = method.plan(grid, Reading(q, k))
    rows, nv = rows_of(plan), plan.layout.num_video_blocks
    blocks = [tokens_of(plan.layout, j) for j in range(nv)]
    for b in range(2):
        for h in range(3):
            for i in range(nv):
                query = q[b, h, blocks[i]].double().mean(0)
                keys = [k[b, h, x].double().mean(0) for x in blocks]
                weights = [
                    len(x) * math.exp(0.25 * float(query @ key)) for x, key in zip(blocks, keys)
                ]
                rules = (method.near, method.first_frame)
                always = {j for j in range(nv) if is_always_read(grid, i, j, *rules)}
                expected, total, mass = set(always), 0, 0.0
                # the best that fit beside those, to the nearest half block
                ranked = sorted(range(nv), key=lambda j: (j not in always, -weights[j]))
                for j in ranked:
                    if total + len(blocks[j]) / 2 <= 0.25 * grid.num_video_tokens or not total:
                        expected.add(j)
                    total += len(blocks[j])
                for j in sorted(range(nv), key=lambda j: -weights[j]):
                    if mass < method.mass * sum(weights):
                        expected.add(j)
                    mass += weights[j]
                assert set(rows[b, h, i].nonzero().flatten().tolist()) == expected


def test_it_is_rectified_unless_told_otherwise():
    grid = GRIDS[0]
    q, k, _ = coherent(grid)
    plan = Rectified(tile=TILE, density=0.1).plan(grid, Reading(q, k))
    assert plan.rest is not None and plan.rest.any()
    assert Rectified(tile=TILE, rectify=False).plan(grid, Reading(q, k)).gain is None


def test_ragged_tiles_are_rectified_like_the_others(monkeypatch):
    grid = Grid(9, 9, 9)
    q, k, v = coherent(grid, batch=1, heads=4, noise=0.1, waves=1.0)
    ours = Rectified(tile=(2, 4, 4), near=None).plan(grid, Reading(q, k))
    layout, rows = ours.layout, rows_of(ours)
    content = Content(grid, layout, q, k, 0.25, rectify=True)
    # the formula of others: empty slots count as zeros in every mean, blocks all alike, and what
    # they estimate is trusted
    monkeypatch.setattr("vidattn.planning.content.trust", lambda *given, **told: torch.ones(1, 4))
    theirs = content.plan(rows, shares=peer_scores(content).softmax(-1))
    theirs = replace(theirs, rest=theirs.rest * layout.tokens_per_block / layout.block)
    plain = replace(ours, gain=None, rest=None)
    ragged = (layout.tokens_per_block < layout.block)[layout.slot_of_token // layout.block]
    expected = dense_weights(q, k, 0.25) @ v.double()

    def error(plan):
        """Of the tokens in ragged tiles, and of the others."""
        squares = (attend(q, k, v, plan).double() - expected).square().mean((0, 1, 3))
        return [squares[x].mean().sqrt() for x in (ragged, ~ragged)]

    (tail, body), (their_tail, _), (plain_tail, plain_body) = map(error, (ours, theirs, plain))
    assert tail < 0.7 * plain_tail and body < 0.7 * plain_body
    assert tail < body
    assert their_tail > 1.5 * plain_tail


@pytest.mark.parametrize("options", [{"density": 2.0}, {"mass": 0.0}, {"near": -1}], ids=str)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Rectified(**options)
