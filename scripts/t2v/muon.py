"""Muon (Jordan et al., 2024): momentum whose matrices are orthogonalised, batched by shape."""

import torch
from t2v.precision import fast_dtype
from t2v.team import Team


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Near-orthogonal factors of (N, R, K) matrices by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(fast_dtype())
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).contiguous()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices, its step scaled to AdamW's size.

    Every worker of a team holds the same gradients, so each orthogonalises its share only.
    """

    def __init__(
        self, params, team: Team, *, lr: float = 1e-3, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})
        self.team = team

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter; one without a gradient counts as having a zero one."""
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            for p, update in zip(params, self._updates(params, group["momentum"]), strict=True):
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)

    def _updates(self, params: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        mixed = [p.grad.lerp(self.state[p]["momentum"], momentum).flatten(1) for p in params]
        updates, by_shape = [torch.zeros_like(m) for m in mixed], {}
        for i in range(self.team.rank, len(mixed), self.team.size):
            by_shape.setdefault(mixed[i].shape, []).append(i)
        for picks in by_shape.values():
            for i, update in zip(picks, orthogonalise(torch.stack([mixed[i] for i in picks]))):
                updates[i] = update
        return self.team.total(updates)
