"""The allocation of candidates against every choice there is."""

import itertools

import pytest
import torch

from vidattn.pipelines.allocation import allocate


def best(errors, densities, budget):
    """The least sum of errors over all choices within the budget."""
    places = range(errors.shape[1])
    sums = [
        sum(errors[c, p].item() for c, p in zip(choice, places))
        for choice in itertools.product(range(errors.shape[0]), repeat=len(places))
        if sum(densities[c, p].item() for c, p in zip(choice, places)) <= budget * len(places)
    ]
    return min(sums)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_near_the_best_of_all_choices(seed):
    torch.manual_seed(seed)
    densities = torch.rand(4, 5)
    # denser candidates err less, by and large
    errors = (1.2 - densities) ** 2 * torch.rand(4, 5) * torch.rand(5) * 10
    budget = 0.5
    choice = allocate(errors, densities, budget)
    places = torch.arange(5)
    assert densities[choice, places].mean() <= budget + 1e-6
    total, least = errors[choice, places].sum().item(), best(errors, densities, budget)
    # one place may be one step from the best
    assert least - 1e-6 <= total <= least + errors.max().item() / 4
    # no other candidate fits at any place and errs less
    spare = budget * 5 - densities[choice, places].sum()
    better = errors < errors[choice, places]
    assert not (better & (densities - densities[choice, places] < spare - 1e-6)).any()


def test_a_full_budget_errs_least_and_the_least_budget_is_met():
    torch.manual_seed(0)
    densities, errors = torch.rand(6, 8), torch.rand(6, 8)
    assert torch.equal(allocate(errors, densities, 1.0), errors.argmin(0))
    least = densities.min(0)
    budget = least.values.double().mean().item()
    assert torch.equal(allocate(errors, densities, budget), least.indices)


def test_density_goes_where_it_saves_most():
    densities = torch.tensor([[0.1], [0.5], [0.9]]).expand(3, 4)
    weights = torch.tensor([1.0, 100.0, 1.0, 0.1])
    errors = torch.tensor([[1.0], [0.4], [0.0]]) * weights
    choice = allocate(errors, densities, 0.4)
    assert choice[1] == 2 and choice[3] == 0
    assert densities[choice, torch.arange(4)].mean() <= 0.4


def test_ties_and_one_candidate():
    densities = torch.full((2, 3), 0.25)
    errors = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 4.0]])
    assert allocate(errors, densities, 0.25).tolist() == [0, 1, 0]
    assert allocate(errors[:1], densities[:1], 0.3).tolist() == [0, 0, 0]


def test_a_budget_that_nothing_meets():
    with pytest.raises(ValueError, match="density of 0.1 or less, the sparsest have 0.2500"):
        allocate(torch.rand(3, 4), torch.full((3, 4), 0.25), 0.1)
