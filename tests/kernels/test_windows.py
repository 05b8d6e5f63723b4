"""Windows hold the tokens that rolling, padding and cutting a picture would put there."""

import itertools

import pytest
import torch

from vidattn.kernels.windows.windows import HIDDEN_SCORE, halo_windows, shifted_windows

SHIFTED = {
    "whole": ((6, 8), (3, 4), (0, 0)),
    "shifted": ((6, 8), (3, 4), (1, 2)),
    "padded": ((7, 5), (3, 4), (0, 0)),
    "shifted and padded": ((7, 5), (3, 4), (1, 2)),
    "shifted on one axis": ((7, 8), (3, 4), (0, 2)),
    "one window, shifted": ((3, 4), (3, 4), (1, 2)),
    "smaller than a window": ((2, 3), (5, 4), (2, 2)),
}


def by_moving(size, window, shift):
    """Tokens and regions of every window, from a picture that is rolled, padded and cut."""
    padded = [-(-extent // side) * side for extent, side in zip(size, window)]
    moved = {}
    for i, j in itertools.product(*map(range, padded)):
        if i < size[0] and j < size[1]:
            moved[i, j] = (i + shift[0]) % size[0], (j + shift[1]) % size[1]
        else:
            moved[i, j] = i, j
    tokens, regions = [], []
    for a, b in itertools.product(*(range(0, x, side) for x, side in zip(padded, window))):
        places = list(itertools.product(range(a, a + window[0]), range(b, b + window[1])))
        tokens.append([moved[x][0] * padded[1] + moved[x][1] for x in places])
        # behind the roll, the tokens after this place come from the other end of the picture
        cuts = [extent - step for extent, step in zip(padded, shift)]
        regions.append([(i >= cuts[0], j >= cuts[1]) for i, j in places])
    return padded, tokens, regions


@pytest.mark.parametrize("case", SHIFTED)
def test_shifted_windows(case):
    windows, padded = shifted_windows(*SHIFTED[case])
    size, tokens, regions = by_moving(*SHIFTED[case])
    assert list(padded) == size
    assert windows.queries.tolist() == tokens == windows.keys.tolist()
    assert sorted(sum(tokens, [])) == list(range(size[0] * size[1]))
    if windows.hidden is None:
        assert not any(SHIFTED[case][2])
        return
    # the engine reads the first table as one that hides nothing
    assert not windows.hidden[0].any()
    for kind, region in zip(windows.kind.tolist(), regions, strict=True):
        expected = [[0.0 if x == y else HIDDEN_SCORE for y in region] for x in region]
        assert windows.hidden[kind].tolist() == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_halo_windows(stride):
    (h, w), block, halo = (8, 12), 4, 3
    windows = halo_windows((h, w), block, halo, stride)
    edge = block + 2 * halo
    corners = list(itertools.product(range(0, h, block), range(0, w, block)))
    for (i, j), queries, keys in zip(corners, windows.queries, windows.keys, strict=True):
        steps = range(0, block, stride)
        width = w // stride
        expected = [(i + a) // stride * width + (j + b) // stride for a in steps for b in steps]
        assert queries.tolist() == expected
        around = itertools.product(
            range(i - halo, i - halo + edge), range(j - halo, j - halo + edge)
        )
        inside = [a * w + b if 0 <= a < h and 0 <= b < w else -1 for a, b in around]
        assert keys.tolist() == inside
    scores = torch.randn(2 * edge)
    sums = scores[:edge, None] + scores[edge:]
    torch.testing.assert_close(windows.slots @ scores, sums.flatten())
