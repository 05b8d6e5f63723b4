"""`vidattn stream`: make a video of any length, chunk by chunk, while it can be watched."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vidattn.pipelines.streaming.checks import check_size
from vidattn.pipelines.streaming.policies import find_policies
from vidattn.pipelines.streaming.reading import site_of
from vidattn.pipelines.streaming.recipe import Recipe, find_recipe
from vidattn.pipelines.streaming.stream import Stream, stream
from vidattn.runs.folder import find_model
from vidattn.runs.growing import GrowingVideo
from vidattn.runs.model import default_dtype, find_device, load_pipeline, pipeline_config
from vidattn.runs.output import write_json
from vidattn.runs.record import record
from vidattn.runs.request import Request
from vidattn.runs.skeleton import skeleton
from vidattn.runs.start import read_start
from vidattn.runs.warn import warn_about

STOPPED = 130


@dataclass
class Switches:
    """Prompts that are still to come, and the frames from which they have come.

    Args:
        pending: seconds and prompt, the next one first.
        done: first frame and prompt.
    """

    pending: list[tuple[float, str]]
    done: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def apply(self, video: Stream, num_frames: int, *, recache: bool) -> None:
        """Let the prompt take hold whose time the next chunk has come to."""
        now = num_frames / video.recipe.fps
        due = [prompt for at, prompt in self.pending if at <= now]
        if due:
            self.pending = self.pending[len(due) :]
            self.done.append((num_frames, due[-1]))
            video.switch(due[-1], recache=recache)


def run(args: argparse.Namespace) -> None:
    """Make the video."""
    _foresee(args)
    pipe = load_pipeline(args)
    recipe = find_recipe(pipe.transformer, args.recipe)
    size = _size(args, recipe)
    total = whole_chunks(args.duration * recipe.fps, recipe, pipe.vae_scale_factor_temporal)
    request = Request(args.prompt, num_frames=total, height=size[0], width=size[1], seed=args.seed)
    warn_about(pipe, args.model, [request])
    start = None
    if args.start is not None:
        start = read_start(args.start, size, pipe.vae_scale_factor_temporal)
    video = stream(
        pipe, args.policy, prompt=args.prompt, num_frames=total, size=size, seed=args.seed,
        start=start, recipe=recipe,
    )  # fmt: skip
    switches, stopped = Switches(list(args.prompts)), False
    with GrowingVideo(args.output, recipe.fps) as file:
        try:
            with _terminable():
                _make(video, file, switches, total, recache=args.recache)
        except KeyboardInterrupt:
            stopped = True
    _report(pipe, args, request, video, file, switches, stopped)
    if stopped:
        raise SystemExit(STOPPED)


def _foresee(args: argparse.Namespace) -> None:
    """Refuse what the model rules out, before its weights are loaded."""
    where = find_model(args.model)
    device = find_device(args.device, args.offload)
    pipe: Any = skeleton(where, pipeline_config(where))
    model = getattr(pipe, "transformer", None)
    if model is None:
        return
    recipe = find_recipe(model, args.recipe)
    tokens = check_size(pipe, model, _size(args, recipe))
    dtype = getattr(torch, default_dtype(device) if args.dtype == "auto" else args.dtype)
    site = site_of(model, tokens, recipe.longest, torch.device("meta"), dtype, len(recipe.passes))
    find_policies(args.policy, recipe.policy).cache.build(site)


def _make(
    video: Stream, file: GrowingVideo, switches: Switches, total: int, *, recache: bool
) -> None:
    """Write chunk by chunk, and show how it goes."""
    with tqdm(total=total, unit="frame", desc=video.policies.label, file=sys.stderr) as bar:
        while True:
            switches.apply(video, file.num_frames, recache=recache)
            frames: Tensor | None = next(video, None)
            if frames is None:
                return
            file.append(frames)
            chunk = video.chunks[-1]
            bar.set_postfix_str(
                f"{chunk.num_frames / chunk.seconds:.1f} fps, cache {chunk.cache_tokens} tokens, "
                f"{chunk.cache_bytes / 2**20:.1f} MiB",
                refresh=False,
            )
            bar.update(len(frames))


def whole_chunks(num_frames: float, recipe: Recipe, factor: int) -> int:
    """The least number of frames of whole chunks that is no less than another.

    Args:
        factor: frames to a latent frame.
    """
    latents, first = math.ceil((num_frames - 1) / factor) + 1, len(recipe.chunk_at(0))
    chunks = max(0, math.ceil((latents - first) / recipe.chunk))
    return (first + chunks * recipe.chunk - 1) * factor + 1


def _size(args: argparse.Namespace, recipe: Recipe) -> tuple[int, int]:
    """Height and width of the frames."""
    return recipe.size if args.height is None else (args.height, args.width)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM stop the video as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(
    pipe: Any,
    args: argparse.Namespace,
    request: Request,
    video: Stream,
    file: GrowingVideo,
    switches: Switches,
    stopped: bool,
) -> None:
    """Write what was done beside the video, and say it in a line."""
    report: Path = args.output.with_suffix(".json")
    args.fps = video.recipe.fps
    names = [field.name for field in dataclasses.fields(video.chunks[0])] if video.chunks else []
    write_json(
        report,
        record(pipe, args, request)
        | {
            "policy": video.policies.label,
            "recipe": dataclasses.asdict(video.recipe),
            "start": args.start and str(args.start),
            "recache": args.recache,
            "prompts": [{"frame": frame, "prompt": prompt} for frame, prompt in switches.done],
            "stopped": stopped,
            "num_frames": file.num_frames,
            "chunks": {name: [getattr(x, name) for x in video.chunks] for name in names},
        },
    )
    what = "stopped after" if stopped else "wrote"
    print(f"{what} {file.num_frames} frames, {file.num_frames / video.recipe.fps:.1f} s")
    print(f"wrote {args.output} and {report}" if file.num_frames else f"wrote {report}")
