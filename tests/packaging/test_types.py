"""Tools that read code without running it find every module of a checkout, and types in the doors.

mypy takes the settings in pyproject.toml, which leave the types of other libraries aside.
"""

import re
import subprocess
import sys

from tests.packaging.conftest import ROOT


def mypy(*arguments):
    """What mypy says, without its summary."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not done.stderr, done.stderr
    return done.stdout


def test_a_program_on_the_public_names_is_strictly_typed():
    assert mypy("--strict", "--follow-imports=silent", "tests/packaging/typed_use.py") == ""


def test_modules_beside_the_package_are_found_and_read(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from vidattn.backbones.nat import NeighborhoodTransformer\n"
        "from vidattn.kernels.block_lists import BlockLists\n"
        "from vidattn.pipelines.handle import Handle\n"
        "reveal_type((NeighborhoodTransformer, BlockLists, Handle))\n"
        "Handle(1)\n"
    )
    said = mypy("--strict", "--follow-imports=silent", program)
    assert set(re.findall(r"vidattn\.[\w.]+", said)) >= {
        "vidattn.backbones.nat.NeighborhoodTransformer",
        "vidattn.kernels.block_lists.BlockLists",
        "vidattn.pipelines.handle.Handle",
    }
    assert 'Missing positional arguments "transformers", "settings" in call to "Handle"' in said
