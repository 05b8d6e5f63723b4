"""Image sets out of packages, and the idx and .npz files they come in."""

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import prepare_images as program
import pytest
from backbone_training import image_arrays as arrays
from fetching import packages
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def pinned_archive(folder: Path, files: dict[str, bytes]) -> packages.Package:
    """An npm archive with these files, in a folder, and the release that pins it."""
    folder.mkdir(parents=True)
    path = folder / "images-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return packages.Package("npm", "images@1.0.0", path.name, digest)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(5,), (3, 7, 2)])
def test_idx_file_is_read(tmp_path, pack, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / ("a.gz" if pack is gzip.compress else "a")
    path.write_bytes(pack(idx_bytes(array)))
    np.testing.assert_array_equal(arrays.read_idx(path), array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "no idx file"),
        ("a", b"\x89PNG\r\n", "no idx file of bytes; it begins with 89 50 4e 47"),
        # a header of floats
        ("a", b"\0\0\x0d\x01\0\0\0\1\0\0\0\0", "no idx file of bytes"),
        ("a", idx_bytes(np.zeros((4, 5)))[:-1], "holds 19 bytes"),
        ("a.gz", gzip.compress(idx_bytes(np.zeros((4, 5))), mtime=0)[:-9], "no complete gzip"),
        ("a.gz", b"plain", "no complete gzip"),
    ],
)
def test_broken_idx_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        arrays.read_idx(tmp_path / name)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3)])
def test_npz_file_gives_back_what_was_written(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    split = arrays.ImageArrays(images, np.array([0, 1, 2, 0, 1, 2]), ("a", "b", "c"))
    path = tmp_path / "new" / "set.npz"
    arrays.write_npz(path, {"train": split})
    found = arrays.read_npz(path, "train")
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, split.labels)
    assert found.classes == split.classes
    with pytest.raises(ValueError, match=r"lacks test_images, test_labels; it holds"):
        arrays.read_npz(path, "test")


def test_npz_file_with_pickles_is_refused(tmp_path):
    objects = np.array([{"a": 1}, None], dtype=object)
    np.savez(tmp_path / "a.npz", train_images=objects, train_labels=objects, classes=objects)
    with pytest.raises(ValueError, match="cannot be read as .npz: Object arrays"):
        arrays.read_npz(tmp_path / "a.npz", "train")
    (tmp_path / "b.npz").write_bytes(b"PK and no more")
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        arrays.read_npz(tmp_path / "b.npz", "train")


@pytest.mark.parametrize(
    ("shape", "dtype", "labels", "message"),
    [
        ((2, 5, 4), np.float32, [0, 1], "uint8, got"),
        ((2, 5, 4, 2), np.uint8, [0, 1], "uint8, got"),
        ((2, 5, 4), np.uint8, [0], "2 images need as many labels"),
        ((0, 5, 4), np.uint8, [], "0 images need as many labels"),
        ((2, 5, 4), np.uint8, [0, 3], "from 0 to 3, but there are 3 classes"),
        ((2, 5, 4), np.uint8, [-1, 0], "from -1 to 0"),
    ],
)
def test_arrays_that_are_no_set_are_refused(shape, dtype, labels, message):
    with pytest.raises(ValueError, match=message):
        arrays.ImageArrays(np.zeros(shape, dtype), np.array(labels, int), ("a", "b", "c"))


def test_digits_come_out_of_their_package(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    files = {}
    for prefix, part in (("train", images[:3]), ("t10k", images[3:])):
        files[f"data/{prefix}-images-idx3-ubyte"] = idx_bytes(part)
        files[f"data/{prefix}-labels-idx1-ubyte"] = idx_bytes(np.arange(9, 9 - len(part), -1))
    package = pinned_archive(tmp_path / "packages" / "mnist", files)
    monkeypatch.setattr(program, "MNIST", package)
    monkeypatch.setattr(sys, "argv", ["prepare", "mnist", "--output", str(tmp_path)])
    program.main()
    assert "train (3, 28, 28), test (1, 28, 28)" in capsys.readouterr().out
    found = arrays.read_npz(tmp_path / "mnist.npz", "train")
    np.testing.assert_array_equal(found.images, images[:3])
    assert found.labels.tolist() == [9, 8, 7] and len(found.classes) == 10


def test_photographs_come_out_of_rows(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {"train_lables.json": json.dumps([0, 9] * 5), "test_lables.json": json.dumps([3, 4])}
    files = {name: text.encode() for name, text in files.items()}
    for i, name in enumerate(names):
        picture = io.BytesIO()
        Image.fromarray(images[2 * i : 2 * i + 2].reshape(2, 1024, 3)).save(picture, "png")
        files[f"{name}.png"] = picture.getvalue()
    monkeypatch.setattr(program, "CIFAR10", pinned_archive(tmp_path / "cifar10", files))
    splits = program.cifar10(tmp_path / "cifar10")
    np.testing.assert_array_equal(splits["train"].images, images[:10])
    np.testing.assert_array_equal(splits["test"].images, images[10:])
    assert splits["test"].labels.tolist() == [3, 4]


def test_another_archive_is_refused(tmp_path):
    package = pinned_archive(tmp_path / "a", {"x": b"1"})
    (tmp_path / "a" / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match="has SHA-256 .*, needed"):
        packages.unpack(package, tmp_path / "a")
    with pytest.raises(ValueError, match="could not download .* by hand"):
        # no client fetches a name that no registry allows
        packages.fetch(packages.Package("pip", "!!", "a.whl", "0"), tmp_path / "b")
