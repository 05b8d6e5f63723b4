"""Files that appear whole or not at all, at places known to be writable before work begins."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# in bytes
LONGEST_NAME = 255


def writable_file(path: Path, endings: Sequence[str], flag: str = "--output") -> Path:
    """The path of a file that can be written, its folder made if it was missing.

    Raises:
        ValueError: another ending, a name that is too long or a folder's, or no permission.
    """
    if path.suffix.lower() not in endings:
        raise ValueError(f"{flag} must end in {' or '.join(endings)}, got '{path}'")
    if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
        raise ValueError(
            f"{flag} '{path.name[:20]}...{path.suffix}' is too long: file systems take names of "
            f"{LONGEST_NAME} bytes, got {length}"
        )
    if path.is_dir():
        raise ValueError(f"{flag} '{path}' is a folder; give the name of a file in it")
    writable_folder(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{flag} '{path}' exists and cannot be overwritten: no permission")
    return path


def fresh_file(path: Path) -> Path:
    """The path, or the first of name-2, name-3, ... beside it where something is there already."""
    number, fresh = 1, path
    while fresh.exists() or fresh.with_suffix(".json").exists():
        number += 1
        fresh = path.with_stem(f"{path.stem}-{number}")
    return fresh


def writable_folder(path: Path, flag: str = "--output") -> Path:
    """The path of a folder in which files can be written, made if it was missing.

    Raises:
        ValueError: it cannot be made, is no folder, or takes no files.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write in '{path}' ({error.strerror}); choose another {flag}"
        ) from error
    return path


def _partial(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.stem[:40]}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it takes the final name if the block succeeds.

    On any error, Ctrl-C included, the temporary file is removed, and the final name untouched.
    """
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, whole or not at all."""
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
