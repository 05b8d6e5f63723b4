"""What is computed once comes back as it was, is found among many, and is whole or not there."""

import time
from pathlib import Path

import pytest
import torch
from video_training import cache as caches

import tests.scripts.video_cases  # noqa: F401

Cache = caches.Cache


def entry(number: int) -> dict:
    """Tensors of several kinds, one of them padded as captions are."""
    source = torch.Generator().manual_seed(number)
    text = torch.randn(1, 40, 6, generator=source, dtype=torch.float32)
    text[:, 7:] = 0
    return {
        "text": text.bfloat16(),
        "mask": (torch.arange(40) < 7)[None].long(),
        "nothing": torch.zeros(2, 5),
        "empty": torch.zeros(1, 0, 4),
        "scalar": torch.tensor(3.0),
        "row": torch.tensor([1.0, 0.0, 0.0]),
        "inner": torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]),
        "frames": 21,
        "scale": [0.5, 4.0],
    }


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value


def test_entries_come_back_as_they_were(tmp_path):
    cache = Cache(tmp_path)
    for number in range(5):
        cache.put(f"k{number}", entry(number))
    same(cache.get("k3"), entry(3))
    cache.flush()
    for reader in (cache, Cache(tmp_path)):
        assert len(reader) == 5 and "k4" in reader and "k5" not in reader
        for number in range(5):
            same(reader.get(f"k{number}"), entry(number))
        with pytest.raises(KeyError):
            reader.get("k5")
    # what pads a caption is not kept
    (shard,) = tmp_path.glob("*.safetensors")
    whole = 5 * sum(x.nbytes for x in entry(0).values() if isinstance(x, torch.Tensor))
    assert shard.stat().st_size - 9000 < whole / 2


def test_what_is_there_is_not_written_again(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", {"x": torch.ones(1)})
    cache.flush()
    cache.put("a", {"x": torch.zeros(1)})
    cache.flush()
    assert cache.get("a")["x"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_shards_are_written_when_they_are_full_or_old(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "SHARD_BYTES", 100)
    cache = Cache(tmp_path)
    for number in range(6):
        cache.put(str(number), {"x": torch.ones(10)})
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(caches, "SHARD_SECONDS", -1.0)
    cache.put("old", {"x": torch.ones(1)})
    assert len(list(tmp_path.iterdir())) == 3


def test_processes_see_the_shards_of_one_another(tmp_path):
    one, other = Cache(tmp_path), Cache(tmp_path)
    one.put("a", {"x": torch.ones(1)})
    one.flush()
    assert "a" not in other
    # one that is being written is not looked at
    (tmp_path / ".b.partial.safetensors").write_bytes(b"half")
    other.refresh()
    assert other.get("a")["x"] == 1


def test_a_disk_that_is_full_leaves_no_half_shard(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    cache.put("a", {"x": torch.ones(1)})

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(caches, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert not list(tmp_path.iterdir()) and len(Cache(tmp_path)) == 0
    cache.flush()
    assert Cache(tmp_path).get("a")["x"] == 1


def test_a_damaged_shard_is_named(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", {"x": torch.ones(100)})
    cache.flush()
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{shard.name}' is damaged .* delete it"):
        Cache(tmp_path)


def test_a_hundred_thousand_entries_are_opened_and_read_in_seconds(tmp_path):
    cache = Cache(tmp_path)
    for number in range(100_000):
        cache.put(caches.digest(number), {"x": torch.full((4,), float(number))})
    cache.flush()
    assert len(list(tmp_path.iterdir())) == -(-100_000 // caches.SHARD_ENTRIES)
    start = time.perf_counter()
    again = Cache(tmp_path)
    assert len(again) == 100_000
    for number in range(0, 100_000, 997):
        assert again.get(caches.digest(number))["x"][2] == number
    assert time.perf_counter() - start < 20


def test_names_follow_from_everything():
    given = [["a.mp4", 10, 3], {"b": 1, "a": 2}, 0.5, None]
    assert caches.digest(*given) == caches.digest(*[given[0], {"a": 2, "b": 1}, 0.5, None])
    others = [["a.mp4", 10, 4], ["a.mp4", 10], ["ä.mp4", 10, 3]]
    assert len({caches.digest(one, *given[1:]) for one in [given[0], *others]}) == 4


def test_files_are_hashed_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder, memory = tmp_path / "vae", tmp_path / "files.json"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").write_bytes(b"one")
    first = caches.FileHashes(memory).of_folder(folder)
    assert list(first) == [str(Path("sub/a"))]
    with monkeypatch.context() as patch:
        patch.setattr(caches.hashlib, "sha256", None)
        assert caches.FileHashes(memory).of_folder(folder) == first
    (folder / "sub" / "a").write_bytes(b"two!")
    assert caches.FileHashes(memory).of_folder(folder) != first
    memory.write_text("{half")
    assert caches.FileHashes(memory).of_folder(folder) != first
