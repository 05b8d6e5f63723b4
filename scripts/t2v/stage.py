"""The loop in which every stage trains: at a steady rate, then at a falling one.

The steady part can go on for as long as one likes, in as many runs; the fall is short, starts from
its checkpoint, and leaves that as it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from t2v.checkpoint import learning_rate, load_checkpoint, load_step, read_fact, save_checkpoint
from t2v.team import Team
from torch import Tensor

# Some processors' bfloat16 products give the gradient of a kernel as NaN at some sizes.
MAX_SKIPPED = 20


class Clock:
    """The time a run may take; None for as long as it takes."""

    def __init__(self, seconds: float | None = None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def over(self, team: Team) -> bool:
        """Whether time is up, the same for every worker."""
        if self.end is None:
            return False
        return bool(team.total([torch.tensor([float(time.monotonic() >= self.end)])])[0])


@dataclass
class Stage:
    """What trains, and how.

    Args:
        name: of the checkpoint files.
        module: the weights.
        optimizers: by the name that `options["peak"]` has for their rate.
        loss_at: the values to report for a step, the loss first.
        options: the stage's part of the configuration.
        average: a copy of the module that follows it slowly, where there is one.
    """

    name: str
    module: torch.nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    loss_at: Callable[[int], dict[str, Tensor]]
    options: dict
    average: torch.nn.Module | None = None
    # steps in a row without an update
    skipped: int = 0

    @property
    def parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        """What a checkpoint holds."""
        average = {} if self.average is None else {"average": self.average}
        return {"module": self.module} | average | self.optimizers

    def step(self, step: int, end: float, team: Team) -> dict[str, Tensor]:
        """One update of the weights; rates have fallen at step `end`.

        A gradient that is not finite is left out.

        Raises:
            ValueError: it was not finite MAX_SKIPPED times in a row.
        """
        values = self.loss_at(step)
        self.module.zero_grad(set_to_none=True)
        next(iter(values.values())).backward()
        team.average_gradients(self.module)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        if not norm.isfinite():
            self.skipped += 1
            if self.skipped == MAX_SKIPPED:
                raise ValueError(
                    f"{self.name}: the gradient was not finite in {MAX_SKIPPED} steps in a row, "
                    f"up to step {step + 1}; lower `peak`, or change the sizes of the phase"
                )
            return values | {"norm": torch.zeros(()), "skipped": torch.ones(())}
        self.skipped = 0
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, peak=self.options["peak"][name], total=end, **self.options["schedule"]
                )
            optimizer.step()
        if self.average is not None:
            keep = min(self.options["ema"], (1 + step) / (10 + step))
            pairs = zip(self.average.parameters(), self.module.parameters(), strict=True)
            with torch.no_grad():
                for slow, fast in pairs:
                    slow.lerp_(fast, 1 - keep)
        return values | {"norm": norm, "skipped": torch.zeros(())}


def phase_of(options: dict, step: int) -> dict:
    """The phase that a step belongs to; the last one goes on for ever."""
    return next((p for p in options["phases"] if step < p["until"]), options["phases"][-1])


def files_of(work: Path, name: str) -> tuple[Path, Path]:
    """The checkpoints of a stage: of the steady part, and of the fall after it."""
    return work / f"{name}.safetensors", work / f"{name}_fall.safetensors"


def load_newest(work: Path, name: str, parts: dict[str, torch.nn.Module]) -> int:
    """Fill the parts from the checkpoint of more steps; 0 where there is none."""
    return load_checkpoint(max(files_of(work, name), key=load_step), parts)


def train_stage(stage: Stage, work: Path, team: Team, clock: Clock, finish: bool = False) -> bool:
    """Train in place from the newest checkpoint, and say whether the stage is finished.

    The fall takes the last `schedule["decay"]` of the configured steps. With `finish` it begins
    where the steady part is now.
    """
    steady, fall = files_of(work, stage.name)
    length = stage.options["schedule"]["decay"]
    step = load_checkpoint(steady, stage.parts)
    if not finish:
        begin = max(step, stage.options["phases"][-1]["until"] - length)
        step, over = _run(stage, (step, begin, float("inf")), steady, team, clock)
        if over:
            return False
    # A fall from an earlier checkpoint is not gone on with.
    done = load_step(fall)
    if done <= step + length and read_fact(fall, "begin") == step:
        done = load_checkpoint(fall, stage.parts)
    else:
        done = step
    done, _ = _run(stage, (done, step + length, step + length), fall, team, clock, begin=step)
    return done == step + length


def _run(
    stage: Stage,
    steps: tuple[int, int, float],
    path: Path,
    team: Team,
    clock: Clock,
    **facts: int,
) -> tuple[int, bool]:
    """Take steps from the first to before the second; the step reached, and whether time is up."""
    start, stop, end = steps
    bar = team.bar(start, stop, path.stem)
    for step in range(start, stop):
        values = stage.step(step, end, team)
        team.report(bar, step, values)
        over = clock.over(team)
        due = (step + 1) % stage.options["save_every"] == 0 or step + 1 == stop or over
        if due and team.rank == 0:
            save_checkpoint(path, stage.parts, step=step + 1, **facts)
        if over:
            return step + 1, True
    return stop, False
