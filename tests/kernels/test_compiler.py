"""A C++ file is compiled once, kept under a hash of all it depends on, and its errors are shown."""

import ctypes
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from vidattn.kernels.cpp import compiler

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
ANSWER = 'extern "C" int answer() {{ return {}; }}\n'


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache and an empty folder of temporary files."""
    monkeypatch.setenv("VIDATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    compiler._load.cache_clear()
    yield tmp_path
    compiler._load.cache_clear()


def source(folder, value):
    path = folder / "answer.cpp"
    path.write_text(ANSWER.format(value))
    return path


def again(path):
    """As a new process would load it."""
    compiler._load.cache_clear()
    return compiler.load(path)


def test_it_is_compiled_once_and_anew_when_anything_changes(folders, monkeypatch):
    path = source(folders, 41)
    assert compiler.load(path).answer() == 41
    (first,) = (folders / "cache").iterdir()
    made = first.stat().st_mtime_ns
    assert again(path).answer() == 41 and first.stat().st_mtime_ns == made
    assert again(source(folders, 42)).answer() == 42
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-DCHANGED"))
    again(path)
    assert len(list((folders / "cache").iterdir())) == 3


def test_it_is_compiled_anew_when_a_header_beside_it_changes(folders):
    path = source(folders, "VALUE")
    path.write_text('#include "outer.h"\n' + path.read_text())
    (folders / "outer.h").write_text('#pragma once\n#include "inner.h"\n')
    for value in (3, 4):
        (folders / "inner.h").write_text(f'#include "outer.h"\n#define VALUE {value}\n')
        assert again(path).answer() == value


def test_flags_of_its_own_make_another_library(folders):
    path = source(folders, "GIVEN")
    for value in (1, 2, 1):
        assert compiler.load(path, (f"-DGIVEN={value}",)).answer() == value
    assert len(list((folders / "cache").iterdir())) == 2


def test_what_was_compiled_serves_without_a_compiler(folders, monkeypatch):
    path = source(folders, 7)
    compiler.load(path)
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    assert again(path).answer() == 7
    path = source(folders, 8)
    with pytest.raises(compiler.CompileError, match="install one of c\\+\\+"):
        again(path)


def test_the_message_of_the_compiler_is_shown(folders):
    path = folders / "broken.cpp"
    path.write_text("int wrong( {\n")
    with pytest.raises(compiler.CompileError, match=r"broken\.cpp.*error"):
        compiler.load(path)
    assert list((folders / "cache").iterdir()) == []


def test_the_compiler_of_the_user_is_taken(folders, monkeypatch):
    real = compiler.find_compiler()[0]
    wrapper = folders / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {folders}/calls\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} -DANSWER=3")
    assert compiler.find_compiler() == (str(wrapper), "-DANSWER=3")
    assert compiler.load(source(folders, "ANSWER")).answer() == 3
    assert "answer.cpp" in (folders / "calls").read_text()


def test_a_folder_that_cannot_be_written_is_passed_over(folders, monkeypatch):
    (folders / "cache").write_text("a file is no folder")
    path = source(folders, 5)
    assert compiler.load(path).answer() == 5
    (own,) = (folders / "temporary").iterdir()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700 and len(list(own.iterdir())) == 1
    monkeypatch.setattr(compiler, "_compile", None)
    assert again(path).answer() == 5


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_folder_that_others_can_write_is_not_trusted(folders):
    (folders / "cache").write_text("a file is no folder")
    shared = folders / "temporary" / f"vidattn-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    assert compiler.load(source(folders, 6)).answer() == 6
    assert list(shared.iterdir()) == []


def test_a_damaged_library_is_replaced(folders):
    path = source(folders, 9)
    compiler.load(path)
    (library,) = (folders / "cache").iterdir()
    # a new file: the old one is mapped by this process
    library.unlink()
    library.write_bytes(b"no library")
    assert again(path).answer() == 9


def test_many_at_once(folders):
    path = source(folders, 12)

    def load(_):
        name = compiler._compile(path, compiler.FLAGS, compiler.find_compiler(), "answer.so")
        return ctypes.CDLL(str(name)).answer()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, range(4))) == [12] * 4
    assert [p.name for p in (folders / "cache").iterdir()] == ["answer.so"]
