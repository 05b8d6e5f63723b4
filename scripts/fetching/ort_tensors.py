"""The constant tensors in a file of onnxruntime's own format, read without onnxruntime.

The format is a flatbuffer: a table begins with the distance back to its vtable, which holds the
place of every field; vectors and strings begin with their length. Field numbers are those of
onnxruntime/core/flatbuffers/schema/ort.fbs.
"""

import struct
from pathlib import Path

import numpy as np

# InferenceSession.model, Model.graph, Graph.initializers
MODEL, GRAPH, INITIALIZERS = 1, 7, 0
# Tensor.name, .dims, .data_type, .raw_data
NAME, DIMS, TYPE, DATA = 0, 2, 3, 4
FLOAT = 1


class FlatBuffer:
    """Bytes with the few ways to walk them that are needed here."""

    def __init__(self, data: bytes):
        self.data = data

    def number(self, code: str, at: int) -> int:
        """One little-endian number."""
        return struct.unpack_from(f"<{code}", self.data, at)[0]

    def field(self, table: int, number: int) -> int:
        """Place of a field of a table; 0 where it has its default."""
        vtable = table - self.number("i", table)
        entry = 4 + 2 * number
        if entry >= self.number("H", vtable):
            return 0
        offset = self.number("H", vtable + entry)
        return table + offset if offset else 0

    def follow(self, at: int) -> int:
        """What a reference points at."""
        return at + self.number("I", at)

    def vector(self, at: int, code: str) -> np.ndarray:
        """The numbers of a vector that is referred to."""
        start = self.follow(at)
        count = self.number("I", start)
        return np.frombuffer(self.data, np.dtype(code).newbyteorder("<"), count, start + 4)


def read_ort(path: Path) -> dict[str, np.ndarray]:
    """The float32 constants of a model by their names.

    Raises:
        ValueError: no file of that format.
    """
    data = path.read_bytes()
    if data[4:8] != b"ORTM":
        raise ValueError(f"'{path}' is no model in the format of onnxruntime")
    buffer = FlatBuffer(data)
    graph = buffer.follow(0)
    for number in (MODEL, GRAPH):
        graph = buffer.follow(buffer.field(graph, number))
    tensors = {}
    references = buffer.field(graph, INITIALIZERS)
    start = buffer.follow(references) + 4
    for i in range(len(buffer.vector(references, "u4"))):
        tensor = buffer.follow(start + 4 * i)
        kind = buffer.field(tensor, TYPE)
        if not kind or buffer.number("i", kind) != FLOAT:
            continue
        name = buffer.vector(buffer.field(tensor, NAME), "u1").tobytes().decode()
        dims = buffer.field(tensor, DIMS)
        shape = buffer.vector(dims, "i8") if dims else ()
        values = buffer.vector(buffer.field(tensor, DATA), "u1").tobytes()
        tensors[name] = np.frombuffer(values, np.float32).reshape(shape)
    return tensors
