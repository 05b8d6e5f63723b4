"""Weights out of packages: the format of onnxruntime, and position embeddings that were folded."""

import struct

import fetch_backbone_weights as program
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fetching import ort_tensors as ort


class Writer:
    """Lays out a flatbuffer back to front: what is referred to has a higher place."""

    def __init__(self):
        self.data = bytearray(8)

    def vector(self, values: bytes, count: int) -> int:
        place = len(self.data)
        self.data += struct.pack("<I", count) + values + bytes(-len(values) % 4)
        return place

    def table(self, fields: dict[int, tuple[str, int]]) -> int:
        """Fields of kind "ref", which are set later, or "i", in the order of their numbers."""
        vtable, size = len(self.data), 4 + 2 * (max(fields) + 1)
        entries = [
            4 + 4 * list(fields).index(n) if n in fields else 0 for n in range(max(fields) + 1)
        ]
        self.data += struct.pack(f"<HH{len(entries)}H", size, 4 + 4 * len(fields), *entries)
        self.data += bytes(-len(self.data) % 4)
        place = len(self.data)
        self.data += struct.pack("<i", place - vtable)
        for _, value in fields.values():
            self.data += struct.pack("<i", value)
        return place

    def refer(self, at: int, to: int) -> None:
        struct.pack_into("<I", self.data, at, to - at)


def write_ort(tensors: dict[str, tuple[np.ndarray, int]]) -> bytes:
    """A model with these constants, of these types, and nothing else."""
    out = Writer()
    session = out.table({1: ("ref", 0)})
    out.refer(0, session)
    out.data[4:8] = b"ORTM"
    model = out.table({0: ("i", 9), 7: ("ref", 0)})
    out.refer(session + 4, model)
    graph = out.table({0: ("ref", 0)})
    out.refer(model + 8, graph)
    references = out.vector(bytes(4 * len(tensors)), len(tensors))
    out.refer(graph + 4, references)
    for i, (name, (array, kind)) in enumerate(tensors.items()):
        tensor = out.table({0: ("ref", 0), 2: ("ref", 0), 3: ("i", kind), 4: ("ref", 0)})
        out.refer(references + 4 + 4 * i, tensor)
        out.refer(tensor + 4, out.vector(name.encode(), len(name)))
        shape = np.array(array.shape, "<i8")
        out.refer(tensor + 8, out.vector(shape.tobytes(), len(shape)))
        out.refer(tensor + 16, out.vector(array.tobytes(), array.nbytes))
    return bytes(out.data)


def test_constants_are_read(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=s).astype("<f4") for s in ((3, 5), (2, 1, 7)))
    numbers = np.arange(4, dtype="<i8")
    given = {"a.weight": (first, 1), "/shape": (numbers, 7), "b": (second, 1)}
    (tmp_path / "a.ort").write_bytes(write_ort(given))
    found = ort.read_ort(tmp_path / "a.ort")
    assert list(found) == ["a.weight", "b"]
    np.testing.assert_array_equal(found["a.weight"], first)
    np.testing.assert_array_equal(found["b"], second)
    (tmp_path / "b.ort").write_bytes(b"\x08\0\0\0ONNX and more")
    with pytest.raises(ValueError, match="no model in the format of onnxruntime"):
        ort.read_ort(tmp_path / "b.ort")


def test_folded_positions_come_apart():
    background, window = torch.randn(1, 3, 7, 7), torch.randn(1, 3, 8, 8)
    stretched = F.interpolate(background, size=(256, 256), mode="bicubic")
    folded = stretched + window.tile(32, 32)
    found, repeated = program.split_positions(folded)
    again = F.interpolate(found, size=(256, 256), mode="bicubic") + repeated.tile(32, 32)
    torch.testing.assert_close(again, folded, rtol=0, atol=1e-4)
    # up to the constant that can go to either part
    shift = (found - background).mean((2, 3), keepdim=True)
    torch.testing.assert_close(found - shift, background, rtol=0, atol=1e-3)
    torch.testing.assert_close(repeated + shift, window, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="no such sum"):
        program.split_positions(folded + torch.rand_like(folded))
