"""Transformers in training with everything that moves them, and the step that does.

Letters: B batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from video_training.attention import Sparse
from video_training.batches import Batch, Loader
from video_training.noise import Process, Target
from video_training.pipeline import (
    first_line,
    load_scheduler,
    load_transformer,
    model_folder,
)
from video_training.prepare import Prepared
from video_training.settings import Optimizer, Run, Settings, Tune

from vidattn.commands.model import pipeline_config
from vidattn.grid import Size
from vidattn.pipelines.family import family_of

# the one adapter, as peft names it
ADAPTER = "default"


@dataclass
class Expert:
    """One transformer in training.

    Args:
        model: as the accelerator has prepared it.
        plain: without the wrappers of several processes.
    """

    model: nn.Module
    plain: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMAModel | None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that move, by name."""
        return {k: p for k, p in self.plain.named_parameters() if p.requires_grad}


@dataclass
class Trainee:
    """All that a step changes, or reads.

    Args:
        ranges: noise levels that experts share out, as shares of noise.
        dtype: of the weights that do not move.
        step: that comes next.
    """

    settings: Settings
    accelerator: Accelerator
    experts: dict[str, Expert]
    process: Process
    sparse: Sparse
    ranges: dict[str, tuple[float, float]]
    dtype: torch.dtype
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a step came to: means over its samples on this process."""

    loss: Tensor
    align: Tensor
    norm: Tensor
    names: tuple[str, ...] = field(default=())


def make_trainee(settings: Settings, accelerator: Accelerator) -> Trainee:
    """The transformers before the first step.

    Raises:
        ValueError: settings that do not fit the model.
    """
    folder, model = model_folder(settings.model.name), settings.model
    process = Process(load_scheduler(folder), settings.noise)
    ranges = expert_ranges(pipeline_config(str(folder)).get("boundary_ratio"), model.experts)
    sparse = Sparse(settings.attention)
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp and (settings.run.ema or not accelerator.is_fsdp2):
        raise ValueError("FSDP is trained with --fsdp_version 2, and without run.ema")
    set_seed(settings.run.seed)
    experts = {}
    # shards hold one dtype, and weights that move are float32
    needs_all = is_fsdp or settings.tune.method == "full"
    dtype = torch.float32 if needs_all else model.torch_dtype
    for name in model.experts:
        plain = load_transformer(folder, name, dtype)
        prepare_tuning(plain, settings.tune)
        if settings.run.checkpointing:
            plain.enable_gradient_checkpointing()
        plain.train()
        experts[name] = _make_expert(plain, settings, accelerator)
    return Trainee(settings, accelerator, experts, process, sparse, ranges, dtype)


def expert_ranges(
    boundary: float | None, experts: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    """The shares of noise that each expert serves.

    Args:
        boundary: between the experts of a pipeline; None where one serves all.

    Raises:
        ValueError: a second expert in a pipeline without a boundary.
    """
    if boundary is None:
        if len(experts) > 1:
            raise ValueError(
                f"model.experts {', '.join(experts)}: the pipeline has no boundary_ratio between "
                "experts; train one of them"
            )
        return {experts[0]: (0.0, 1.0)}
    served = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
    return {name: served[name] for name in experts}


def prepare_tuning(model: nn.Module, tune: Tune) -> None:
    """Let only those weights of a transformer move that are tuned.

    Raises:
        ValueError: target_modules that the model does not have.
    """
    if tune.method == "full":
        model.requires_grad_(True)
        return
    model.requires_grad_(False)
    targets = tune.target_modules
    config = LoraConfig(
        r=tune.r,
        lora_alpha=tune.lora_alpha,
        lora_dropout=tune.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=tune.use_dora,
        use_rslora=tune.use_rslora,
    )
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"tune.target_modules {targets!r}: {first_line(error)}") from error
    cast_training_params(model, torch.float32)


def _make_expert(plain: nn.Module, settings: Settings, accelerator: Accelerator) -> Expert:
    run = settings.run
    params = [p for p in plain.parameters() if p.requires_grad]
    optimizer = make_optimizer(params, settings.optimizer)
    model, optimizer = accelerator.prepare(plain, optimizer)
    expert = Expert(model, accelerator.unwrap_model(model), optimizer, None)
    if run.ema:
        expert.average = EMAModel(expert.trained.values(), decay=run.ema)
    return expert


def make_optimizer(params: list[nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of some parameters.

    Raises:
        ValueError: no such optimizer, or options that it does not take.
    """
    given = {"betas": options.betas, "eps": options.eps}
    try:
        return create_optimizer_v2(
            params,
            opt=options.name,
            lr=options.lr,
            weight_decay=options.weight_decay,
            **{key: value for key, value in given.items() if value is not None},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer '{options.name}': {error}") from error


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
    return Outcome(*found, norm, tuple(names))


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


def grid_size(plain: nn.Module, batch: Batch) -> Size:
    """(t, h, w) of the tokens of a batch."""
    arguments = {**batch.arguments, "hidden_states": batch.latents}
    return family_of(plain).place(plain, arguments).size


def check_sizes(trainee: Trainee, prepared: Prepared, loader: Loader) -> None:
    """Try the attention on every size of a set.

    Raises:
        ValueError: it cannot serve one of them.
    """
    plain = next(iter(trainee.experts.values())).plain
    firsts = {sample.size: sample for sample in reversed(prepared.samples)}
    sizes = {}
    for (frames, height, width), sample in firsts.items():
        batch = loader.read([sample], [False])
        sizes[f"clips of {frames} frames of {height} x {width}"] = grid_size(plain, batch)
    trainee.sparse.check(sizes)


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
