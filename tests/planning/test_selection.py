"""Entries that are taken, against the same choice in a loop."""

import pytest
import torch

from vidattn.planning.selection import select_count, select_mass, select_share, select_until


def test_select_count_takes_the_best_of_every_row():
    scores = torch.rand(2, 3, 5, 7)
    chosen = select_count(scores, 3)
    assert (chosen.sum(-1) == 3).all()
    worst_in = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_out = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (worst_in > best_out).all()
    with pytest.raises(ValueError, match="from 1 to 7"):
        select_count(scores, 8)


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 1.0])
def test_select_mass_keeps_the_shortest_prefix_that_reaches_it(mass):
    scores = torch.rand(2, 3, 5, 11).softmax(-1)
    scores[0, 0, 0] = torch.tensor([0.5, 0.5] + [0.0] * 9)
    chosen = select_mass(scores, mass)
    for row, picked in zip(scores.view(-1, 11).tolist(), chosen.view(-1, 11)):
        total, expected = 0.0, set()
        for j in sorted(range(11), key=lambda j: -row[j]):
            # a full share takes what got nothing too: it may have been rounded to nothing
            if mass < 1 and (total >= mass * sum(row) or row[j] == 0):
                break
            total += row[j]
            expected.add(j)
        assert set(picked.nonzero().flatten().tolist()) == expected
    with pytest.raises(ValueError, match="above 0"):
        select_mass(scores, 0.0)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.77, 1.0])
def test_select_share_comes_nearest_to_a_share_of_the_tokens(share):
    scores, tokens = torch.randn(2, 3, 5, 11), torch.randint(1, 9, (11,))
    chosen = select_share(scores, tokens, share)
    for row, picked in zip(scores.view(-1, 11).tolist(), chosen.view(-1, 11)):
        ranked = sorted(range(11), key=lambda j: -row[j])
        sizes = [sum(tokens[j].item() for j in ranked[:n]) for n in range(1, 12)]
        distance = [abs(size - share * tokens.sum().item()) for size in sizes]
        count = int(picked.sum())
        assert set(picked.nonzero().flatten().tolist()) == set(ranked[:count])
        assert distance[count - 1] == min(distance)
    with pytest.raises(ValueError, match="above 0"):
        select_share(scores, tokens, 0.0)


@pytest.mark.parametrize("need", [0.0, 3.0, 11.5, 1e9])
def test_select_until_takes_the_best_until_a_need_is_met(need):
    scores, worth = torch.randn(2, 3, 9), torch.randint(1, 5, (9,))
    scores[0, 0, 4] = -torch.inf
    always = torch.zeros(9, dtype=torch.bool)
    always[[2, 5]] = True
    chosen = select_until(scores, worth, torch.tensor([need]), always)
    for row, picked in zip(scores.view(-1, 9).tolist(), chosen.view(-1, 9)):
        expected, held = {2, 5}, 0.0
        for j in sorted(set(range(9)) - {2, 5}, key=lambda j: -row[j]):
            if held >= need or row[j] == -torch.inf:
                break
            expected.add(j)
            held += worth[j].item()
        assert set(picked.nonzero().flatten().tolist()) == expected


def test_nothing_waits_for_the_device():
    scores, tokens = torch.empty(2, 4, 5, 7, device="meta"), torch.ones(7, device="meta")
    never = torch.zeros(7, dtype=torch.bool, device="meta")
    chosen = (
        select_count(scores, 2),
        select_mass(scores, 0.5),
        select_share(scores, tokens, 0.5),
        select_until(scores, tokens, tokens[:1], never),
    )
    assert all(x.shape == scores.shape and x.is_meta for x in chosen)
