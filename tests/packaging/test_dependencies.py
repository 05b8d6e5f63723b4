"""Everything the code imports is declared, so that a fresh installation can run it."""

import ast
import re
import sys

import pytest

from tests.packaging.test_contents import FOLDERS, PYPROJECT, ROOT
from tests.test_imports import imported

DISTRIBUTION = {
    "PIL": "pillow",
    "cache_dit": "cache-dit",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "huggingface_hub": "huggingface-hub",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "optimum": "optimum-quanto",
    "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
}

# tomllib joined the standard library in 3.11
STANDARD = {*sys.stdlib_module_names, "tomllib"}
# benchmarks time these where somebody has built them
PEERS = {"natten"}


def declared(*extras):
    """Names of the distributions that an installation with these extras asks for."""
    project = PYPROJECT["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines}


def third_party(folder):
    """{distribution: a file that imports it} over the modules of a folder."""

    paths = sorted((ROOT / folder).rglob("*.py"))
    own = {"vidattn", "tests"} | PEERS
    if folder in ("scripts", "tests"):
        # programs, and tests of their parts, import the files and folders beside the programs
        own |= {path.stem for path in (ROOT / "scripts").iterdir()}
    found = {}
    for path in paths:
        for _, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            head = name.split(".")[0]
            if head not in own and head not in STANDARD:
                found[DISTRIBUTION.get(head, head).lower()] = path.relative_to(ROOT).as_posix()
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [*((folder, ()) for folder in FOLDERS), ("scripts", ("train",)), ("tests", ("test",))],
)
def test_every_import_is_declared(folder, extras):
    missing = {
        name: file for name, file in third_party(folder).items() if name not in declared(*extras)
    }
    assert missing == {}
