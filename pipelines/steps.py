"""Counts the denoising steps of a generation from the time steps that a transformer is given."""

from __future__ import annotations

from torch import Tensor


class StepCounter:
    """Numbers the steps of one generation in the order in which their time steps appear.

    Passes of one step (with and without the prompt, two experts) carry the same time step. Without
    a pipeline to say so, a generation ends when a time step returns or time turns around.
    """

    def __init__(self, scheduler: object | None):
        self._scheduler = scheduler
        self._index: dict[float, int] = {}
        self._last: float | None = None
        self._direction = 0

    @property
    def num_seen(self) -> int:
        """Steps of this generation so far."""
        return len(self._index)

    @property
    def knows_num_steps(self) -> bool:
        """Whether a scheduler says how many steps there are, once a generation runs."""
        return hasattr(self._scheduler, "timesteps")

    @property
    def num_steps(self) -> int | None:
        """Steps that the scheduler of the pipeline is set to; None without one."""
        timesteps: Tensor | None = getattr(self._scheduler, "timesteps", None)
        return None if timesteps is None else len(timesteps)

    def reset(self) -> None:
        """Begin a new generation."""
        self._index.clear()
        self._last = None
        self._direction = 0

    def count(self, timestep: float) -> int:
        """Index of the step that a forward pass at ``timestep`` belongs to, from 0."""
        if self._scheduler is None and self._last is not None and timestep != self._last:
            direction = 1 if timestep > self._last else -1
            if timestep in self._index or direction == -self._direction:
                self.reset()
            else:
                self._direction = direction
        self._last = timestep
        return self._index.setdefault(timestep, len(self._index))
