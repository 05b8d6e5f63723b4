"""`vidattn tune`: mix methods by layer and head so that little is lost at a density."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm import tqdm

from vidattn.catalog import list_sparse_methods
from vidattn.choice import Choice
from vidattn.grid import Grid
from vidattn.methods import label
from vidattn.pipelines.patch import patch
from vidattn.pipelines.tuning import Losses, Probe, candidates_at
from vidattn.planning.learned import LearnedMethod
from vidattn.planning.method import Method
from vidattn.quality.likeness import psnr
from vidattn.runs.clip import first_frames, pipeline_arguments
from vidattn.runs.output import write_atomically
from vidattn.runs.request import Request
from vidattn.runs.serve import Outlook, foresee
from vidattn.runs.warn import warn_about
from vidattn.schedule import DenseGuard, Schedule
from vidattn.schedule_file import save_schedule
from vidattn.support.table import table

# densities that methods are tried at, as shares of the budget and of the whole
SHARES = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7)
LADDER = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
# budgets that are tried for a target, from the sparsest
BUDGETS = tuple(i / 32 for i in range(2, 32))


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
    goal = Goal(args.density, args.psnr_db)
    guard = Schedule((), DenseGuard(1, 0.1)).with_guard(args.dense_layers, args.dense_steps).guard
    outlook = foresee(args, args.requests)
    methods, left_out = able(outlook, args.choices, goal)
    pipe, requests = outlook.load(args)
    warn_about(pipe, args.model, requests)
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
    with write_atomically(args.path) as partial:
        comment = f"vidattn {' '.join(args.argv)}\n{figures}"
        save_schedule(losses.schedule(choice, guard), partial, comment)
    print(_table(losses, choice))
    for name, why in (left_out | losses.refusals).items():
        print(f"left out: {name}: {why}")
    print(f"\n{figures}\nwrote {args.path}: now run vidattn compare --schedule {args.path}")


def able(
    outlook: Outlook, choices: Sequence[Choice], goal: Goal
) -> tuple[dict[Method, Collection[str]], dict[str, str]]:
    """The methods that can serve the video, with the options that stay, and why others cannot.

    Args:
        choices: every method where there are none.

    Raises:
        ValueError: a method that was named cannot.
    """
    methods, left_out = {}, {}
    for choice in choices or map(Choice, list_sparse_methods()):
        method = choice.create()
        why = _why_none(method, choice.options, goal, outlook.grid)
        if why is None:
            methods[method] = choice.options
        elif choices:
            raise why
        else:
            left_out[choice.label] = str(why)
    return methods, left_out


def _why_none(
    method: Method, options: Collection[str], goal: Goal, grid: Grid | None
) -> ValueError | None:
    """Why a method serves a grid at none of the densities; None where it does, or nobody knows."""
    why = None
    if isinstance(method, LearnedMethod):
        return ValueError(
            "what it learns serves all heads of a layer, and tune gives every head a method of its "
            "own: leave it out"
        )
    for candidate in candidates_at({method: options}, goal.densities, grid) if grid else []:
        try:
            candidate.check(grid)
            return None
        except ValueError as error:
            why = why or error
    return why


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
    output = pipe(**pipeline_arguments(request, output_type))
    frames = first_frames(output).detach().float().cpu()
    return frames if output_type == "latent" else frames.clamp(0, 1)


def _table(losses: Losses, choice: Tensor) -> str:
    """One line for each method, by the share of the heads that follow it."""
    rows = []
    for number, candidate in enumerate(losses.candidates):
        heads = choice == number
        if heads.any():
            of_heads = (x[number][heads].mean().item() for x in _figures(losses))
            density, recall, error = of_heads
            alone = losses.errors[number].sum(-1).mean()
            share = f"{heads.float().mean():.1%}"
            read = f"{density:.3f}", f"{recall:.3f}"
            rows.append([label(candidate), share, *read, f"{error:.2e}", f"{alone:.2e}"])
    return table(["method", "heads", "density", "read", "squared error", "error if alone"], rows)


def _figures(losses: Losses) -> tuple[Tensor, Tensor, Tensor]:
    return losses.densities, losses.recalls, losses.errors
