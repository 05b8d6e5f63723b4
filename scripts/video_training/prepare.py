"""Latents and text embeddings of a set of clips, computed once and kept."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import diffusers
import numpy as np
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from video_training.cache import Cache, FileHashes, digest
from video_training.clips import Clip, Problems, find_clips
from video_training.frames import Footage, fit, probe, read_frames
from video_training.pipeline import load_frame, model_folder, multiples, needs_picture
from video_training.recorder import SHAPE, Recorder
from video_training.settings import Settings
from video_training.stretches import Stretch, check_buckets, cut

from vidattn.runs.output import writable_folder

# of what an entry holds; a change of it makes all anew
FORMAT = 1


@dataclass(frozen=True)
class Sample:
    """What one stretch of a clip is trained from: the keys of its entries.

    Args:
        name: of the clip.
        size: (frames, height, width).
        base, own, empty: the arguments of its size, of its caption, and of the empty caption.
    """

    name: str
    size: tuple[int, int, int]
    latents: str
    base: str
    own: str
    empty: str


@dataclass(frozen=True)
class Prepared:
    """A set that is ready to be trained on."""

    samples: list[Sample]
    latents: Cache
    arguments: Cache
    problems: dict[str, str]


class Preparation:
    """Fills the caches of one set for one model, each process its share.

    Args:
        say: shows a line to the user.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, say: Callable[[str], None]):
        self.settings, self.accelerator, self.say = settings, accelerator, say
        self.folder = model_folder(settings.model.name)
        root = writable_folder(Path(settings.data.cache), "data.cache")
        self.latents, self.arguments = Cache(root / "latents"), Cache(root / "arguments")
        self.footage = Cache(root / "footage")
        self.problems = Problems(settings.data.strict)
        self.recorder: Recorder | None = None
        self.needs_picture = needs_picture(self.folder)
        hashes = FileHashes(root / "files.json")
        parts = {
            part.name: hashes.of_folder(part) for part in self.folder.iterdir() if part.is_dir()
        }
        model = settings.model
        self.vae_facts = [FORMAT, "latents", parts.get("vae"), model.dtype, model.vae_tiling]
        versions = [diffusers.__version__, transformers.__version__]
        self.call_facts = [FORMAT, "call", versions, model.dtype, model.guidance, model.call]
        self.call_facts.append(settings.data.fps)
        # the weights of the transformer say nothing about what it is called with
        self.call_facts += [
            {k: v for k, v in files.items() if k == "config.json"}
            if name.startswith("transformer")
            else files
            for name, files in sorted(parts.items())
        ]

    def run(self) -> Prepared:
        """The set with everything that training reads of it.

        Raises:
            ValueError: no clip is left, or a problem with data.strict on.
        """
        stretches = [one for clip, found in self._probe() for one in self._cut(clip, found)]
        samples = [self._sample(stretch) for stretch in stretches]
        if not samples:
            # a size that the model cannot have is why, as likely as not
            self._open()
        self._encode(stretches, samples)
        kept = [one for one in samples if one.latents in self.latents]
        if not kept:
            self.problems.show(self.say)
            raise ValueError(f"nothing of '{self.settings.data.source}' can be trained on")
        self._record(list(zip(stretches, samples)), {one.latents for one in kept})
        problems = dict(
            kv for found in gather_object([self.problems.found]) for kv in found.items()
        )
        self.problems.found = problems
        if self.accelerator.is_main_process:
            self.problems.show(self.say)
        self.recorder = None
        return Prepared(kept, self.latents, self.arguments, problems)

    def _share(self, items: list) -> list:
        place = self.accelerator
        return items[place.process_index :: place.num_processes]

    def _wait(self, cache: Cache) -> None:
        cache.flush()
        self.accelerator.wait_for_everyone()
        cache.refresh()

    def _bar(self, items: Iterator, total: int, what: str) -> tqdm:
        hidden = not self.accelerator.is_main_process or not total
        return tqdm(items, total=total, desc=what, disable=hidden, ncols=100, file=sys.stderr)

    def _probe(self) -> Iterator[tuple[Clip, Footage]]:
        """The clips that can be opened, with what there is in them."""
        clips = find_clips(self.settings.data.source, self.problems)
        keys = [digest(FORMAT, "footage", _identity(clip)) for clip in clips]
        new = self._share([pair for pair in zip(clips, keys) if pair[1] not in self.footage])
        found = self._ahead(lambda pair: _try(probe, pair[0].path, pair[0].is_picture), new)
        for (clip, key), result in self._bar(zip(new, found), len(new), "looking at clips"):
            if isinstance(result, str):
                self.problems.add(clip.name, result)
            else:
                self.footage.put(key, vars(result))
        self._wait(self.footage)
        for clip, key in zip(clips, keys):
            if key in self.footage:
                yield clip, Footage(**self.footage.get(key))

    def _cut(self, clip: Clip, footage: Footage) -> list[Stretch]:
        try:
            return cut(clip, footage, self.settings.data, self.settings.run.seed)
        except ValueError as error:
            self.problems.add(clip.name, str(error))
            return []

    def _sample(self, stretch: Stretch) -> Sample:
        size, what = stretch.bucket, [*_identity(stretch.clip), *stretch.indices]
        # what begins with a picture of the clip is its own
        picture = [what, size] if self.needs_picture else None
        base = digest("base", self.call_facts, size)
        return Sample(
            name=stretch.clip.name,
            size=size,
            latents=digest(self.vae_facts, what, size),
            base=base,
            own=digest(base, stretch.clip.caption, picture),
            empty=digest(base, "", picture),
        )

    def _open(self) -> Recorder:
        """The pipeline, loaded when something is missing."""
        if self.recorder is None:
            model = self.settings.model
            device = self.accelerator.device
            pipe = load_frame(self.folder, model.torch_dtype, device, tiling=model.vae_tiling)
            check_buckets(self.settings.data.buckets, *multiples(pipe))
            self.recorder = Recorder(
                pipe, guidance=model.guidance, fps=self.settings.data.fps, call=model.call
            )
        return self.recorder

    def _encode(self, stretches: list[Stretch], samples: list[Sample]) -> None:
        pairs = zip(stretches, samples)
        new = self._share([pair for pair in pairs if pair[1].latents not in self.latents])
        dtype = self.settings.model.torch_dtype
        if new:
            recorder = self._open()
        found = self._ahead(lambda pair: _try(_frames, pair[0]), new)
        for (stretch, sample), frames in self._bar(zip(new, found), len(new), "encoding clips"):
            latents = frames if isinstance(frames, str) else _try(recorder.latents, frames)
            if isinstance(latents, str):
                self.problems.add(stretch.clip.name, latents)
            else:
                self.latents.put(sample.latents, {"latents": latents.to(dtype)})
        self._wait(self.latents)

    def _record(self, pairs: list[tuple[Stretch, Sample]], kept: set[str]) -> None:
        pairs = [pair for pair in pairs if pair[1].latents in kept]
        bases = {sample.base: stretch for stretch, sample in pairs}
        if self.accelerator.is_main_process:
            for key, stretch in bases.items():
                if key not in self.arguments:
                    picture = self._picture(stretch, first=True)
                    self.arguments.put(key, self._open().base(stretch.bucket, picture))
        self._wait(self.arguments)
        for key, (stretch, sample) in {pair[1].base: pair for pair in pairs}.items():
            self._require_fit(stretch, sample, self.arguments.get(key)[SHAPE])
        wanted = {}
        for stretch, sample in pairs:
            wanted[sample.own] = (stretch, stretch.clip.caption, sample.base)
            wanted[sample.empty] = (stretch, "", sample.base)
        new = self._share([key for key in wanted if key not in self.arguments])
        for key in self._bar(iter(new), len(new), "encoding captions"):
            stretch, caption, base = wanted[key]
            picture, entry = self._picture(stretch), {}
            # without a picture the empty caption adds nothing to what its size has
            if caption or picture is not None:
                given = caption, stretch.bucket, picture, self.arguments.get(base)
                entry = self._open().own(*given)
            self.arguments.put(key, entry)
        self._wait(self.arguments)

    def _require_fit(self, stretch: Stretch, sample: Sample, shape: list[int]) -> None:
        found = list(self.latents.get(sample.latents)["latents"].shape)
        if found != shape:
            raise ValueError(
                f"data.buckets: of {list(stretch.bucket)} the VAE makes latents of {found}, and "
                f"the pipeline of this model begins with {shape}; choose another number of frames"
            )

    def _picture(self, stretch: Stretch, *, first: bool = False) -> np.ndarray | None:
        """The frame that a pipeline starts from, black for the first look at a size."""
        if not self.needs_picture:
            return None
        if first:
            return np.zeros((*stretch.bucket[1:], 3), np.uint8)
        return _frames(replace(stretch, indices=stretch.indices[:1]))[0]

    def _ahead(self, work: Callable, items: list) -> Iterator:
        """Results in order, some of which are computed while the one before is used."""
        workers = self.settings.data.workers
        with ThreadPoolExecutor(workers) as pool:
            waiting, left = [], iter(items)
            for item in islice(left, 2 * workers):
                waiting.append(pool.submit(work, item))
            while waiting:
                done = waiting.pop(0).result()
                waiting.extend(pool.submit(work, item) for item in islice(left, 1))
                yield done


def _frames(stretch: Stretch) -> np.ndarray:
    clip, (_, height, width) = stretch.clip, stretch.bucket
    return fit(read_frames(clip.path, stretch.indices, clip.is_picture), height, width)


def _identity(clip: Clip) -> list:
    facts = clip.path.stat()
    return [clip.name, facts.st_size, facts.st_mtime_ns]


def _try(work: Callable, *args: object) -> object:
    """What came of work on a clip, or in words why nothing did."""
    try:
        return work(*args)
    except (ValueError, OSError) as error:
        return str(error)
