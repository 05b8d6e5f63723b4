"""Train a video model with sparse attention on your own clips.

    python scripts/train_video.py configs/training/wan2.1-1.3b-lora.yaml --set data.source=clips

By low-rank updates or all weights, as the configuration says. On several GPUs, with FSDP too:
accelerate launch scripts/train_video.py ... A run that was interrupted goes on from its last
checkpoint when it is started again.
"""

import argparse
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from runs.checkpoints import find_checkpoint
from runs.log import Log
from runs.settings_file import read_settings
from safetensors.torch import save_file
from tqdm import tqdm
from video_training.adapter import adapter_state, check_layouts, write_adapter
from video_training.attention import Sparse, schedule_text
from video_training.batches import Loader, Order
from video_training.checkpoint import FOLDER, load_newest, save_checkpoint, whole
from video_training.pipeline import load_transformer, model_folder
from video_training.prepare import Preparation, Prepared
from video_training.settings import Settings
from video_training.step import take_step
from video_training.trainee import ADAPTER, Trainee, check_sizes, make_trainee

from vidattn.runs.output import writable_folder, write_atomically

# what learned methods have in all layers, for Handle.load_parameters
LEARNED = "learned.safetensors"
COLUMNS = ("step", "loss", "align", "norm", "lr", "waited", "peak_gib", "seconds")


class Signals:
    """Notes SIGTERM and Ctrl-C, so that the step that runs can end and be kept.

    A second one ends the run at once.
    """

    def __init__(self):
        self.seen: int | None = None

    @contextmanager
    def noted(self):
        """Note signals within a block."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.seen is not None:
            raise KeyboardInterrupt
        self.seen = number

    def any(self, accelerator: Accelerator) -> bool:
        """Whether some process has seen one."""
        found = torch.tensor(float(self.seen is not None), device=accelerator.device)
        return bool(accelerator.reduce(found, "sum") > 0)


def fit(trainee: Trainee, prepared: Prepared, signals: Signals) -> None:
    """Take the steps that are left, with their log and checkpoints; ends early at a signal.

    Raises:
        FloatingPointError: the loss is not finite.
        OSError: a checkpoint cannot be written.
    """
    settings, accelerator, run = trainee.settings, trainee.accelerator, trainee.settings.run
    place = accelerator.process_index, accelerator.num_processes
    order = Order(prepared.samples, settings.data.batch_size, seed=run.seed, place=place)
    loader = Loader(prepared, order, settings, device=accelerator.device, dtype=trainee.dtype)
    check_sizes(trainee, prepared, loader)
    is_main, folder = accelerator.is_main_process, Path(run.output)
    log = Log(folder, COLUMNS, trainee.step, run.tensorboard) if is_main else None
    bar = tqdm(total=run.steps, initial=trainee.step, disable=not is_main, ncols=100)
    batches = loader.batches(trainee.step * run.accumulate, run.steps * run.accumulate)
    outcomes, before, stopped = [], time.perf_counter(), False
    while trainee.step < run.steps and not stopped:
        outcomes.append(take_step(trainee, batches))
        bar.update()
        stopped = signals.any(accelerator)
        is_last = trainee.step == run.steps or stopped
        if trainee.step % run.log_every == 0 or is_last:
            now = time.perf_counter()
            line = summary(trainee, outcomes, loader.waited_s, now - before)
            trainee.seconds += now - before
            outcomes, before, loader.waited_s = [], now, 0.0
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            if is_main:
                log.add(trainee.step, **line, seconds=trainee.seconds)
        if trainee.step % run.save_every == 0 or is_last:
            save_checkpoint(trainee)
            write_weights(trainee)
    bar.close()
    if is_main:
        log.close()


def summary(trainee: Trainee, outcomes: list, waited_s: float, seconds: float) -> dict[str, float]:
    """The numbers of a line of the log: means over steps and processes.

    `waited` is the share of the time that steps waited for data.
    """
    accelerator, settings = trainee.accelerator, trainee.settings
    line = {
        name: accelerator.reduce(
            torch.stack([getattr(outcome, name).detach().float() for outcome in outcomes]).mean(),
            "mean",
        ).item()
        for name in ("loss", "align", "norm")
    }
    if not settings.attention.align:
        del line["align"]
    rates = [next(iter(trainee.experts.values())).optimizer.param_groups[0]["lr"]]
    line |= {"lr": max(rates), "waited": waited_s / max(seconds, 1e-9)}
    if accelerator.device.type == "cuda":
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return line


def write_weights(trainee: Trainee) -> list[Path]:
    """Write the weights as they are, or their averages, as files that stand alone."""
    settings, folder = trainee.settings, Path(trainee.settings.run.output)
    facts = {
        "model": settings.model.name,
        "schedule": schedule_text(trainee.sparse.schedule),
        "step": trainee.step,
    }
    if trainee.sparse.is_learned:
        facts["learned"] = LEARNED
    written, learned = [], {}
    for component, expert in trainee.experts.items():
        trained = expert.trained
        if expert.average:
            trained = dict(zip(trained, expert.average.shadow_params))
        trained = {name: whole(value) for name, value in trained.items()}
        own = {name: trained.pop(name) for name in expert.learned.state()}
        learned |= {f"{component}.{name}": value.float().cpu() for name, value in own.items()}
        if not trainee.accelerator.is_main_process:
            continue
        if settings.tune.method == "full":
            if trainee.step == settings.run.steps:
                written.append(_write_full(folder, component, trainee, trained, facts))
            continue
        state = adapter_state(expert.plain, trained)
        also = settings.output.also
        written += write_adapter(folder, component, expert.plain, state, also, facts)
    if learned and trainee.accelerator.is_main_process:
        with write_atomically(folder / LEARNED) as partial:
            save_file(learned, partial)
        written.append(folder / LEARNED)
    return written


def _write_full(folder: Path, component: str, trainee: Trainee, state: dict, facts: dict) -> Path:
    where = model_folder(trainee.settings.model.name)
    model = load_transformer(where, component, trainee.settings.model.torch_dtype)
    model.load_state_dict(state)
    model.save_pretrained(folder / component)
    (folder / f"{component}-schedule.yaml").write_text(facts["schedule"], encoding="utf-8")
    return folder / component


def merge(settings: Settings) -> list[Path]:
    """Write the transformers with the updates of a finished run added to their weights.

    Raises:
        ValueError: the run has left none yet.
    """
    folder, written = Path(settings.run.output), []
    for component in settings.model.experts:
        stem = "lora" if component == "transformer" else f"lora-{component}"
        file = folder / f"{stem}.safetensors"
        if not file.is_file():
            raise ValueError(f"'{file}' is not there yet; train first, without --merge")
        where = model_folder(settings.model.name)
        model = load_transformer(where, component, settings.model.torch_dtype)
        model.load_lora_adapter(str(file), adapter_name=ADAPTER)
        model.fuse_lora()
        model.unload_lora()
        model.save_pretrained(folder / "merged" / component)
        written.append(folder / "merged" / component)
    return written


def train(settings: Settings, signals: Signals) -> None:
    """Run from the last checkpoint, or the beginning, to the end or a signal.

    Raises:
        ValueError: settings that do not fit the model, or data that cannot be trained on.
        FloatingPointError: the loss is not finite.
        OSError: a checkpoint cannot be written.
    """
    run = settings.run
    # a step at a noise level with dense attention does without what sparse methods learn
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        gradient_accumulation_steps=run.accumulate,
        kwargs_handlers=[unused] if Sparse(settings.attention).is_learned else [],
    )
    prepared = Preparation(settings, accelerator, accelerator.print).run()
    trainee = make_trainee(settings, accelerator)
    for expert in trainee.experts.values():
        check_layouts(expert.plain, settings.output.also, settings.tune.use_dora)
    show_start(trainee, prepared)
    if found := load_newest(trainee):
        accelerator.print(f"going on from step {trainee.step} of {run.steps}: {found}")
    try:
        with signals.noted():
            fit(trainee, prepared, signals)
        written = write_weights(trainee)
    finally:
        trainee.sparse.remove()
    if settings.output.merge and accelerator.is_main_process and trainee.step == run.steps:
        written += merge(settings)
    accelerator.print(f"{trainee.step} steps in {trainee.seconds:.0f} s")
    for path in written:
        accelerator.print(f"wrote {path}")


def show_start(trainee: Trainee, prepared: Prepared) -> None:
    """Say what is trained, on what."""
    say, settings = trainee.accelerator.print, trainee.settings
    sizes: dict[tuple, int] = {}
    for sample in prepared.samples:
        sizes[sample.size] = sizes.get(sample.size, 0) + 1
    for (frames, height, width), count in sorted(sizes.items(), reverse=True):
        say(f"{count} samples of {frames} frames of {height} x {width}")
    for name, expert in trainee.experts.items():
        count = sum(parameter.numel() for parameter in expert.trained.values())
        what = (
            f"{settings.tune.method}, {trainee.process.prediction}, {trainee.sparse.schedule.name}"
        )
        say(f"{settings.model.name}, {name}: {count:,} parameters move ({what})")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file, for example one in configs/training")
    parser.add_argument("--output", help="folder to use in place of the file's run.output")
    parser.add_argument(
        "--strict", action="store_true", help="end at a clip that is left out; see data.strict"
    )
    parser.add_argument(
        "--merge", action="store_true",
        help="add the updates of a finished run to the weights, and do nothing else",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting"
    )
    arguments = parser.parse_args()
    changes = [*arguments.set, *(["data.strict=true"] if arguments.strict else [])]
    if arguments.output:
        changes.append(f"run.output={arguments.output}")
    signals = Signals()
    try:
        settings = read_settings(Settings, arguments.config, changes)
        folder = writable_folder(Path(settings.run.output), "run.output")
        if arguments.merge:
            for path in merge(settings):
                print(f"wrote {path}")
            return
        train(settings, signals)
    except (ValueError, FloatingPointError, OSError) as error:
        parser.error(str(error))
    if signals.seen is not None:
        print(
            f"stopped by {signal.Signals(signals.seen).name}; the same command goes on from "
            f"{find_checkpoint(folder / FOLDER)}"
        )
        sys.exit(128 + signals.seen)


if __name__ == "__main__":
    main()
