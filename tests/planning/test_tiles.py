"""Pairs of tiles against loops over them."""

import itertools

import pytest

from vidattn.planning.tiles import (
    axis_share,
    by_tile,
    distances,
    fit_reach,
    reaches,
    tile_counts,
    within,
)

COUNTS = (3, 1, 5)


def test_cut_tiles_count():
    assert tile_counts((7, 8, 1), (3, 4, 2)) == (3, 2, 1)


def test_distances_and_boxes_are_those_of_places():
    places = list(itertools.product(*map(range, COUNTS)))
    t, h, w = (x.expand(*COUNTS, *COUNTS).reshape(15, 15) for x in distances(COUNTS))
    box = within(COUNTS, (1, 0, 2))
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        gap = [abs(x - y) for x, y in zip(a, b)]
        assert [t[i, j], h[i, j], w[i, j]] == gap
        assert box[i, j] == (gap[0] <= 1 and gap[1] <= 0 and gap[2] <= 2)


def test_boxes_grow_by_one_step_from_a_tile_to_the_grid():
    boxes = reaches(COUNTS)
    assert boxes[0] == (0, 0, 0) and boxes[-1] == (2, 0, 4)
    for small, large in zip(boxes, boxes[1:]):
        assert sorted(b - a for a, b in zip(small, large)) == [0, 0, 1]
    # half way along one axis is half way along the other
    assert (1, 0, 2) in boxes


def test_share_of_an_axis_weighs_tiles_by_their_tokens():
    pairs = itertools.product(range(7), repeat=2)
    kept = sum(abs(x // 3 - y // 3) in (0, 2) for x, y in pairs)
    assert axis_share(7, 3, lambda gap: gap != 1) == pytest.approx(kept / 49)


def test_the_nearest_box_is_found():
    counts = (4, 3, 5)

    def density(box):
        return within(counts, box).double().mean().item()

    for wanted in (0.05, 0.2, 0.5, 0.9, 1.0):
        found = density(fit_reach(wanted, counts, density, ""))
        assert abs(found - wanted) <= min(abs(density(x) - wanted) for x in reaches(counts))
    with pytest.raises(ValueError, match="density 0.001 is out of reach: the least is .* do this"):
        fit_reach(0.001, counts, density, "; do this")


def test_no_box_beside_the_found_one_is_nearer():
    """With lines beside the box, the nearest one is several steps from those of the list."""
    counts = (2, 3, 13)

    def density(box):
        lines = sum((gap == 0).int() for gap in distances(counts)) >= 2
        return (within(counts, box) | by_tile(counts, lines)).double().mean().item()

    for wanted in (0.25, 0.3, 0.4, 0.5, 0.6):
        found = fit_reach(wanted, counts, density, "")
        for axis, step in itertools.product(range(3), (-1, 1)):
            beside = tuple(far + step * (i == axis) for i, far in enumerate(found))
            if all(0 <= far < n for far, n in zip(beside, counts)):
                assert abs(density(found) - wanted) <= abs(density(beside) - wanted)
