"""Time steps of training with sparse attention: python scripts/bench_training.py.

Steps of scripts/train_video.py, which tune the bundled model, or another Wan transformer, by
low-rank updates on random latents: forward, backward and the optimizer, every method in turns, by
number of tokens and type. Writes training_SET.json and training_SET.md, SET being the instruction
set that bfloat16 runs on here, or the name of the GPU; tables of other machines stay.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from benchmarks.instruction_sets import sets_in_use
from benchmarks.resident_memory import extra_mib
from torch.profiler import profile
from tqdm import tqdm
from video_training.batches import Batch
from video_training.settings import Attention, Data, Model, Run, Settings, Tune
from video_training.step import take_step
from video_training.trainee import Trainee, grid_size, make_trainee

from vidattn.choice import Choice, parse_choice
from vidattn.kernels.cpp.processor import instruction_set
from vidattn.kernels.timing import interleaved_ms
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json
from vidattn.support.resources import resource

# The first is what others are compared with.
METHODS = (
    "dense",
    "exact",
    "radial:density=0.2",
    "vmoba:density=0.2",
    "neighborhood:window=9,13,13",
    "vsa:density=0.2",
)
CLIPS = ((65, 128, 128), (65, 256, 256))
INTRODUCTION = """\
# Steps of training on {cpu}

`python scripts/bench_training.py` on {num_cores} cores, {num_threads} in use, torch {torch};
{sets}. One step of `train_video.py` tunes `{model}` by low-rank updates of rank {rank}
on one clip: forward, backward and AdamW, no activations computed again, no layer and no noise level
dense. Seconds are medians of {rounds} in turns, "x" is how many times as fast as dense a step is,
and memory the most that a step takes beyond the weights. Density is the share of the pairs of
tokens that are read.
"""
TABLE = """
## {frames} frames of {height}x{width}, {tokens:,} tokens, {precision}

Attention to the video takes {share:.0%} of the dense step.

| method | density | seconds | x | memory | of dense |
|---|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True)
class Case:
    """What is timed together: a (frames, height, width) of clips and a type."""

    clip: tuple[int, int, int]
    precision: str


def main() -> None:
    """Measure, print the tables, write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument("--model", default=str(resource("assets/tiny-t2v")), help="folder or id")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="beside dense")
    parser.add_argument(
        "--clips", nargs="+", type=clip_size, default=list(CLIPS), help="FRAMESxHEIGHTxWIDTH each"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--rank", type=int, default=16, help="of the low-rank updates")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    methods = list(dict.fromkeys(("dense", *args.methods)))
    try:
        choices = {method: parse_choice(method) for method in methods}
    except ValueError as error:
        parser.error(str(error))
    folder = writable_folder(args.out)
    cases = [Case(*case) for case in itertools.product(args.clips, args.precisions)]
    facts = hardware() | {"torch": torch.__version__, "model": Path(args.model).name}
    facts |= {"rank": args.rank, "rounds": args.rounds, "sets": sets_in_use()}
    name, tables, text = f"training_{machine()}", [], ""
    for case in tqdm(cases, desc="sizes and types"):
        tables.append(measure(case, choices, args))
        text = INTRODUCTION.format(**facts) + "".join(map(to_markdown, tables))
        write_json(folder / f"{name}.json", {"facts": facts, "tables": tables})
        with write_atomically(folder / f"{name}.md") as path:
            path.write_text(text, encoding="utf-8")
    print(text)


def clip_size(text: str) -> tuple[int, int, int]:
    """Frames, height and width of clips."""
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def machine() -> str:
    """The GPU, or the instruction set of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return instruction_set(torch.bfloat16)


def measure(case: Case, choices: dict[str, Choice], args: argparse.Namespace) -> dict[str, object]:
    """The rows of a case, a method each."""
    # one process has one precision, but for this
    AcceleratorState._reset_state()
    trainees = {name: trainee_of(choice, case, args) for name, choice in choices.items()}
    batches = {name: batches_of(trainee, case.clip) for name, trainee in trainees.items()}
    steps = {
        name: lambda trainee=trainee, given=batches[name]: take_step(trainee, given)
        for name, trainee in trainees.items()
    }
    seconds = interleaved_ms(steps, rounds=args.rounds)
    rows = []
    for name, step in steps.items():
        handle = trainees[name].sparse.handle_of(plain_of(trainees[name]))
        rows.append(
            {
                "method": name,
                "density": 1.0 if handle is None else handle.report().density,
                "seconds": seconds[name] / 1e3,
                "memory_mib": peak_mib(step),
            }
        )
    share = attention_share(steps["dense"])
    grid = grid_size(plain_of(trainees["dense"]), next(batches["dense"]))
    for trainee in trainees.values():
        trainee.sparse.remove()
    facts = {"clip": case.clip, "precision": case.precision, "tokens": grid[0] * grid[1] * grid[2]}
    return facts | {"attention_share": share, "rows": rows}


def trainee_of(choice: Choice, case: Case, args: argparse.Namespace) -> Trainee:
    """The model that a method trains."""
    attention = Attention(choice.name, dict(choice.options), dense_layers=0, dense_steps=0)
    settings = Settings(
        model=Model(args.model, dtype="float32"),
        data=Data("", buckets=(case.clip,)),
        run=Run("", steps=10**6, precision=case.precision, checkpointing=False),
        attention=attention,
        tune=Tune(r=args.rank, lora_alpha=args.rank),
    )
    mixed = "bf16" if case.precision == "bf16" else "no"
    return make_trainee(settings, Accelerator(mixed_precision=mixed))


def plain_of(trainee: Trainee) -> torch.nn.Module:
    """The one transformer that is trained."""
    return trainee.experts["transformer"].plain


def batches_of(trainee: Trainee, clip: tuple[int, int, int]) -> Iterator[Batch]:
    """The same random latents of a clip with a random text, without end."""
    config, device = plain_of(trainee).config, trainee.accelerator.device
    frames, height, width = clip
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8,
                          generator=source)  # fmt: skip
    text = torch.randn(1, 512, config.text_dim, generator=source)
    batch = Batch(
        names=("noise",),
        latents=latents.to(device),
        arguments={"encoder_hidden_states": text.to(device)},
        condition=None,
        axis=1,
        time_scale=1.0,
        time_shape=(),
    )
    return itertools.repeat(batch)


def peak_mib(step) -> float | None:
    """The memory that a step takes beyond what was there; None where the system does not say."""
    if not torch.cuda.is_available():
        return extra_mib(step)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def attention_share(step) -> float:
    """The share of PyTorch's attention in the time of a step, forward and backward."""
    with profile() as found:
        step()
    events = found.key_averages()
    on_gpu = torch.cuda.is_available()
    times = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
    ]
    attention = sum(time for name, time in times if "attention" in name)
    return attention / sum(time for _, time in times)


def to_markdown(table: dict) -> str:
    """The section of a case."""
    frames, height, width = table["clip"]
    head = TABLE.format(
        frames=frames,
        height=height,
        width=width,
        tokens=table["tokens"],
        precision=table["precision"],
        share=table["attention_share"],
    )
    dense, lines = table["rows"][0], []
    for row in table["rows"]:
        cells = [f"`{row['method']}`", f"{row['density']:.2f}", f"{row['seconds']:.2f}"]
        cells.append(f"{dense['seconds'] / row['seconds']:.2f}")
        if row["memory_mib"] is None:
            cells += ["", ""]
        else:
            share = row["memory_mib"] / dense["memory_mib"]
            cells += [f"{row['memory_mib'] / 1024:.1f} GiB", f"{share:.2f}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(lines)


if __name__ == "__main__":
    main()
