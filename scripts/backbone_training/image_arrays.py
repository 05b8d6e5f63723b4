"""Labelled images as arrays: idx files, and .npz files that hold a whole set.

N images, H height, W width.
"""

import gzip
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vidattn.runs.output import write_atomically

# idx names of the split a file belongs to
IDX_PREFIX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class ImageArrays:
    """One split of an image set.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,) integers from 0 on.
        classes: the name of each label.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self):
        shape = self.images.shape
        is_picture = self.images.ndim == 3 or (self.images.ndim == 4 and shape[-1] == 3)
        if self.images.dtype != np.uint8 or not is_picture:
            raise ValueError(
                f"images must be (N, H, W) or (N, H, W, 3) uint8, got {shape} {self.images.dtype}"
            )
        if self.labels.shape != shape[:1] or not len(self.labels):
            raise ValueError(f"{shape[0]} images need as many labels, got {self.labels.shape}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(
                f"labels run from {low} to {high}, but there are {len(self.classes)} classes"
            )


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of bytes, gzipped or not.

    Raises:
        ValueError: no idx file of unsigned bytes, or one that is cut short.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"'{path}' is no complete gzip file: {error}") from error
    # two zero bytes, the type (8: unsigned byte), the number of axes, the length of each
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"'{path}' is no idx file of bytes; it begins with {data[:4].hex(' ')}")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data, ">i4", data[3], offset=4)
    if len(data) - start != shape.prod(dtype=np.int64):
        raise ValueError(f"'{path}' holds {len(data) - start} bytes, its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The files of images and of labels of a split, gzipped or not."""
    prefix, found = IDX_PREFIX.get(split, split), []
    for kind in ("images-idx3", "labels-idx1"):
        names = [f"{prefix}-{kind}-ubyte{ending}" for ending in ("", ".gz")]
        found += [folder / name for name in names if (folder / name).is_file()][:1]
    return tuple(found) if len(found) == 2 else None


def read_idx_split(folder: Path, split: str, classes: tuple[str, ...] = ()) -> ImageArrays:
    """One split of a folder of idx files; classes are called by their number unless named."""
    files = find_idx(folder, split)
    if files is None:
        there = sorted(path.name for path in folder.glob("*-idx?-ubyte*"))
        raise ValueError(f"'{folder}' has no idx files of split '{split}', only {there}")
    images, labels = map(read_idx, files)
    names = classes or tuple(map(str, range(int(labels.max(initial=0)) + 1)))
    return ImageArrays(images, labels, names)


def read_npz(path: Path, split: str) -> ImageArrays:
    """One split of an .npz file; nothing in it is unpickled.

    Raises:
        ValueError: no such file, or one without the arrays of the split.
    """
    needed = (f"{split}_images", f"{split}_labels", "classes")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in needed if name in file}
            names = file.files
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read as .npz: {error}") from error
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"'{path}' lacks {', '.join(missing)}; it holds {', '.join(names)}")
    images, labels, classes = found.values()
    return ImageArrays(images, labels, tuple(map(str, classes)))


def write_npz(path: Path, splits: dict[str, ImageArrays]) -> None:
    """Write the splits of a set, whole or not at all."""
    arrays = {"classes": np.array(next(iter(splits.values())).classes)}
    for name, split in splits.items():
        arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        np.savez_compressed(partial, **arrays)
