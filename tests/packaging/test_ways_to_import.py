"""Every way to get the package imports it whole, and leaves the name `kernels` to its owner."""

import json

from tests.packaging.conftest import ROOT, run_python

MODULE = min(path.stem for path in (ROOT / "kernels").glob("*.py"))

REPORT = f"""
import json
from importlib.util import find_spec
import vidattn
import vidattn.kernels.{MODULE} as kernel
import kernels
from vidattn.resources import resource
backbones = find_spec("vidattn.backbones").origin
places = [kernel.__file__, str(resource("configs")), vidattn.__file__, backbones]
print(json.dumps([kernels.is_stub, *places]))
"""


def check(out, package, parent):
    """Assert that everything came from one copy, whose mapped folders lie in ``parent``."""
    is_stub, kernel, configs, root, backbones = json.loads(out.splitlines()[-1])
    assert is_stub is True
    assert kernel == str(parent / "kernels" / f"{MODULE}.py")
    assert configs == str(parent / "configs")
    assert root == str(package / "__init__.py")
    # the module, not the folder of the same name, which would be an empty namespace
    assert backbones == str(package / "backbones.py")


def test_checkout_from_its_root_beside_hf_libraries(checkout, hf_kernels):
    heavy = (
        "from transformers.utils.import_utils import is_kernels_available\n"
        "from transformers import LlamaModel\n"
        "from diffusers import WanPipeline\n"
        "assert is_kernels_available()\n"
    )
    out = run_python(heavy + REPORT, cwd=checkout, sites=[hf_kernels])
    check(out, checkout / "vidattn", checkout)


def test_checkout_from_elsewhere(checkout, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[hf_kernels], pythonpath=checkout)
    check(out, checkout / "vidattn", checkout)


def test_editable_install(checkout, installed_editable, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[installed_editable, hf_kernels])
    check(out, checkout / "vidattn", checkout)


def test_wheel(installed_wheel, hf_kernels, tmp_path):
    out = run_python(REPORT, cwd=tmp_path, sites=[installed_wheel, hf_kernels])
    check(out, installed_wheel / "vidattn", installed_wheel / "vidattn")
