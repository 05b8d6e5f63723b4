"""The step that moves the weights of a model in training.

Letters: B batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from video_training.batches import Batch
from video_training.noise import Target
from video_training.settings import Optimizer, Run
from video_training.trainee import Expert, Trainee, grid_size


@dataclass(frozen=True)
class Outcome:
    """What a step came to: means over its samples on this process."""

    loss: Tensor
    align: Tensor
    norm: Tensor


def learning_rate(step: int, options: Optimizer, run: Run) -> float:
    """The learning rate of a step, counted from 0."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        options.schedule,
        dummy,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=run.steps,
    )
    # a warm-up from 0 would waste the first step
    return options.lr * scheduler.lr_lambdas[0](step + (options.schedule != "constant"))


def take_step(trainee: Trainee, batches: Iterator[Batch]) -> Outcome:
    """Move the weights once.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; no weight was moved.
    """
    settings, accelerator, step = trainee.settings, trainee.accelerator, trainee.step
    run = settings.run
    name, losses, aligns, names = None, [], [], []
    for part in range(run.accumulate):
        batch = next(batches)
        shift = trainee.process.shift(batch.tokens)
        levels = {
            key: tuple(trainee.process.level(x, shift) for x in span)
            for key, span in trainee.ranges.items()
        }
        # one expert a step, the same on all processes, so that its gradients can be summed
        name = name or _draw_expert(trainee, levels)
        expert = trainee.experts[name]
        with accelerator.accumulate(expert.model):
            loss, align = _loss(trainee, name, batch, shift, levels[name], part)
            accelerator.backward(loss + settings.attention.align * align)
        losses.append(loss.detach())
        aligns.append(align.detach())
        names += batch.names
    found = [torch.stack(x).mean() for x in (losses, aligns)]
    _require_finite(trainee, found[0] + found[1], "loss", names)
    clip = settings.optimizer.clip or math.inf
    norm = accelerator.clip_grad_norm_(list(expert.trained.values()), clip)
    _require_finite(trainee, norm, "gradient", names)
    for group in expert.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings.optimizer, run)
    expert.optimizer.step()
    expert.optimizer.zero_grad()
    if expert.average:
        expert.average.step(expert.trained.values())
    trainee.step = step + 1
    return Outcome(*found, norm)


def _draw_expert(trainee: Trainee, levels: dict[str, tuple[float, float]]) -> str:
    if len(levels) == 1:
        return next(iter(levels))
    u = trainee.process.draw(1, _generator(trainee, 3)).item()
    return next(name for name, (low, high) in levels.items() if low <= u < high or u == high == 1)


def _loss(
    trainee: Trainee,
    name: str,
    batch: Batch,
    shift: float,
    levels: tuple[float, float],
    part: int,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the squared difference to the dense model."""
    process, settings = trainee.process, trainee.settings
    rank = trainee.accelerator.process_index
    spans = trainee.sparse.spans({name: levels}, trainee.step)
    # the same attention on all processes, so that none waits for another
    u = process.draw(1, _generator(trainee, 4, part), levels).item()
    span = next(span for span in reversed(spans) if span.low <= u)
    source = _generator(trainee, 5, part, rank)
    levels = process.draw(len(batch.latents), source, (span.low, span.high))
    noise = torch.randn(batch.latents.shape, generator=source).to(batch.latents.device)
    target = process.target(batch.latents.float(), noise, levels.to(noise.device), shift)
    # dropout draws from the global generator
    torch.manual_seed(_seed(trainee, 6, part, rank))
    expert = trainee.experts[name]
    align = torch.zeros((), device=noise.device)
    if settings.attention.align:
        dense = _dense(trainee, expert, batch, target)
    # one frame has no time to be sparse over
    is_picture = grid_size(expert.plain, batch)[0] == 1
    trainee.sparse.apply(expert.plain, None if is_picture else span.schedule)
    found = predict(expert.model, batch, target, trainee.dtype)
    if settings.attention.align:
        align = (found - dense).square().mean()
    error = (found - target.wanted).square().flatten(1).mean(1)
    return (target.weight * error).mean(), align


@torch.no_grad()
def _dense(trainee: Trainee, expert: Expert, batch: Batch, target: Target) -> Tensor:
    """What the dense model answers: without low-rank updates where there are some."""
    trainee.sparse.apply(expert.plain, None)
    is_lora = trainee.settings.tune.method == "lora"
    if is_lora:
        expert.plain.disable_adapters()
    try:
        return predict(expert.model, batch, target, trainee.dtype)
    finally:
        if is_lora:
            expert.plain.enable_adapters()


def predict(model: nn.Module, batch: Batch, target: Target, dtype: torch.dtype) -> Tensor:
    """What a transformer answers to the noisy latents (B, ...) of a batch."""
    time = target.timestep * batch.time_scale if batch.time_scale != 1 else target.timestep
    time = time.view(-1, *[1] * len(batch.time_shape)).expand(-1, *batch.time_shape)
    noisy = target.noisy
    if batch.condition is not None:
        noisy = torch.cat([noisy, batch.condition.to(noisy)], batch.axis)
    out = model(hidden_states=noisy.to(dtype), timestep=time, **batch.arguments, return_dict=False)
    out = out if isinstance(out, Tensor) else out[0]
    return out.float().narrow(batch.axis, 0, batch.latents.shape[batch.axis])


def _seed(trainee: Trainee, *entropy: int) -> int:
    given = (trainee.settings.run.seed, trainee.step, *entropy)
    return int(np.random.SeedSequence(given).generate_state(1)[0])


def _generator(trainee: Trainee, *entropy: int) -> torch.Generator:
    """Draws that follow from the seed, the step, and what they are for."""
    return torch.Generator().manual_seed(_seed(trainee, *entropy))


def _require_finite(trainee: Trainee, value: Tensor, what: str, names: list[str]) -> None:
    value = trainee.accelerator.reduce(value.detach().float(), "mean").item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {trainee.step + 1} on {', '.join(names)}; no weight "
            "was moved. Lower optimizer.lr, set optimizer.clip, or train with run.precision fp32"
        )
