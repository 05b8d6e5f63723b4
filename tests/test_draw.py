"""What the pictures show is what the plan says; what matplotlib makes of it is a file."""

import ast
import inspect

import pytest
import torch
from torch.testing import assert_close

import vidattn.draw
from vidattn.draw import block_map, draw, keys_of, middle_token
from vidattn.grid import Grid, raster_layout
from vidattn.methods import plan
from vidattn.plan import Plan

GRIDS = [
    Grid(5, 7, 3),
    Grid(1, 5, 4),
    Grid(3, 5, 7, text=9),
    Grid(3, 5, 7, text=9, text_first=True),
]
CHOICES = [
    ("dense", {}),
    ("radial", {"near": 0, "sink": False, "decay": 0.2, "tile": (1, 2, 2)}),
    ("neighborhood", {"window": (3, 3, 1), "dilation": (1, 2, 1)}),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_the_keys_of_a_token_are_its_row_of_the_mask(name, options, grid):
    made = plan(name, grid, **options)
    for query in (0, middle_token(made), grid.num_tokens - 1):
        assert_close(keys_of(made, query), made.mask()[0, 0, query])


def test_each_head_has_its_own_keys():
    grid = Grid(2, 4, 4)
    blocks = torch.rand(1, 3, 4, 4) < 0.5
    made = Plan.from_blocks(grid, raster_layout(grid, 8), blocks)
    for head in range(3):
        assert_close(keys_of(made, 17, head), made.mask()[0, head, 17])
        assert_close(block_map(made, head=head)[0].bool(), blocks[0, head])


@pytest.mark.parametrize(("query", "head"), [(-1, 0), (32, 0), (0, 3), (0, -1)])
def test_a_query_or_head_that_is_not_there_is_refused(query, head):
    grid = Grid(2, 4, 4)
    made = Plan.from_blocks(grid, raster_layout(grid, 8), torch.ones(1, 3, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be"):
        keys_of(made, query, head)


def test_the_block_map_tells_whole_blocks_from_partial_ones():
    made = plan("neighborhood", Grid(5, 7, 6), window=(3, 3, 5), tile=(2, 2, 2))
    full, part = block_map(made)
    lists = made.lists
    assert full.shape == (made.layout.num_blocks,) * 2
    assert int(part.sum()) == int(lists.is_partial.sum()) > 0
    assert int((full + part).sum()) == lists.key_block.numel()
    assert (full + part).max() == 1


def test_a_coarse_block_map_keeps_the_shares():
    made = plan("radial", Grid(7, 8, 8), density=0.6, tile=(1, 4, 4))
    fine, coarse = block_map(made)[0], block_map(made, cells=7)[0]
    assert coarse.shape == (7, 7)
    assert_close(coarse, fine.view(7, 4, 7, 4).mean((1, 3)))


def test_a_grid_of_a_hundred_thousand_tokens_is_drawn(tmp_path):
    made = plan("neighborhood", Grid(33, 45, 80, text=256), window=(9, 15, 21))
    draw({"neighborhood": made}).savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_every_plan_gets_a_row():
    plans = {name: plan(name, GRIDS[2], **options) for name, options in CHOICES}
    figure = draw(plans)
    words = " ".join(text.get_text() for text in figure.texts)
    assert len(figure.axes) == 2 * len(plans)
    assert all(name in words for name in plans) and "at most 1.0× faster" in words
    with pytest.raises(ValueError, match="at least one"):
        draw({})


def test_matplotlib_is_imported_only_to_draw():
    """Importing vidattn.draw must not cost the import of matplotlib."""
    tree = ast.parse(inspect.getsource(vidattn.draw))
    names = [
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    ]
    assert not any(name and name.startswith("matplotlib") for name in names)
