"""Labelled pictures of one split: from arrays, folders or the Hugging Face hub."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
from backbone_training.image_arrays import ImageArrays, find_idx, read_idx_split, read_npz
from PIL import Image

HUB = "hf:"
ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Source(Protocol):
    """Images of one split; `labels[i]` belongs to `read(i)`, which `describe(i)` names."""

    classes: tuple[str, ...]
    labels: np.ndarray

    def read(self, index: int) -> Image.Image: ...

    def describe(self, index: int) -> str: ...


class ArraySource:
    """Images in memory."""

    def __init__(self, arrays: ImageArrays, path: Path):
        self.images, self.labels, self.classes = arrays.images, arrays.labels, arrays.classes
        self.path = path

    def read(self, index: int) -> Image.Image:
        """The picture of one row."""
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        """Where the picture is."""
        return f"image {index} of '{self.path}'"


class FolderSource:
    """Image files in a folder per class.

    Raises:
        ValueError: no such folder, no class folders in it, or class folders without images.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            there = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
            raise ValueError(f"no folder '{folder}'; beside it are {', '.join(there) or 'none'}")
        found = {
            child.name: sorted(
                os.path.join(root, name)
                for root, _, names in os.walk(child, followlinks=True)
                for name in names
                if Path(name).suffix.lower() in ENDINGS
            )
            for child in sorted(folder.iterdir())
            if child.is_dir() and not child.name.startswith(".")
        }
        if not found:
            raise ValueError(f"'{folder}' needs a folder of images per class, it has no folders")
        if empty := [name for name, files in found.items() if not files]:
            raise ValueError(
                f"class folders without images in '{folder}': {', '.join(empty)}; "
                f"add images ({', '.join(sorted(ENDINGS))}) or delete the folders"
            )
        self.classes = tuple(found)
        self.files = [name for files in found.values() for name in files]
        self.labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])

    def read(self, index: int) -> Image.Image:
        """The decoded picture of one file."""
        with Image.open(self.files[index]) as picture:
            picture.load()
            return picture

    def describe(self, index: int) -> str:
        """The file."""
        return f"'{self.files[index]}'"


class HubSource:
    """A split of a Hugging Face dataset with one column of images and one of class labels."""

    def __init__(self, name: str, split: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"'{HUB}{name}' needs the datasets package: pip install datasets"
            ) from error
        try:
            self.rows = datasets.load_dataset(name, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"cannot load split '{split}' of dataset '{name}': {error}") from error
        kinds = {key: type(kind).__name__ for key, kind in self.rows.features.items()}
        columns = [[k for k, kind in kinds.items() if kind == of] for of in ("Image", "ClassLabel")]
        if not all(columns):
            raise ValueError(
                f"dataset '{name}' needs a column of images and one of class labels, it has {kinds}"
            )
        self.name, (self.image, *_), (label, *_) = name, *columns
        self.labels = np.asarray(self.rows[label])
        self.classes = tuple(self.rows.features[label].names)

    def read(self, index: int) -> Image.Image:
        """The decoded picture of one row."""
        return self.rows[index][self.image]

    def describe(self, index: int) -> str:
        """The row."""
        return f"row {index} of '{self.name}'"


def open_source(source: str, split: str) -> Source:
    """The images of a split, wherever `Data.source` says they are."""
    if source.startswith(HUB):
        return HubSource(source.removeprefix(HUB), split)
    path = Path(source)
    if path.suffix == ".npz":
        return ArraySource(read_npz(path, split), path)
    if not path.is_dir():
        raise ValueError(
            f"no images at '{source}'; give an .npz file, a folder, or {HUB}NAME of a dataset. "
            "scripts/prepare_images.py makes .npz files"
        )
    if find_idx(path, split):
        return ArraySource(read_idx_split(path, split), path)
    return FolderSource(path / split)


def require_same_classes(source: Source, classes: tuple[str, ...], other: str) -> None:
    """Raise a ValueError that names the classes by which a source and something else differ."""
    if source.classes == tuple(classes):
        return
    here = [name for name in source.classes if name not in classes]
    there = [name for name in classes if name not in source.classes]
    raise ValueError(
        f"the images have {len(source.classes)} classes, {other} has {len(classes)}; "
        f"only in the images: {', '.join(here[:9]) or 'none'}; "
        f"only in {other}: {', '.join(there[:9]) or 'none'}"
        + ("" if here or there else "; their order differs")
    )
