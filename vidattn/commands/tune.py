"""`vidattn tune`: mix methods by layer and head so that little is lost at a density."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vidattn.commands.choice import SYNTAX, choices_of
from vidattn.commands.clip import pipeline_arguments
from vidattn.commands.model import load_pipeline
from vidattn.commands.output import writable_file, write_atomically
from vidattn.commands.request import (
    Request,
    add_model_arguments,
    add_request_arguments,
    positive_int,
    read_prompts,
    request_of,
    resolve,
)
from vidattn.measure import psnr
from vidattn.method import Method
from vidattn.methods import create_method, label, list_methods
from vidattn.pipelines.patch import patch
from vidattn.pipelines.tuning import Losses, Probe
from vidattn.schedule import DenseGuard, Schedule
from vidattn.schedule_file import save_schedule

EXAMPLES = """\
examples:
  vidattn tune --prompts prompts.txt --budget density=0.25
  vidattn tune --prompts prompts.txt --target psnr=30 --method topk --method radial:near=0,sink=no
  vidattn compare "a red bag" --schedule outputs/tuned.yaml --method topk:density=0.25"""

# densities that methods are tried at, as shares of the budget and of the whole
SHARES = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7)
LADDER = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
# budgets that are tried for a target, from the sparsest
BUDGETS = tuple(i / 32 for i in range(2, 32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt to a line"
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget", metavar="density=X", help="mean density of the layers that are not dense"
    )
    goal.add_argument(
        "--target", metavar="psnr=X", help="dB to the dense clips, with the least density"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="METHOD",
        help=f"{SYNTAX}; may be repeated (default: every method)",
    )  # fmt: skip
    parser.add_argument(
        "--looks", type=positive_int, default=3, metavar="N",
        help="denoising steps at which methods are tried (default 3)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("outputs/tuned.yaml"), metavar="FILE")
    add_request_arguments(parser)
    add_model_arguments(parser)


@dataclass(frozen=True)
class Goal:
    """What is asked for: a density, or a likeness in dB."""

    density: float | None = None
    psnr_db: float | None = None

    @property
    def densities(self) -> tuple[float, ...]:
        """Those at which methods are tried."""
        if self.density is None:
            return LADDER
        return tuple(share * self.density for share in SHARES if share * self.density <= 1)


def run(args: argparse.Namespace) -> None:
    """Measure the methods, choose among them, write the schedule."""
    goal = parse_goal(args.budget, args.target)
    requests = [request_of(args, prompt) for prompt in read_prompts(args.prompts)]
    args.method = args.method or [name for name in list_methods() if name != "dense"]
    choices = choices_of(args)
    methods = {create_method(choice.name, **choice.options): choice.options for choice in choices}
    path = writable_file(args.output, (".yaml", ".yml"))
    pipe = load_pipeline(args)
    requests = [resolve(pipe, request) for request in requests]
    console = Console(highlight=False)
    guard = Schedule((), DenseGuard(1, 0.1)).with_guard(args.dense_layers, args.dense_steps).guard
    losses, clips = measure(pipe, requests, methods, goal, guard, args.looks)
    if goal.density is not None:
        choice = losses.choose(goal.density)
    else:
        choice = reach(goal.psnr_db, losses, guard, _likeness(pipe, requests, clips))
    figures = (
        f"density {losses.mean(losses.densities, choice):.4f} where attention is sparse, "
        f"{losses.mean(losses.recalls, choice):.4f} of dense attention read,\n"
        f"squared error {losses.errors.gather(0, choice[None]).sum(2).mean():.2e} of the output of "
        f"a layer, on {len(requests)} prompt{'s' if len(requests) > 1 else ''}"
    )
    with write_atomically(path) as partial:
        comment = f"vidattn {' '.join(args.argv)}\n{figures}"
        save_schedule(losses.schedule(choice, guard), partial, comment)
    _print(console, losses, choice)
    console.print(f"\n{figures}", soft_wrap=True)
    console.print(f"wrote {path}", soft_wrap=True)


def parse_goal(budget: str | None, target: str | None) -> Goal:
    """The goal in the flags.

    Raises:
        ValueError: it is not written density=X or psnr=X, or no method can meet it.
    """
    flag, key, text = ("--budget", "density", budget)
    if budget is None:
        flag, key, text = "--target", "psnr", target
    name, _, value = text.partition("=")
    try:
        number = float(value) if name.strip() == key else None
    except ValueError:
        number = None
    if number is None:
        raise ValueError(f"{flag} must be {key}=X with a number for X, got {text!r}")
    if key == "density" and not 0 < number <= 1:
        raise ValueError(f"{flag} must be a density above 0 and at most 1, got {number:g}")
    if key == "psnr" and not 0 < number < 100:
        raise ValueError(f"{flag} must be a PSNR from 0 to 100 dB, got {number:g}")
    return Goal(density=number) if key == "density" else Goal(psnr_db=number)


def measure(
    pipe: object,
    requests: Sequence[Request],
    methods: Mapping[Method, Collection[str]],
    goal: Goal,
    guard: DenseGuard,
    looks: int,
) -> tuple[Losses, list[Tensor]]:
    """What the methods lose on dense runs of the requests, and what these runs gave.

    That is frames, or latents where the goal asks for no likeness.

    Raises:
        ValueError: no choice of the methods is as sparse as the goal, which one denoising step
            tells before the runs.
    """
    if goal.density is not None:
        trial = Probe(methods, goal.densities, guard, {0})
        with trial.watching(pipe):
            _run(pipe, replace(requests[0], num_inference_steps=1), "trial", "latent")
        trial.finish().choose(goal.density)
    num_steps = requests[0].num_inference_steps
    first = guard.num_steps(num_steps)
    # in the middle of as many equal stretches
    steps = {first + (2 * i + 1) * (num_steps - first) // (2 * looks) for i in range(looks)}
    probe, clips = Probe(methods, goal.densities, guard, steps), []
    output_type = "pt" if goal.density is None else "latent"
    for request in tqdm(requests, desc="measuring methods", unit="prompt"):
        with probe.watching(pipe):
            clips.append(_run(pipe, request, "dense run", output_type))
    return probe.finish(), clips


def reach(
    target_db: float,
    losses: Losses,
    guard: DenseGuard,
    likeness_db: Callable[[Schedule], float],
) -> Tensor:
    """The (L, H) choice with the least density whose clips are like the dense ones.

    The likeness is taken to grow with the density, so that few schedules need a try.

    Args:
        likeness_db: makes the clips of a schedule, and compares them.

    Raises:
        ValueError: not even the densest choice is like enough.
    """
    sparsest = losses.densities.min(0).values.mean().item()
    budgets = [budget for budget in BUDGETS if budget >= sparsest]
    found, low, high = None, 0, len(budgets)
    bar = tqdm(desc=f"looking for {target_db:g} dB", total=len(budgets).bit_length())
    while low < high:
        middle = (low + high) // 2
        choice = losses.choose(budgets[middle])
        is_like = likeness_db(losses.schedule(choice, guard)) >= target_db
        low, high = (low, middle) if is_like else (middle + 1, high)
        found = choice if is_like else found
        bar.update()
    bar.close()
    if found is None:
        raise ValueError(
            f"no mix below a density of {BUDGETS[-1]:.2f} reaches {target_db:g} dB on these "
            "prompts: lower the target, or guard more layers and steps"
        )
    return found


def _likeness(
    pipe: object, requests: Sequence[Request], clips: Sequence[Tensor]
) -> Callable[[Schedule], float]:
    def likeness_db(schedule: Schedule) -> float:
        values = []
        for request, dense in zip(requests, clips):
            with patch(pipe, schedule=schedule):
                values.append(psnr(_run(pipe, request, "trying a mix"), dense))
        return statistics.mean(values)

    return likeness_db


def _run(pipe: object, request: Request, name: str, output_type: str = "pt") -> Tensor:
    """(F, 3, H, W) frames in [0, 1], or latents."""
    pipe.set_progress_bar_config(desc=name)
    frames = pipe(**pipeline_arguments(request, output_type)).frames[0].detach().float().cpu()
    return frames if output_type == "latent" else frames.clamp(0, 1)


def _print(console: Console, losses: Losses, choice: Tensor) -> None:
    """One line for each method, by the share of the heads that follow it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", overflow="fold")
    for column in ("heads", "density", "read", "squared error", "error if alone"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, candidate in enumerate(losses.candidates):
        heads = choice == number
        if heads.any():
            of_heads = (x[number][heads].mean().item() for x in _figures(losses))
            density, recall, error = of_heads
            alone = losses.errors[number].sum(-1).mean()
            table.add_row(
                label(candidate), f"{heads.float().mean():.1%}", f"{density:.3f}",
                f"{recall:.3f}", f"{error:.2e}", f"{alone:.2e}",
            )  # fmt: skip
    console.print(table)
    for name, why in losses.refusals.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True)


def _figures(losses: Losses) -> tuple[Tensor, Tensor, Tensor]:
    return losses.densities, losses.recalls, losses.errors
