"""The wheel holds every module, the bundled model and the configurations, and nothing else."""

import re
import sys
import tarfile
import zipfile

import pytest

from tests.packaging.conftest import ROOT, build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = ("vidattn", "kernels", "pipelines", "backbones")


def folder_of(package):
    """The folder of a listed package, as setuptools finds it."""
    mapped = SETUPTOOLS["package-dir"]
    name = package
    while name not in mapped and "." in name:
        name = name.rpartition(".")[0]
    return ROOT / mapped.get(name, name) / package[len(name) + 1 :].replace(".", "/")


def shipped_modules():
    """Path in the wheel of every module in the checkout."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            yield inside if folder == "vidattn" else f"vidattn/{inside}"


def test_every_folder_with_modules_is_listed():
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    found = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert found <= listed, "add the missing folders to tool.setuptools.packages in pyproject.toml"
    assert all(folder.is_dir() for folder in listed)


@pytest.mark.parametrize("folder", ["kernels", "pipelines"])
def test_a_folder_beside_the_package_is_no_package(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py would shadow other packages called {folder}"
    )


def test_wheel_holds_every_module_and_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    data = {
        f"vidattn/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("configs/**/*.yaml", "assets/tiny-t2v/**/*", "kernels/cpp/*.[ch]*")
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    expected = {*shipped_modules(), *data, "vidattn/py.typed"}
    assert {name for name in names if not name.startswith(info)} == expected


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    version = re.search(r'__version__ = "(.+)"', (ROOT / "vidattn/__init__.py").read_text())[1]
    info = f"vidattn-{version}.dist-info"
    assert archive.read(f"{info}/top_level.txt").decode().split() == ["vidattn"]
    assert "vidattn = vidattn.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_wheel_from_the_source_archive_is_the_same(checkout, wheel, tmp_path):
    archive = build("build_sdist", checkout, tmp_path / "sdist")
    tarfile.open(archive).extractall(tmp_path)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    assert not [path for folder in FOLDERS[1:] for path in (source / "vidattn").glob(folder)]
    again = build("build_wheel", source, tmp_path / "wheel")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())
