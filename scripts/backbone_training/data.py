"""Images of a split as the model takes them, batch by batch.

Every random number follows from the seed, the epoch and the image, so that a run that is resumed
sees what it would have seen.
"""

import random
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from backbone_training.settings import Augment, Input
from backbone_training.sources import Source
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

# what Pillow raises for files that are cut short or no images at all
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


def statistics(form: Input) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that images are normalised with."""
    found = []
    for name, usual in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = getattr(form, name)
        if values is None and form.channels == 1:
            values = (sum(usual) / len(usual),)
        values = values or usual
        if len(values) != form.channels:
            raise ValueError(
                f"input.{name} has {len(values)} values, input.channels is {form.channels}"
            )
        found.append(tuple(values))
    return tuple(found)


class Images(Dataset):
    """Images as the model takes them.

    An image that cannot be read is replaced by the next one that can, so that batches stay whole;
    in a test it then has label -1.

    Args:
        strict: whether an image that cannot be read raises a ValueError instead.
        augment: of training images; None for a test.
    """

    def __init__(
        self,
        source: Source,
        form: Input,
        *,
        strict: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
    ):
        self.source, self.strict, self.seed = source, strict, seed
        self.mode = "RGB" if form.channels == 3 else "L"
        self.is_test = augment is None
        mean, std = statistics(form)
        options = {"mean": mean, "std": std, "interpolation": form.interpolation}
        if augment:
            names = (
                "scale",
                "ratio",
                "hflip",
                "color_jitter",
                "auto_augment",
                "re_prob",
                "re_mode",
            )
            options |= {name: getattr(augment, name) for name in names}
        self.transform = create_transform(
            form.size, is_training=bool(augment), crop_pct=form.crop, **options
        )

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        """Image (C, H, W), its label, and the index if the image there cannot be read, or -1.

        Args:
            key: index and epoch.
        """
        index, epoch = key
        seed_everything(self.seed, epoch, index)
        picture, found = self._read(index)
        label = -1 if self.is_test and found != index else int(self.source.labels[found])
        return self.transform(picture), label, index if found != index else -1

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            found = (index + step) % len(self)
            try:
                return self.source.read(found).convert(self.mode), found
            except UNREADABLE as error:
                if self.strict:
                    name = self.source.describe(found)
                    raise ValueError(f"cannot read {name}: {error}") from error
        raise ValueError(f"none of the {len(self)} images can be read")


def seed_everything(*entropy: int) -> None:
    """Seed every generator that augmentation and models draw from."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Keys of the batches of one process, epoch after epoch, in an order that the seed settles.

    Args:
        size: number of images.
        batch: images per process and batch.
        per_epoch: batches per process and epoch; the images left over wait for the next epoch.
        span: batches to begin with and to stop before, counted over epochs.
        place: rank of this process and number of processes.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        per_epoch: int,
        *,
        span: tuple[int, int],
        seed: int,
        place: tuple[int, int] = (0, 1),
    ):
        self.size, self.batch, self.per_epoch = size, batch, per_epoch
        self.span, self.seed, self.place = span, seed, place

    def __len__(self) -> int:
        return self.span[1] - self.span[0]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = self.place
        for number in range(*self.span):
            epoch, within = divmod(number, self.per_epoch)
            if number == self.span[0] or within == 0:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            start = (within * world + rank) * self.batch
            picks = order[start : start + self.batch].tolist()
            yield [(i, epoch) for i in picks]


def ordered_batches(size: int, batch: int, place: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """Keys of the batches of one process in a test, where every image comes once."""
    picks = range(place[0], size, place[1])
    return [[(i, 0) for i in picks[k : k + batch]] for k in range(0, len(picks), batch)]


def make_loader(images: Images, batches: Iterable, workers: int) -> DataLoader:
    """Loads the images of the batches: (B, C, H, W), labels (B,), unreadable (B,)."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # the draw for the seeds of workers shall not move the generator of the model
        generator=torch.Generator(),
    )
