"""Chunks cover every listed block once, within the budget."""

import pytest
import torch

from tests.kernels.attention_cases import random_blocks
from vidattn.grid import Grid
from vidattn.kernels.engines import chunks
from vidattn.kernels.engines.chunks import make_chunks


@pytest.mark.parametrize("block_bytes", [1, chunks.BUDGET // 5, chunks.BUDGET // 2, 1 << 40])
@pytest.mark.parametrize("copies", [1, 6])
def test_every_row_with_blocks_is_in_one_chunk(copies, block_bytes):
    lists = random_blocks(Grid(3, 13, 9)).lists
    made = make_chunks(lists, block_bytes, copies, (0, 8))
    rows = torch.cat([chunk.rows for chunk in made])
    assert torch.equal(rows.sort().values, lists.counts.nonzero().flatten())
    for chunk in made:
        assert lists.counts[chunk.rows].eq(chunk.count).all()
        assert chunk.first_partial == lists.num_full[chunk.rows].min()
        assert torch.equal(chunk.first[:, 0], lists.row_start[chunk.rows])
        assert copies % chunk.num_copies == 0
        spans = chunk.segments()
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
        assert spans[-1][1] == chunk.count
        in_flight = chunk.segment * len(chunk.rows) * chunk.num_copies * block_bytes
        smallest = chunk.segment == 1 and len(chunk.rows) * chunk.num_copies <= chunks.MIN_ROWS
        assert in_flight <= chunks.BUDGET or smallest


def test_heads_are_shared_out():
    lists = random_blocks(Grid(3, 13, 9)).lists
    nb = lists.num_rows // 8
    rows = torch.cat([chunk.rows for chunk in make_chunks(lists, 1, 1, (2, 5))])
    assert rows.min() >= 2 * nb and rows.max() < 5 * nb
