"""Batches of a prepared set, in an order that the seed settles, read ahead of their use.

Every random number follows from the seed and the number of the batch, so that a run that is
resumed sees what it would have seen.

Letters: B batch.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from video_training.prepare import Prepared, Sample
from video_training.recorder import AXIS, CONDITION, PER_SAMPLE, TIME_SCALE, TIME_SHAPE, nest
from video_training.settings import Settings


@dataclass(frozen=True)
class Batch:
    """What one backward pass is computed from.

    Args:
        latents: (B, ...) in the layout of the model.
        arguments: of the transformer, but for the latents and the time step.
        condition: what stands behind the latents along their channels, if anything does.
        axis: of the channels.
        time_scale, time_shape: how the model is told the time step.
    """

    names: tuple[str, ...]
    latents: Tensor
    arguments: dict[str, object]
    condition: Tensor | None
    axis: int
    time_scale: float
    time_shape: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Positions of the latents of a clip."""
        return self.latents[0].numel() // self.latents.shape[self.axis]


class Order:
    """Which samples each batch of an epoch takes; those of a batch have one size.

    The processes get batches of the same size at the same time, so that none waits for another. An
    epoch has every sample, and some a second time where they do not fill the last batch.

    Args:
        batch: samples per process and batch.
        place: number of this process, and of processes.
    """

    def __init__(
        self, samples: Sequence[Sample], batch: int, *, seed: int, place: tuple[int, int] = (0, 1)
    ):
        self.batch, self.seed, self.place = batch, seed, place
        self.groups: dict[tuple, list[int]] = {}
        for index, sample in enumerate(samples):
            self.groups.setdefault(sample.size, []).append(index)
        self.per_epoch = sum(-(-len(group) // self._width) for group in self.groups.values())
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def _width(self) -> int:
        return self.batch * self.place[1]

    def __getitem__(self, number: int) -> list[int]:
        """The samples of this process in a batch, counted over epochs."""
        epoch, within = divmod(number, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._draw(epoch)
        start = self.place[0] * self.batch
        return self._epoch[1][within][start : start + self.batch].tolist()

    def _draw(self, epoch: int) -> np.ndarray:
        """(batches, samples of all processes) of an epoch."""
        source, found = np.random.default_rng((self.seed, 1, epoch)), []
        for group in self.groups.values():
            picks = source.permutation(group)
            count = -(-len(picks) // self._width) * self._width
            found.append(np.resize(picks, count).reshape(-1, self._width))
        return source.permutation(np.concatenate(found))


class Loader:
    """Reads batches ahead, and measures how long they are waited for.

    Args:
        order: the samples of each batch.
        device: that tensors are put on.
        dtype: of the weights, which arguments get that were kept in the dtype of the model.
    """

    def __init__(
        self,
        prepared: Prepared,
        order: Order,
        settings: Settings,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.prepared, self.order, self.data = prepared, order, settings.data
        self.device, self.seed = device, settings.run.seed
        self.kept, self.dtype = settings.model.torch_dtype, dtype
        self.waited_s = 0.0

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """The batches of these numbers."""
        ahead = self.data.workers + 1
        with ThreadPoolExecutor(self.data.workers) as pool:
            # the order is drawn here, in one thread
            numbers = iter(range(first, end))
            waiting = [pool.submit(self.read, *self._picks(n)) for n in islice(numbers, ahead)]
            while waiting:
                start = time.perf_counter()
                batch = waiting.pop(0).result()
                self.waited_s += time.perf_counter() - start
                waiting.extend(pool.submit(self.read, *self._picks(n)) for n in islice(numbers, 1))
                yield batch

    def _picks(self, number: int) -> tuple[list[Sample], list[bool]]:
        samples = [self.prepared.samples[index] for index in self.order[number]]
        source = np.random.default_rng((self.seed, 2, number, self.order.place[0]))
        return samples, (source.random(len(samples)) < self.data.drop_caption).tolist()

    def read(self, samples: list[Sample], dropped: list[bool]) -> Batch:
        """The batch of some samples, the captions of some dropped."""
        cache, base = self.prepared.arguments, self.prepared.arguments.get(samples[0].base)
        latents = [self.prepared.latents.get(sample.latents)["latents"] for sample in samples]
        leaves = [
            base | cache.get(sample.empty if drop else sample.own)
            for sample, drop in zip(samples, dropped)
        ]
        names = tuple(sample.name for sample in samples)
        joined = _join(leaves, base[PER_SAMPLE], names)
        joined = {name: self._place(value) for name, value in joined.items()}
        return Batch(
            names=names,
            latents=torch.cat(latents).to(self.device, torch.float32),
            arguments=nest({k: v for k, v in joined.items() if k[0] != "." and k != CONDITION}),
            condition=joined.get(CONDITION),
            axis=base[AXIS],
            time_scale=base[TIME_SCALE],
            time_shape=tuple(base[TIME_SHAPE]),
        )

    def _place(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.dtype is self.kept else value.dtype)


def _join(
    leaves: list[dict[str, object]], each: Sequence[str], names: Sequence[str]
) -> dict[str, object]:
    """The arguments of several samples as those of one call."""
    found = dict(leaves[0])
    if len(leaves) == 1:
        return found
    for name in each:
        values = [leaf[name] for leaf in leaves]
        if len({value.shape[1:] for value in values}) > 1:
            raise ValueError(
                f"the captions of {', '.join(names)} give {name} of different lengths, which this "
                "model does not pad: set data.batch_size to 1 and run.accumulate instead"
            )
        found[name] = torch.cat(values)
    return found
