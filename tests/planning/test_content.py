"""What methods that read content have in common: pooled figures, rectification, schedules."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.grids import AWKWARD
from tests.planning.content_cases import coherent, dense_weights, slow_trust, tokens_of
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout_on
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.reading import Reading

GRID = Grid(3, 5, 7, text=5)
PADDED = Grid(3, 5, 7, text=5, text_first=True)
TILE = (1, 4, 4)


def contents(grid, *, padding=2, rectify=False):
    q, k, v = coherent(grid, heads=4)
    k, v = k[:, ::2] + 1, v[:, ::2]
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    if padding:
        key_mask[1, grid.text_start + grid.text - padding : grid.text_start + grid.text] = False
    layout = tile_layout_on(grid, TILE, q.device)
    return Content(grid, layout, q, k, 0.3, key_mask, rectify=rectify), v


def pooled(content, b, h):
    """Mean queries and smoothed keys of every block, and the smoothed keys of the text, slowly."""
    layout, grid = content.layout, content.grid
    q, k = content.q[b, h].double(), content.k[b, h // 2].double()
    video = [tokens_of(layout, j) for j in range(content.num_blocks)]
    k = k - k[[token for block in video for token in block]].mean(0)
    text = [t for t in range(grid.text_start, grid.text_start + grid.text)]
    text = [t for t in text if content.key_mask is None or content.key_mask[b, t]]
    return q, k, video, text


@pytest.mark.parametrize("grid", [GRID, PADDED, Grid(3, 5, 7)], ids=str)
def test_shares_are_a_softmax_over_blocks_and_tokens_of_text(grid):
    content, _ = contents(grid, padding=2 if grid.text else 0)
    for b in range(2):
        for h in range(4):
            q, k, video, text = pooled(content, b, h)
            for i, rows in enumerate(video):
                query = q[rows].mean(0)
                weights = [len(x) * math.exp(0.3 * float(query @ k[x].mean(0))) for x in video]
                beside = sum(math.exp(0.3 * float(query @ k[t])) for t in text)
                expected = torch.tensor(weights) / (sum(weights) + beside)
                torch.testing.assert_close(content.shares[b, h, i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", [GRID, PADDED], ids=str)
def test_coherence_compares_the_means_with_the_spread(grid):
    content, _ = contents(grid)
    found = content.is_coherent
    assert found.any() and not found.all()
    for b in range(2):
        for h in range(4):
            q, k, video, _ = pooled(content, b, h)
            for i, rows in enumerate(video):
                for j, columns in enumerate(video):
                    query, key = q[rows].mean(0), k[columns].mean(0)
                    spread = (q[rows] - query).abs().mean(0) @ key
                    spread = spread.abs() + (query @ (k[columns] - key).abs().mean(0)).abs()
                    assert found[b, h, i, j] == ((query @ key).abs() > spread)


def test_coherence_ignores_what_softmax_ignores():
    content, _ = contents(GRID)
    moved = Content(GRID, content.layout, content.q, content.k + 5, 0.3, content.key_mask)
    assert torch.equal(moved.is_coherent, content.is_coherent)


@pytest.mark.parametrize("grid", [GRID, PADDED, Grid(3, 5, 7)], ids=str)
def test_a_rectified_plan_adds_what_it_does_not_read(grid):
    content, v = contents(grid, padding=2 if grid.text else 0, rectify=True)
    nv = content.num_blocks
    blocks = torch.rand(2, 4, nv, nv) < 0.4
    blocks[..., 0] = True
    plan = content.plan(blocks)
    # a block reads itself in any case
    blocks |= torch.eye(nv, dtype=torch.bool)
    out = attend(content.q, content.k, v, plan, scale=0.3, key_mask=content.key_mask)
    weights = dense_weights(content.q, content.k, 0.3, content.key_mask) * plan.mask()
    values = v.double().repeat_interleave(2, 1)
    rest = content.shares.masked_fill(blocks | ~content.is_coherent, 0)
    factor = slow_trust(content, plan.mask(), rest)
    expected = weights / weights.sum(-1, keepdim=True) @ values
    for b in range(2):
        for h in range(4):
            for i in range(nv):
                left = content.is_coherent[b, h, i] & ~blocks[b, h, i]
                shares = factor[b, h] * content.shares[b, h, i].double()
                rows = tokens_of(content.layout, i)
                expected[b, h, rows] *= 1 - shares[left].sum()
                for j in left.nonzero().flatten().tolist():
                    mean = values[b, h, tokens_of(content.layout, j)].mean(0)
                    expected[b, h, rows] += shares[j] * mean
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
def test_rectifying_a_full_plan_changes_nothing(grid):
    q, k, v = coherent(grid)
    layout = tile_layout_on(grid, (2, 2, 4), q.device)
    content = Content(grid, layout, q, k, 0.25, rectify=True)
    blocks = torch.ones(1, 1, content.num_blocks, content.num_blocks, dtype=torch.bool)
    out = attend(q, k, v, content.plan(blocks))
    expected = dense_weights(q, k, 0.25) @ v.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_content_of_heads_has_their_keys():
    content, _ = contents(GRID)
    heads = torch.tensor([3, 0, 1])
    some = content.of_heads(heads)
    torch.testing.assert_close(some.shares, content.shares[:, heads])
    torch.testing.assert_close(some.is_coherent, content.is_coherent[:, heads])


def test_rows_are_heads_of_samples_with_their_keys_and_mask():
    content, _ = contents(GRID)
    rows = list(content.rows())
    assert len(rows) == 8 and not rows[7].key_mask.all() and rows[3].key_mask.all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(row.shares[0, 0], content.shares[i // 4, i % 4])


@dataclass(frozen=True)
class Remembering(ContentMethod):
    """Reads all, and counts its searches.

    Args:
        tile, every, rectify: as in ContentMethod.
    """

    def search(self, content):
        number = torch.tensor(1) if content.memory is None else content.memory + 1
        blocks = torch.ones(1, 1, content.num_blocks, content.num_blocks, dtype=torch.bool)
        return content.plan(blocks), number


def test_a_search_starts_from_what_the_last_one_left():
    q, k, _ = coherent(GRID)
    method = Remembering()
    _, first = method.plan_with_memory(GRID, Reading(q, k))
    _, second = method.plan_with_memory(GRID, Reading(q, k, last=first))
    assert [int(x) for x in first] == [1, 1] and [int(x) for x in second] == [2, 2]


def test_plans_are_kept_for_some_steps():
    method = Remembering(every=3)
    assert [method.keeps(4, now, None) for now in (5, 6, 7)] == [True, True, False]
    assert not Remembering().keeps(4, 5, 50)
    method = Remembering(every=0.4)
    assert method.keeps(10, 29, 50) and not method.keeps(10, 30, 50)
    # of an unknown number of steps
    assert not method.keeps(4, 5, None)


def test_plans_hold_no_gradients():
    q, k, _ = (x.requires_grad_() for x in coherent(GRID))
    plan = Remembering(rectify=True).plan(GRID, Reading(q, k))
    assert not plan.gain.requires_grad and not plan.rest.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a number of steps of at least 1, or a fraction .*, got 0"),
        ({"every": 1.5}, "every must be a number of steps"),
        ({"tile": (0, 1, 1)}, "tile must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Remembering(**options)


def test_bad_content():
    q, k, _ = coherent(GRID)
    with pytest.raises(ValueError, match="give q and k"):
        Remembering().plan(GRID)
    with pytest.raises(ValueError, match="has 110 tokens but the plan is for 105"):
        Remembering().plan(Grid(3, 5, 7), Reading(q, k))
