"""Every way to get the package imports it whole and once, and leaves `kernels` to its owner."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, run_python

MODULE = min(path.stem for path in (ROOT / "kernels").glob("*.py"))

REPORT = f"""
import json
import vidattn
import vidattn.kernels.{MODULE} as kernel
import kernels
from importlib.util import find_spec
from vidattn.support.resources import resource
backbones = find_spec("vidattn.backbones").origin
places = [vidattn.__file__, kernel.__file__, backbones, str(resource("configs"))]
print(json.dumps([kernels.is_stub, *places]))
"""


def check(out, root, *, inside=None, configs=None):
    """Assert that all came from the package in ``root``: modules from ``inside`` its folder."""
    package = root / "vidattn"
    inside = inside or package
    assert json.loads(out.splitlines()[-1]) == [
        True,
        str(package / "__init__.py"),
        str(inside / "kernels" / f"{MODULE}.py"),
        str(inside / "backbones" / "__init__.py"),
        str(configs or root / "configs"),
    ]


def test_checkout_from_its_root_beside_hf_libraries(checkout, hf_kernels):
    heavy = (
        "from transformers.utils.import_utils import is_kernels_available\n"
        "from transformers import LlamaModel\n"
        "from diffusers import WanPipeline\n"
        "assert is_kernels_available()\n"
    )
    check(run_python(heavy + REPORT, cwd=checkout, sites=[hf_kernels]), checkout)


def test_checkout_from_elsewhere(checkout, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[hf_kernels], pythonpath=checkout)
    check(out, checkout)


def test_checkout_without_links(checkout_without_links, hf_kernels):
    root = checkout_without_links
    out = run_python(REPORT, cwd=root, sites=[hf_kernels])
    check(out, root, inside=root)


def test_editable_install(checkout, installed_editable, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[installed_editable, hf_kernels])
    check(out, checkout)


def test_wheel(installed_wheel, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[installed_wheel, hf_kernels])
    check(out, installed_wheel, configs=installed_wheel / "vidattn" / "configs")


# every module of the folders beside the package, then the program that one of them is
IMPORT_ALL = """
import os, pkgutil, runpy, sys
from importlib import import_module
for folder in ("vidattn.kernels", "vidattn.pipelines", "vidattn.backbones"):
    for module in pkgutil.iter_modules(import_module(folder).__path__, folder + "."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
own = {name: os.path.realpath(module.__file__) for name, module in sys.modules.items()
       if (getattr(module, "__file__", None) or "").startswith(os.getcwd())}
sys.argv[1:] = ["-h"]
try:
    runpy.run_module("vidattn.backbones", run_name="__main__")
finally:
    print(len(own), len(set(own.values())), *{name.split(".")[0] for name in own})
"""


@pytest.mark.parametrize("way", ["checkout", "checkout_without_links"])
def test_no_module_is_there_twice_and_the_program_runs(way, request):
    root = request.getfixturevalue(way)
    usage, _, counts = run_python(IMPORT_ALL, cwd=root).strip().rpartition("\n")
    assert usage.startswith("usage: python -m vidattn.backbones PROGRAM")
    count, places, names = counts.split()
    assert (count, names) == (places, "vidattn")
    folders = [root / folder for folder in ("kernels", "pipelines", "backbones")]
    assert int(count) > sum(len([*folder.glob("*.py")]) for folder in folders)


def test_a_folder_at_the_root_is_not_taken_for_the_package(checkout):
    code = "try:\n    import backbones\nexcept ImportError as error:\n    print(error)"
    out = run_python(code, cwd=checkout)
    assert out == "this folder was imported as backbones; import vidattn.backbones\n"


def test_a_tool_that_walks_the_checkout_sees_every_file_once():
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(line).resolve() for line in done.stdout.splitlines()]
    assert len(files) == len(set(files)) > 100
