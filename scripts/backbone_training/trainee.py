"""A model with everything that moves it, and the step that does."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from backbone_training.checkpoint import Average, Progress
from backbone_training.data import seed_everything
from backbone_training.model import build_start
from backbone_training.settings import Settings
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from vidattn.backbones.layers.head_routing import balance_losses

# weight of what keeps all heads of MoH-ViT in use, as in the paper
BALANCE = 0.01


@dataclass(frozen=True)
class Trainee:
    """A model in training.

    Args:
        steps, steps_per_epoch: of the whole run.
        average: of the weights, where one is kept.
        mixup: what mixes the images of a batch, if anything does.
    """

    settings: Settings
    accelerator: Accelerator
    classes: tuple[str, ...]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    steps: int
    steps_per_epoch: int
    progress: Progress
    average: Average | None
    mixup: Mixup | None

    @property
    def plain(self) -> nn.Module:
        """The model without the wrappers of several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def place(self) -> tuple[int, int]:
        """Rank of this process, and number of processes."""
        return self.accelerator.process_index, self.accelerator.num_processes


def make_trainee(
    settings: Settings, accelerator: Accelerator, classes: tuple[str, ...], num_images: int
) -> Trainee:
    """The model before its first step.

    Raises:
        ValueError: fewer images than a step takes, or settings that do not fit the model.
    """
    run, data = settings.run, settings.data
    per_step = data.batch_size * run.accumulate * accelerator.num_processes
    steps_per_epoch = num_images // per_step
    if not steps_per_epoch:
        raise ValueError(
            f"a step takes {per_step} images, '{data.source}' has {num_images} to train on; "
            "lower data.batch_size or run.accumulate"
        )
    set_seed(run.seed, deterministic=run.deterministic)
    model = build_start(settings.model, settings.tune, len(classes), settings.input)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, settings, per_step))
    scheduler, steps = make_scheduler(optimizer.optimizer, settings, steps_per_epoch)
    if (
        run.ema
        and accelerator.distributed_type == DistributedType.FSDP
        and not accelerator.is_fsdp2
    ):
        raise ValueError("run.ema needs version 2 of FSDP: accelerate launch --fsdp_version 2")
    trainee = Trainee(
        *(settings, accelerator, classes, model, optimizer, scheduler, steps, steps_per_epoch),
        progress=Progress(),
        average=Average(accelerator.unwrap_model(model), run.ema) if run.ema else None,
        mixup=make_mixup(settings, len(classes)),
    )
    accelerator.register_for_checkpointing(trainee.progress)
    if trainee.average:
        accelerator.register_for_checkpointing(trainee.average)
    return trainee


def make_optimizer(model: nn.Module, settings: Settings, per_step: int) -> torch.optim.Optimizer:
    """The optimizer for steps of so many images."""
    options = settings.optimizer
    scale = per_step / options.base_batch if options.base_batch else 1.0
    given = {"betas": options.betas, "eps": options.eps, "layer_decay": options.layer_decay}
    try:
        return create_optimizer_v2(
            model,
            opt=options.name,
            lr=options.lr * scale,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **{key: value for key, value in given.items() if value is not None},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer '{options.name}': {error}") from error


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: Settings, steps_per_epoch: int
) -> tuple[Scheduler, int]:
    """The learning rate of every step, and the number of steps."""
    schedule = settings.schedule
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        # a polynomial of degree one
        sched="poly" if schedule.name == "linear" else schedule.name,
        decay_rate=1.0,
        num_epochs=schedule.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        cooldown_epochs=schedule.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler, epochs * steps_per_epoch


def make_mixup(settings: Settings, num_classes: int) -> Mixup | None:
    """What mixes the images of a batch, if anything does."""
    augment = settings.augment
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )


def take_step(trainee: Trainee, batches: Iterator, unreadable: set[int]) -> Tensor:
    """Move the weights once; returns the mean loss over the images of this process.

    Args:
        unreadable: gets the indices of the images that could not be read.
    """
    settings, accelerator, model = trainee.settings, trainee.accelerator, trainee.model
    step, device = trainee.progress.step, accelerator.device
    total = torch.zeros((), device=device)
    # what mixes images smooths their labels too
    smoothing = 0.0 if trainee.mixup else settings.augment.smoothing
    for part in range(settings.run.accumulate):
        images, labels, failed = next(batches)
        unreadable.update(failed[failed >= 0].tolist())
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        seed_everything(settings.run.seed, step, part, accelerator.process_index)
        if trainee.mixup:
            images, labels = trainee.mixup(images, labels)
        with accelerator.accumulate(model):
            with balance_losses(model) as balances:
                scores = model(images).float()
            loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
            if balances:
                loss = loss + BALANCE * torch.stack(balances).float().mean()
            accelerator.backward(loss)
            if settings.optimizer.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), settings.optimizer.clip)
            trainee.optimizer.step()
            trainee.optimizer.zero_grad()
        total += loss.detach() / settings.run.accumulate
    trainee.progress.step = step + 1
    trainee.scheduler.step_update(step + 1)
    if trainee.average:
        trainee.average.update(trainee.plain, step + 1)
    return total
