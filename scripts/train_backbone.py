"""Train a backbone: python scripts/train_backbone.py configs/backbones/dinat_fashion_mnist.yaml.

From scratch, from given weights, by a linear or an efficient probe, or by LoRA, as the
configuration says. On several GPUs, with FSDP too: accelerate launch scripts/train_backbone.py ...
A run that was interrupted goes on from its last checkpoint when it is started again.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from backbone_training.checkpoint import load_checkpoint, save_checkpoint
from backbone_training.data import (
    Images,
    ShuffledBatches,
    make_loader,
    ordered_batches,
)
from backbone_training.log import COLUMNS, draw_log
from backbone_training.model import Description, merge, save_weights, set_training
from backbone_training.scores import Scores, score
from backbone_training.settings import Settings
from backbone_training.sources import Source, open_source, require_same_classes
from backbone_training.trainee import Trainee, make_trainee, take_step
from runs.checkpoints import find_checkpoint
from runs.log import Log
from runs.settings_file import read_settings
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vidattn.runs.output import writable_folder

CHECKPOINTS = "checkpoints"


def load_training(trainee: Trainee, source: Source) -> DataLoader:
    """The batches that are still to come, of all epochs."""
    settings, run = trainee.settings, trainee.settings.run
    images = Images(
        source,
        settings.input,
        strict=settings.data.strict,
        augment=settings.augment,
        seed=run.seed,
    )
    batches = ShuffledBatches(
        len(images),
        settings.data.batch_size,
        trainee.steps_per_epoch * run.accumulate,
        span=(trainee.progress.step * run.accumulate, trainee.steps * run.accumulate),
        seed=run.seed,
        place=trainee.place,
    )
    return make_loader(images, batches, settings.data.workers)


def test_model(trainee: Trainee, source: Source) -> Scores:
    """Scores on the test images."""
    data = trainee.settings.data
    images = Images(source, trainee.settings.input, strict=data.strict)
    batches = ordered_batches(len(images), data.batch_size, trainee.place)
    found = score(trainee.model, make_loader(images, batches, data.workers), trainee.accelerator)
    set_training(trainee.model, trainee.settings.tune.method)
    return found


def keep_weights(trainee: Trainee, name: str) -> None:
    """Write the weights as a file that stands alone, and low-rank updates beside it."""
    settings, folder = trainee.settings, Path(trainee.settings.run.output)
    state = trainee.accelerator.get_state_dict(trainee.model)
    if not trainee.accelerator.is_main_process:
        return
    description = Description(
        settings.model.name,
        trainee.classes,
        settings.input,
        settings.model.options,
        settings.tune.queries if settings.tune.method == "probe" else None,
    )
    if settings.tune.method == "lora":
        trainee.plain.save_pretrained(folder / f"{name}-lora", state_dict=state)
        state = merge(state, description, settings.tune)
    save_weights(folder / f"{name}.safetensors", state, description)


def test_and_keep(trainee: Trainee, tests: Source) -> Scores:
    """Test the averaged weights, or the weights where there is no average, and keep the best."""
    average, progress = trainee.average, trainee.progress
    with average.in_place(trainee.plain) if average else nullcontext():
        found = test_model(trainee, tests)
        if found.top1 > progress.best:
            progress.best = found.top1
            keep_weights(trainee, "best")
        if progress.step == trainee.steps:
            keep_weights(trainee, "last")
    return found


def mean_loss(trainee: Trainee, losses: list[Tensor]) -> float:
    """Mean over steps and processes.

    Raises:
        FloatingPointError: it is not finite.
    """
    loss = trainee.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
    if not math.isfinite(loss):
        folder = Path(trainee.settings.run.output) / CHECKPOINTS
        raise FloatingPointError(
            f"the loss is {loss} at step {trainee.progress.step}; the last checkpoint, "
            f"{find_checkpoint(folder)}, is from before. Lower optimizer.lr, set optimizer.clip, "
            "or train with run.precision 'no'"
        )
    return loss


def fit(trainee: Trainee, source: Source, tests: Source) -> None:
    """Take the steps that are left, with their log, tests and checkpoints."""
    run, progress, accelerator = trainee.settings.run, trainee.progress, trainee.accelerator
    folder, is_main = Path(run.output), trainee.accelerator.is_main_process
    log = Log(folder, COLUMNS, progress.step, run.tensorboard) if is_main else None
    bar = tqdm(total=trainee.steps, initial=progress.step, disable=not is_main, ncols=100)
    batches, unreadable = iter(load_training(trainee, source)), set(progress.unreadable)
    losses, before = [], time.perf_counter()
    set_training(trainee.model, trainee.settings.tune.method)
    while progress.step < trainee.steps:
        rate = trainee.optimizer.param_groups[-1]["lr"]
        losses.append(take_step(trainee, batches, unreadable))
        bar.update()
        step, is_last = progress.step, progress.step == trainee.steps
        epoch, within = divmod(step, trainee.steps_per_epoch)
        line = {"epoch": step / trainee.steps_per_epoch}
        if step % run.log_every == 0 or is_last:
            line |= {"lr": rate, "loss": mean_loss(trainee, losses)}
            unreadable = set(gather_object(sorted(unreadable)))
            progress.unreadable, losses = sorted(unreadable), []
            bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if within == 0 and (epoch % run.evaluate_every == 0 or is_last):
            found = test_and_keep(trainee, tests)
            line |= {"test_loss": found.loss, "top1": found.top1, "top5": found.top5}
            if is_main:
                bar.write(f"epoch {epoch}: {found}")
        now = time.perf_counter()
        progress.seconds, before = progress.seconds + now - before, now
        if is_main and len(line) > 1:
            log.add(step, **line, unreadable=len(unreadable), seconds=progress.seconds)
        if is_main and "top1" in line:
            draw_log(log.path, folder / "curves.png")
        if step % run.save_every == 0 or is_last:
            save_checkpoint(accelerator, folder / CHECKPOINTS, trainee.settings, step)
    bar.close()
    if is_main:
        log.close()


def report(trainee: Trainee, source: Source) -> None:
    """Say what came of it."""
    run, progress = trainee.settings.run, trainee.progress
    say = trainee.accelerator.print
    if progress.unreadable:
        names = ", ".join(source.describe(i) for i in progress.unreadable[:3])
        say(f"skipped {len(progress.unreadable)} images that cannot be read: {names} ...")
    trained = sum(p.numel() for p in trainee.plain.parameters() if p.requires_grad)
    say(
        f"best top-1 {progress.best:.2f} % in {progress.step} steps and {progress.seconds:.0f} s, "
        f"{trained:,} parameters trained: {run.output}/best.safetensors"
    )


def train(settings: Settings) -> None:
    """Run from the last checkpoint, or the beginning, to the end."""
    run, data = settings.run, settings.data
    accelerator = Accelerator(
        mixed_precision=run.precision, gradient_accumulation_steps=run.accumulate
    )
    source, tests = open_source(data.source, data.train), open_source(data.source, data.test)
    require_same_classes(tests, source.classes, f"split '{data.train}'")
    trainee = make_trainee(settings, accelerator, source.classes, len(source.labels))
    if found := find_checkpoint(Path(run.output) / CHECKPOINTS):
        load_checkpoint(accelerator, found, settings)
        trainee.scheduler.step_update(trainee.progress.step)
        accelerator.print(f"going on from step {trainee.progress.step} of {trainee.steps}: {found}")
    fit(trainee, source, tests)
    report(trainee, source)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file, for example one in configs/backbones")
    parser.add_argument("--output", help="folder to use in place of the file's run.output")
    parser.add_argument(
        "--strict", action="store_true", help="end at an image that cannot be read; see data.strict"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting"
    )
    arguments = parser.parse_args()
    changes = [*arguments.set, *(["data.strict=true"] if arguments.strict else [])]
    if arguments.output:
        changes.append(f"run.output={arguments.output}")
    settings = None
    try:
        settings = read_settings(Settings, arguments.config, changes)
        writable_folder(Path(settings.run.output), "run.output")
        train(settings)
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        last = find_checkpoint(Path(settings.run.output) / CHECKPOINTS) if settings else None
        print(f"\ninterrupted; {last or 'no checkpoint yet'}; the same command goes on from there")
        sys.exit(130)


if __name__ == "__main__":
    main()
