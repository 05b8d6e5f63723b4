"""The package as a user may get it: a copied checkout, its wheel, and a stub of HF's `kernels`."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
SHIPPED = ("vidattn", "kernels", "pipelines", "backbones", "configs", "assets", "scripts", "tests")
SHIPPED_FILES = ("pyproject.toml", "README.md", "LICENSE")

# With -S no .pth file of the real environment is read, so the editable install that runs this test
# cannot stand in for a file that the copy under test lacks; nor can its finder, which lies last.
PRELUDE = """
import site, sys
for folder in {sites!r}:
    site.addsitedir(folder)
sys.path.extend({plain!r})
"""

# As much of HF's `kernels` as transformers touches when it is imported: decorators and constants.
STUB = """
is_stub = True
class Anything:
    __call__ = __getattr__ = __or__ = lambda self, *args, **kwargs: self
def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)
    is_decorator = name.startswith(('use_kernel_forward', 'use_kernelized'))
    return (lambda *args: lambda thing: thing) if is_decorator else Anything()
"""


def run_python(code, *, cwd, sites=(), pythonpath=None):
    """Run code in a fresh interpreter that sees this environment's packages, then ``sites``."""
    prelude = PRELUDE.format(plain=SITE_PACKAGES, sites=[str(folder) for folder in sites])
    env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    if pythonpath:
        env["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(
        [sys.executable, "-S", "-c", prelude + code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def build(hook, source, out):
    """Call a build hook of setuptools in ``source``, as pip does, and return the file it made."""
    out.mkdir(parents=True)
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    run_python(code, cwd=source)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of what a clone holds, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in SHIPPED:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in SHIPPED_FILES:
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture
def checkout_without_links(checkout, tmp_path):
    """A copy in which links are what git makes of them where there are none: text files."""
    copy = shutil.copytree(checkout, tmp_path / "without links", symlinks=True)
    for path in (copy / "vidattn").iterdir():
        if path.is_symlink():
            target = path.readlink()
            path.unlink()
            path.write_text(target.as_posix())
    return copy


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory):
    """The wheel file built from the checkout."""
    return build("build_wheel", checkout, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="session")
def installed_wheel(wheel, tmp_path_factory):
    """A folder like site-packages into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("wheel") / "site"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def installed_editable(checkout, tmp_path_factory):
    """A folder like site-packages that holds an editable install of the checkout."""
    out = tmp_path_factory.mktemp("editable")
    folder = out / "site"
    zipfile.ZipFile(build("build_editable", checkout, out / "out")).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def hf_kernels(tmp_path_factory):
    """A folder like site-packages that holds a stub of the distribution called `kernels`."""
    site = tmp_path_factory.mktemp("hf_kernels")
    # transformers only touches a `kernels` whose version it supports.
    source = Path(find_spec("transformers").origin).with_name("utils") / "import_utils.py"
    found = re.search(r'^KERNELS_MIN_VERSION = "(.+)"', source.read_text(), re.MULTILINE)
    version = found.group(1) if found else "0.18.2"
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(STUB)
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "top_level.txt").write_text("kernels\n")
    (info / "RECORD").write_text(f"kernels/__init__.py,,\n{info.name}/METADATA,,\n")
    return site
