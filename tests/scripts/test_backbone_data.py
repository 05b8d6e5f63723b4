"""Images of a split: where they come from, what is wrong with them, and in what order they come."""

import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_training import data, sources
from PIL import Image

from tests.scripts import backbone_cases as cases

arrays, settings = cases.arrays, cases.settings
FORM = settings.Input(size=cases.SIZE, channels=1, mean=(0.5,), std=(0.25,), crop=1.0)


def test_sources_agree(tmp_path):
    images = cases.pictures(9)
    folder = sources.open_source(str(cases.write_folders(tmp_path / "folders")), "train")
    packed = sources.open_source(str(cases.write_set(tmp_path / "a.npz", train=9)), "train")
    assert folder.classes == packed.classes == cases.CLASSES
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert packed.labels.tolist() == [0, 1, 2] * 3
    np.testing.assert_array_equal(np.asarray(packed.read(4)), images[4])
    # files are sorted by class, then by name
    np.testing.assert_array_equal(np.asarray(folder.read(4)), images[4])
    assert folder.describe(4).endswith("bat/4.png'")


def test_folder_of_idx_files_is_a_source(tmp_path):
    header = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2])
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + bytes([1, 2, 3, 4]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 0]))
    source = sources.open_source(str(tmp_path), "test")
    assert source.labels.tolist() == [1, 0] and source.classes == ("0", "1")
    assert np.asarray(source.read(1)).tolist() == [[3, 4]]


def test_hub_dataset_is_a_source(monkeypatch):
    # stands in for the library, which would ask the hub
    class Rows(list):
        features = {"img": type("Image", (), {})(), "kind": type("ClassLabel", (), {})()}

        def __getitem__(self, key):
            return [row["kind"] for row in self] if key == "kind" else super().__getitem__(key)

    Rows.features["kind"].names = ["x", "y"]
    picture = Image.new("L", (3, 2))
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Rows([{"img": picture, "kind": 1}])

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    source = sources.open_source("hf:some/set", "validation")
    assert asked == [("some/set", "validation")]
    assert source.classes == ("x", "y") and source.labels.tolist() == [1]
    assert source.read(0) is picture
    Rows.features.pop("kind")
    with pytest.raises(ValueError, match="a column of images and one of class labels, it has"):
        sources.open_source("hf:some/set", "validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        sources.open_source("hf:some/set", "validation")


def test_missing_and_empty_folders_are_named(tmp_path):
    root = cases.write_folders(tmp_path)
    with pytest.raises(ValueError, match="no images at .*missing.*prepare_images"):
        sources.open_source(str(root / "missing"), "train")
    with pytest.raises(ValueError, match="no folder .*val.*; beside it are test, train"):
        sources.open_source(str(root), "val")
    (root / "train" / "dog").mkdir()
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match="class folders without images in .*: dog, eel; add"):
        sources.open_source(str(root), "train")
    (root / "flat").mkdir()
    with pytest.raises(ValueError, match="needs a folder of images per class"):
        sources.open_source(str(root), "flat")


def test_other_classes_are_named(tmp_path):
    source = sources.open_source(str(cases.write_set(tmp_path / "a.npz")), "test")
    sources.require_same_classes(source, cases.CLASSES, "the file")
    message = r"3 classes, the file has 2; only in the images: bat, cat; only in the file: dog$"
    with pytest.raises(ValueError, match=message):
        sources.require_same_classes(source, ("ape", "dog"), "the file")
    with pytest.raises(ValueError, match="their order differs"):
        sources.require_same_classes(source, cases.CLASSES[::-1], "the file")


def break_files(root: Path) -> None:
    """Cut a PNG file short, and put text and nothing in place of two others."""
    ape = root / "train" / "ape"
    (ape / "0.png").write_bytes((ape / "0.png").read_bytes()[:60])
    (ape / "3.png").write_text("no picture")
    (root / "train" / "cat" / "8.png").write_bytes(b"")


def test_unreadable_images_are_replaced_and_told(tmp_path):
    root = cases.write_folders(tmp_path)
    break_files(root)
    source = sources.open_source(str(root), "train")
    for augment in (None, settings.Augment(scale=(1, 1), ratio=(1, 1), hflip=0)):
        images = data.Images(source, FORM, augment=augment)
        found = [images[i, 0] for i in range(9)]
        assert [x[2] for x in found] == [0, 1, -1, -1, -1, -1, -1, -1, 8]
        # the third is the first that can be read, and the last one wraps around to it
        for i in (0, 1, 8):
            torch.testing.assert_close(found[i][0], found[2][0], rtol=0, atol=0)
        replaced = -1 if augment is None else 0
        assert [x[1] for x in found] == [replaced, replaced, 0, 1, 1, 1, 2, 2, replaced]
    strict = data.Images(source, FORM, strict=True)
    with pytest.raises(ValueError, match=r"cannot read '.*ape/3\.png'"):
        strict[1, 0]


def test_a_set_without_a_readable_image_ends(tmp_path):
    root = cases.write_folders(tmp_path, per_class=1)
    for file in root.rglob("*.png"):
        file.write_bytes(b"x")
    images = data.Images(sources.open_source(str(root), "test"), FORM)
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        images[0, 0]


@pytest.mark.parametrize(("channels", "mean"), [(1, 0.5), (3, 0.5)])
def test_test_images_are_normalised(tmp_path, channels, mean):
    source = sources.open_source(str(cases.write_set(tmp_path / "a.npz")), "test")
    form = settings.Input(
        size=cases.SIZE, channels=channels, mean=(mean,) * channels, std=(0.25,) * channels, crop=1
    )
    image = data.Images(source, form)[2, 0][0]
    expected = (torch.from_numpy(cases.pictures(9, seed=1)[2]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(image, expected.float().expand(channels, -1, -1))


def test_statistics_fit_the_channels():
    mean, std = data.statistics(settings.Input(channels=1))
    assert len(mean) == len(std) == 1 and abs(mean[0] - 0.449) < 1e-3
    with pytest.raises(ValueError, match="input.mean has 3 values, input.channels is 1"):
        data.statistics(settings.Input(channels=1, mean=(0.1, 0.2, 0.3)))


def test_augmentation_follows_seed_epoch_and_image(tmp_path):
    source = sources.open_source(str(cases.write_set(tmp_path / "a.npz")), "train")
    augment = settings.Augment(scale=(0.3, 1.0), re_prob=1.0, auto_augment="rand-m9-mstd0.5")
    first = data.Images(source, FORM, augment=augment, seed=3)
    image = first[5, 1][0]
    torch.rand(7), np.random.rand(3)
    torch.testing.assert_close(first[5, 1][0], image, rtol=0, atol=0)
    others = [first[5, 2][0], data.Images(source, FORM, augment=augment, seed=4)[5, 1][0]]
    assert all((other - image).abs().max() > 0.1 for other in others)


@pytest.mark.parametrize("world", [1, 3])
def test_processes_share_an_epoch_without_overlap(world):
    size, batch, per_epoch = 29, 4, 29 // (4 * world)
    seen = []
    for rank in range(world):
        batches = data.ShuffledBatches(
            size, batch, per_epoch, span=(0, 2 * per_epoch), seed=1, place=(rank, world)
        )
        assert len(batches) == 2 * per_epoch == len(list(batches))
        seen.append(list(batches))
    for epoch in range(2):
        keys = [
            key
            for batches in seen
            for one in batches[epoch * per_epoch : (epoch + 1) * per_epoch]
            for key in one
        ]
        assert all(e == epoch for _, e in keys)
        indices = [i for i, _ in keys]
        assert len(set(indices)) == len(indices) == batch * world * per_epoch
        assert indices != sorted(indices)
    assert [i for i, _ in seen[0][0]] != [i for i, _ in seen[0][per_epoch]]


def test_batches_go_on_anywhere():
    whole = list(data.ShuffledBatches(23, 4, 5, span=(0, 15), seed=2))
    for start in (0, 3, 5, 9, 15):
        rest = data.ShuffledBatches(23, 4, 5, span=(start, 15), seed=2)
        assert list(rest) == whole[start:]


@pytest.mark.parametrize("world", [1, 3])
def test_a_test_sees_every_image_once(world):
    seen = [data.ordered_batches(11, 2, (rank, world)) for rank in range(world)]
    indices = [key[0] for batches in seen for one in batches for key in one]
    assert sorted(indices) == list(range(11))
    assert max(len(one) for batches in seen for one in batches) == 2


def test_workers_change_no_image(tmp_path):
    source = sources.open_source(str(cases.write_set(tmp_path / "a.npz")), "train")
    images = data.Images(source, FORM, augment=settings.Augment(re_prob=1.0), seed=5)
    batches = data.ShuffledBatches(22, 4, 5, span=(3, 7), seed=5)
    # a worker that leaves late is not this test's matter
    logging.getLogger("torch").setLevel(logging.ERROR)
    alone, shared = (list(data.make_loader(images, batches, workers)) for workers in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
