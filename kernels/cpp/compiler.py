"""Compiles a C++ file with the compiler of this machine, once, and loads it.

The library lies in a folder of the user under a hash of its source with the headers beside it,
the flags and the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 600
log = logging.getLogger("vidattn")
_lock = threading.Lock()


class CompileError(RuntimeError):
    """There is no compiler, or it failed."""


def load(source: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library made of one source file, compiled unless that was done before.

    ``flags`` are for the compiler, beside ``FLAGS``.

    The folder is ``$VIDATTN_CACHE``, else ``vidattn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, else,
    where that cannot be written, one of this user's among the temporary files. Several processes
    may compile at once: a finished library is moved into place.

    Raises:
        CompileError: no compiler and no library from before, or the compiler's message.
    """
    with _lock:
        return _load(source, flags)


@lru_cache
def _load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = find_compiler()
    flags = (*FLAGS, *flags)
    made_of: tuple[str | bytes, ...] = (*_texts(source), *flags, sys.platform, platform.machine())
    name = f"{source.stem}-{_hash(*made_of)}"
    version = _hash(*compiler, _version(compiler)) if compiler else "*"
    cache, temporary = _folders()
    for folder in (cache, temporary) if _is_mine(temporary) else (cache,):
        for library in sorted(folder.glob(f"{name}-{version}.so")):
            try:
                return ctypes.CDLL(str(library))
            except OSError as error:
                log.warning("cannot load %s: %s", library, error)
    if not compiler:
        raise CompileError(
            f"no C++ compiler for {source.name}: install one of {', '.join(COMPILERS)}, "
            "or name one in the environment variable CXX"
        )
    return ctypes.CDLL(str(_compile(source, flags, compiler, f"{name}-{version}.so")))


def find_compiler() -> tuple[str, ...] | None:
    """The command of ``$CXX``, else the first C++ compiler on the path, else None."""
    for command in (os.environ.get("CXX", ""), *COMPILERS):
        words = shlex.split(command)
        if words and (program := shutil.which(words[0])):
            return program, *words[1:]
    return None


def _compile(source: Path, flags: tuple[str, ...], compiler: tuple[str, ...], name: str) -> Path:
    log.info("compiling %s with %s, once", source.name, compiler[0])
    folder = cache_folder()
    handle, made = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        command = [*compiler, *flags, str(source.resolve()), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise CompileError(f"{shlex.join(command)} failed:\n{done.stderr}")
        os.replace(made, folder / name)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler[0]} could not be run: {error}") from error
    finally:
        Path(made).unlink(missing_ok=True)
    return folder / name


def _texts(source: Path) -> list[bytes]:
    """A file, and the files that it and they include from its folder, each once."""
    files = [source]
    for path in files:
        named = re.findall(rb'^#include "([^"]+)"', path.read_bytes(), re.MULTILINE)
        found = (source.with_name(name.decode()) for name in named)
        files += [path for path in dict.fromkeys(found) if path not in files]
    return [path.read_bytes() for path in files]


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _folders() -> tuple[Path, Path]:
    """Where libraries are looked for: the cache, and in its stead one among the temporary files."""
    named = os.environ.get("VIDATTN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    cache = Path(named) if named else Path(base) / "vidattn"
    return cache, Path(tempfile.gettempdir()) / f"vidattn-{user}"


def cache_folder() -> Path:
    """The folder that libraries and figures of this machine are kept in."""
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and _is_mine(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="vidattn-"))


def _is_mine(folder: Path) -> bool:
    """Whether nobody else can put a library there."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return True
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
