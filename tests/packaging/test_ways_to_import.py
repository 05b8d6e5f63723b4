"""Every way to get the package imports it whole, and leaves the name `kernels` to its owner."""

import json

import pytest

from tests.packaging.conftest import ROOT, run_python

# A module without requirements of its own for each folder that a checkout keeps beside vidattn/.
MODULE = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if "triton" not in path.stem)[
    0
]

REPORT = f"""
import json
import vidattn
import vidattn.kernels.{MODULE} as kernel
import kernels
from vidattn.resources import resource
print(json.dumps([kernels.is_stub, kernel.__file__, str(resource("configs")), vidattn.__file__]))
"""


@pytest.mark.parametrize("way", ["checkout from its root", "checkout from elsewhere"])
def test_checkout(way, checkout, hf_kernels, tmp_path):
    at_root = way == "checkout from its root"
    out = run_python(
        REPORT,
        cwd=checkout if at_root else tmp_path,
        sites=[hf_kernels],
        pythonpath=None if at_root else checkout,
    )
    check(out, checkout / "vidattn", checkout)


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_editable(cwd, checkout, installed_editable, hf_kernels, tmp_path):
    out = run_python(
        REPORT,
        cwd=checkout if cwd == "root" else tmp_path,
        sites=[installed_editable, hf_kernels],
    )
    check(out, checkout / "vidattn", checkout)


def test_wheel(installed_wheel, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[installed_wheel, hf_kernels])
    check(out, installed_wheel / "vidattn", installed_wheel / "vidattn")


def check(out, package, parent):
    """Assert that everything came from one copy, whose mapped folders lie in ``parent``."""
    is_stub, kernel, configs, root = json.loads(out.splitlines()[-1])
    assert is_stub is True
    assert kernel == str(parent / "kernels" / f"{MODULE}.py")
    assert configs == str(parent / "configs")
    assert root == str(package / "__init__.py")


def test_hf_libraries_import_beside_the_checkout(checkout, hf_kernels):
    run_python(
        "from transformers.utils.import_utils import is_kernels_available\n"
        "from transformers import LlamaModel\n"
        "from diffusers import WanPipeline\n"
        "import kernels, vidattn\n"
        "assert is_kernels_available() and kernels.is_stub\n",
        cwd=checkout,
        sites=[hf_kernels],
    )
