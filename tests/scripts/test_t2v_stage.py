"""The loop of a stage: its rates, its two checkpoints, and running for a given time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from t2v import checkpoint
from t2v import stage as stages
from t2v import team as teams

Team, run_team = teams.Team, teams.run_team

OPTIONS = {
    "phases": [{"until": 3}, {"until": 10}],
    "peak": {"adamw": 0.1},
    "schedule": {"warmup": 2, "decay": 4},
    "save_every": 100,
    "ema": 0.9,
}


class Line:
    """A stage that fits a line to noisy points, and the rates and steps it has taken."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        module, average = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        average.load_state_dict(module.state_dict())
        self.taken, self.rates = [], []
        optimizer = torch.optim.AdamW(module.parameters())
        optimizer.register_step_pre_hook(
            lambda *_: self.rates.append(optimizer.param_groups[0]["lr"])
        )
        optimizers = {"adamw": optimizer}
        self.stage = stages.Stage("line", module, optimizers, self.loss_at, OPTIONS, average)

    def loss_at(self, step: int) -> dict[str, torch.Tensor]:
        self.taken.append(step)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (self.stage.module(x) - x.sum(1, keepdim=True)).square().mean()}

    def train(self, work: Path, clock=None, finish: bool = False) -> bool:
        clock = clock or stages.Clock()
        return stages.train_stage(self.stage, work, Team(), clock, finish)


class Steps(stages.Clock):
    """A clock that stops after so many steps."""

    def __init__(self, left: int) -> None:
        self.left = left

    def over(self, team) -> bool:
        self.left -= 1
        return self.left <= 0


def contents(line: Line) -> list[torch.Tensor]:
    stage = line.stage
    return [p.detach() for m in (stage.module, stage.average) for p in m.parameters()]


@pytest.mark.parametrize("cuts", [[4], [1, 2, 1], [6], [7, 2]])
def test_a_run_of_several_times_equals_an_uncut_one(tmp_path, cuts):
    whole = Line()
    assert whole.train(tmp_path / "whole")
    assert whole.taken == list(range(10))
    taken = []
    for steps in cuts:
        line = Line()
        assert not line.train(tmp_path / "cut", Steps(steps))
        assert len(line.taken) == steps
        taken += line.taken
    last = Line()
    assert last.train(tmp_path / "cut")
    assert taken + last.taken == list(range(10))
    torch.testing.assert_close(contents(last), contents(whole), rtol=0, atol=0)


def test_rate_rises_stays_and_falls_over_the_last_steps(tmp_path):
    line = Line()
    line.train(tmp_path)
    expected = [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025]
    torch.testing.assert_close(line.rates, expected)
    assert not Line().taken and Line().train(tmp_path)


def test_fall_leaves_the_steady_part_to_go_on_from(tmp_path):
    assert not Line().train(tmp_path, Steps(3))
    early = Line()
    assert early.train(tmp_path, finish=True)
    assert early.taken == [3, 4, 5, 6]
    torch.testing.assert_close(early.rates, [0.1, 0.075, 0.05, 0.025])
    steady, fall = stages.files_of(tmp_path, "line")
    assert checkpoint.load_step(steady) == 3 and checkpoint.load_step(fall) == 7

    found = torch.nn.Linear(3, 1)
    assert stages.load_newest(tmp_path, "line", {"module": found}) == 7
    torch.testing.assert_close(found.weight, early.stage.module.weight, rtol=0, atol=0)

    # On another day: the fall of before is no part of it.
    later = Line()
    assert later.train(tmp_path)
    assert later.taken == list(range(3, 10))
    whole = Line()
    whole.train(tmp_path / "whole")
    torch.testing.assert_close(contents(later), contents(whole), rtol=0, atol=0)


def test_last_phase_goes_on():
    assert stages.phase_of(OPTIONS, 2) is OPTIONS["phases"][0]
    assert stages.phase_of(OPTIONS, 3) is stages.phase_of(OPTIONS, 99) is OPTIONS["phases"][1]


def test_clock():
    assert not stages.Clock().over(Team()) and not stages.Clock(60).over(Team())
    assert stages.Clock(0).over(Team())


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path):
    line = Line()
    weight = line.stage.module.weight
    fit = line.stage.loss_at

    def spoil(step: int) -> dict[str, torch.Tensor]:
        loss = fit(step)["loss"]
        return {"loss": loss + (weight.sum() * torch.inf if step == 4 else 0)}

    line.stage.loss_at = spoil
    assert line.train(tmp_path)
    assert len(line.rates) == 9 and weight.isfinite().all()
    assert all(p.isfinite().all() for p in contents(line))


def test_gradients_that_stay_so_end_the_run(tmp_path):
    line = Line()
    line.stage.options = OPTIONS | {"phases": [{"until": 99}]}
    line.stage.loss_at = lambda step: {"loss": line.stage.module.weight.sum() * torch.nan}
    with pytest.raises(ValueError, match="not finite in 20 steps in a row, up to step 20"):
        line.train(tmp_path)
    assert not list(tmp_path.iterdir())


def refuse(team, what: str) -> None:
    raise ValueError(f"no room for {what}")


def test_error_of_a_worker_is_said_plainly():
    with pytest.raises(ValueError, match="^no room for latents$"):
        run_team(2, refuse, "latents")


ORPHANS = """
import os, signal, sys, time
from t2v.team import run_team

def work(team):
    os.write(1, b"%d\\n" % os.getpid())  # whole, where print may write its newline apart
    time.sleep(120)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for its background jobs
    run_team(2, work)
"""


def runs(pid: int) -> bool:
    """Whether a process does anything still."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_workers_end_with_the_first_process(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    scripts = Path(teams.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(scripts)}
    command = [sys.executable, str(tmp_path / "orphans.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        workers = [int(first.stdout.readline()) for _ in range(2)]
        first.kill()
    for pid in workers:
        for _ in range(300):
            if not runs(pid):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"worker {pid} went on without the first process")
