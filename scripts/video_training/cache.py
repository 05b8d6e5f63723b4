"""Tensors on disk under the hash of all that made them, many to a file.

An entry is a mapping of names to tensors and plain values. Entries are gathered in shards, which
are safetensors files that appear whole or not at all and never change, so that a set of 100,000
clips is some thousand files, and a run that is killed loses the entries of one shard at most.
"""

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidattn.runs.output import write_atomically

Entry = Mapping[str, object]
METADATA = "vidattn_cache"
# shards are written when they get this large or old, whichever comes first
SHARD_BYTES, SHARD_ENTRIES, SHARD_SECONDS = 256 * 2**20, 4096, 120.0
OPEN_SHARDS = 64


def digest(*parts: object) -> str:
    """A name for what was made from these plain values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """Entries in the shards of a folder; several processes may write to it at once.

    Raises:
        ValueError: a shard is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, Entry] = {}
        self._bytes, self._since = 0, time.monotonic()
        self._shards: set[Path] = set()
        # of entries: their shard, and what the shard says about them
        self._index: dict[str, tuple[Path, dict]] = {}
        self._open: OrderedDict[Path, object] = OrderedDict()
        # several threads read
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that other processes have written."""
        # a name with a dot before it is being written
        for path in sorted(set(self.folder.glob("[!.]*.safetensors")) - self._shards):
            try:
                with safe_open(path, "pt") as shard:
                    entries = json.loads((shard.metadata() or {})[METADATA])
            except (SafetensorError, KeyError, ValueError, OSError) as error:
                raise ValueError(
                    f"'{path}' is damaged ({error}): delete it, and what it held is made again"
                ) from error
            self._shards.add(path)
            self._index.update((key, (path, facts)) for key, facts in entries.items())

    def __contains__(self, key: str) -> bool:
        return key in self._index or key in self._pending

    def __len__(self) -> int:
        return len(self._index) + len(self._pending)

    def put(self, key: str, entry: Entry) -> None:
        """Take an entry in; `flush` is what makes sure that it is on disk."""
        if key in self:
            return
        if not self._pending:
            self._since = time.monotonic()
        self._pending[key] = entry
        self._bytes += sum(x.nbytes for x in entry.values() if isinstance(x, Tensor))
        is_old = time.monotonic() - self._since > SHARD_SECONDS
        if self._bytes > SHARD_BYTES or len(self._pending) >= SHARD_ENTRIES or is_old:
            self.flush()

    def flush(self) -> None:
        """Write the entries that wait, as one shard."""
        if not self._pending:
            return
        tensors, index = {}, {}
        for key, entry in self._pending.items():
            shapes, plain = {}, {}
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    shapes[name] = list(value.shape)
                    tensors[f"{key}/{name}"] = _trim(value.detach().cpu())
                else:
                    plain[name] = value
            index[key] = {"shapes": shapes, "plain": plain}
        path = self.folder / f"{digest(sorted(index))}.safetensors"
        with write_atomically(path) as partial:
            save_file(tensors, partial, metadata={METADATA: json.dumps(index)})
        self._shards.add(path)
        self._index.update((key, (path, facts)) for key, facts in index.items())
        self._pending, self._bytes = {}, 0

    def get(self, key: str) -> dict[str, object]:
        """An entry.

        Raises:
            KeyError: there is none.
        """
        if key in self._pending:
            return dict(self._pending[key])
        path, facts = self._index[key]
        shard = self._shard(path)
        entry = dict(facts["plain"])
        for name, shape in facts["shapes"].items():
            entry[name] = _untrim(shard.get_tensor(f"{key}/{name}"), shape)
        return entry

    def _shard(self, path: Path) -> object:
        with self._lock:
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return self._open[path]


def _trim(tensor: Tensor) -> Tensor:
    """Without the zeros that pad dimension 1 at its end: captions are padded a lot."""
    if tensor.ndim < 2 or not tensor.numel():
        return tensor.contiguous()
    used = (tensor != 0).transpose(0, 1).flatten(1).any(1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return tensor[:, :length].clone(memory_format=torch.contiguous_format)


def _untrim(tensor: Tensor, shape: list[int]) -> Tensor:
    if list(tensor.shape) == shape:
        return tensor
    whole = tensor.new_zeros(shape)
    whole[:, : tensor.shape[1]] = tensor
    return whole


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of the last change.

    Args:
        memory: JSON file that they are remembered in.
    """

    def __init__(self, memory: Path):
        self.memory, self.known = memory, {}
        if memory.is_file():
            try:
                self.known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                # only a memory: what is lost is computed again
                self.known = {}

    def of_folder(self, folder: Path) -> dict[str, str]:
        """The hash of every file in a folder, by its path from there."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found = {str(path.relative_to(folder)): self._of_file(path) for path in files}
        with write_atomically(self.memory) as partial:
            partial.write_text(json.dumps(self.known), encoding="utf-8")
        return found

    def _of_file(self, path: Path) -> str:
        real = path.resolve()
        facts = real.stat()
        name = f"{real}:{facts.st_size}:{facts.st_mtime_ns}"
        if name not in self.known:
            found = hashlib.sha256()
            with real.open("rb") as file:
                while block := file.read(2**22):
                    found.update(block)
            self.known[name] = found.hexdigest()
        return self.known[name]
