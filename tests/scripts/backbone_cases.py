"""Tiny image sets and a tiny model for the tests of the backbone programs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from backbone_training import image_arrays as arrays
from backbone_training import settings
from PIL import Image

from vidattn.support.config import build

CLASSES = ("ape", "bat", "cat")
SIZE = 16
# has batch statistics
RESNET = {"name": "test_resnet", "options": {"drop_path_rate": 0.3}}
# draws dropout and the paths that are left out
VIT = {
    "name": "vit_tiny_patch16_224",
    "options": {
        **{"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        **{"drop_path_rate": 0.3, "proj_drop_rate": 0.1},
    },
}


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """(count, SIZE, SIZE) uint8 noise, brighter on the side that its class says."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 128, (count, SIZE, SIZE))
    for i, image in enumerate(images):
        image[:, (i % len(CLASSES)) * 5 : (i % len(CLASSES)) * 5 + 5] += 120
    return images.astype(np.uint8)


def write_set(path: Path, train: int = 22, test: int = 9) -> Path:
    """An .npz file whose classes a model can learn."""
    splits = {}
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        labels = np.arange(count) % len(CLASSES)
        splits[name] = arrays.ImageArrays(pictures(count, seed), labels, CLASSES)
    arrays.write_npz(path, splits)
    return path


def write_folders(root: Path, per_class: int = 3) -> Path:
    """Splits of class folders with PNG files."""
    for split in ("train", "test"):
        for i, image in enumerate(pictures(per_class * len(CLASSES))):
            folder = root / split / CLASSES[i % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    return root


def make_settings(source: Path, output: Path, **sections: dict) -> settings.Settings:
    """A run of two epochs of two steps with all that a resumed run has to bring back."""
    given = {
        "model": VIT,
        "data": {"source": str(source), "batch_size": 4, "workers": 0},
        "input": {"size": SIZE, "channels": 1, "mean": [0.4], "std": [0.3], "crop": 1.0},
        "augment": {"scale": [0.7, 1.0], "re_prob": 0.5, "mixup": 0.4, "smoothing": 0.1},
        "optimizer": {"lr": 1e-2, "clip": 1.0},
        "schedule": {"epochs": 2, "warmup_epochs": 0.5},
        "run": {
            "output": str(output),
            "accumulate": 2,
            "ema": 0.9,
            "save_every": 1,
            "log_every": 1,
        },
    }
    for name, changes in sections.items():
        given[name] = given.get(name, {}) | changes
    return build(settings.Settings, given, "the test")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """One thread, and none of the state that accelerate keeps in its classes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
