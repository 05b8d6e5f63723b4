"""Chooses a candidate for every place so that the errors add up to little at a mean density.

Letters: C candidates, P places.
"""

from __future__ import annotations

from torch import Tensor

# halvings of the interval of prices; more do not change a choice in float64
HALVINGS = 100
# densities in float32 may be above a budget that they were asked for
TOLERANCE = 1e-6


def allocate(errors: Tensor, densities: Tensor, budget: float) -> Tensor:
    """One candidate for every place, with the least sum of errors at a mean density.

    A price on density makes the places independent (Everett, "Generalized Lagrange Multiplier
    Method", 1963): the lowest price that keeps to the budget is found by bisection, and what it
    leaves unspent goes where it saves the most error for its density. The sum is the least possible
    for the density that is used up at that price, and at most one step of one place from the least
    for the budget.

    Args:
        errors: (C, P) of each candidate at each place, none of them negative.
        densities: (C, P) likewise.
        budget: the mean density that the choice may have.

    Returns:
        (P,) int64 candidates.

    Raises:
        ValueError: no choice is within the budget.

    >>> errors, densities = torch.tensor([[9.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.1], [0.9]])
    >>> allocate(errors, densities.expand(2, 2), 0.5)
    tensor([1, 0])
    """
    errors, densities = errors.double(), densities.double()
    least = densities.min(0).values.mean().item()
    if least > budget + TOLERANCE:
        raise ValueError(
            f"no candidates have a mean density of {budget:g} or less, the sparsest have "
            f"{least:.4f}: raise the budget, or add sparser candidates"
        )
    limit = (budget + TOLERANCE) * errors.shape[1]
    # at the highest price nothing but density counts, and error where densities are equal
    spread = densities.unique().diff()
    low, high = 0.0, 1 + errors.max().item() / (spread.min().item() if len(spread) else 1.0)
    choice = _cheapest(errors, densities, high)
    for _ in range(HALVINGS):
        price = (low + high) / 2
        found = _cheapest(errors, densities, price)
        if _total(densities, found) <= limit:
            high, choice = price, found
        else:
            low = price
    return _spend(errors, densities, choice, limit)


def _cheapest(errors: Tensor, densities: Tensor, price: float) -> Tensor:
    """(P,) the candidates of the least error plus price of density."""
    return (errors + price * densities).argmin(0)


def _total(values: Tensor, choice: Tensor) -> float:
    return values.gather(0, choice[None]).sum().item()


def _spend(errors: Tensor, densities: Tensor, choice: Tensor, limit: float) -> Tensor:
    """The choice, bettered at one place after the other until nothing fits any more."""
    choice = choice.clone()
    while True:
        saved = errors.gather(0, choice[None]) - errors
        cost = densities - densities.gather(0, choice[None])
        fits = (saved > 0) & (cost <= limit - _total(densities, choice))
        if not fits.any():
            return choice
        worth = (saved / cost.clamp_min(1e-12)).masked_fill(~fits, -1.0)
        candidate, place = divmod(worth.argmax().item(), errors.shape[1])
        choice[place] = candidate
