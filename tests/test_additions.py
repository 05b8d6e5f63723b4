"""What is added to a folder by what its README says: a method, a policy, a guide and others.

Each is tried in a copy of the checkout, with as many edits as the README names, by the tests that
are there already. For an engine, tests/test_engines.py does so.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme_cases import PAGES, ROOT, Page

COPIED = ("vidattn", "kernels", "pipelines", "backbones", "configs", "scripts", "tests")
FILES = (
    "tests/test_methods.py",
    "tests/test_readme.py",
    "tests/cache/test_policies.py",
    "tests/pipelines/test_families.py",
    "tests/pipelines/test_guiding.py",
    "tests/backbones/test_facts.py",
    "tests/backbones/test_pyramid.py",
)
CHOSEN = (
    "near_frames or long_keys or echo or calm or table_of or AnyFlowTransformer or every_known"
    " or pooling_tiny"
)
NUM_PARAMETERS = 10_739_240


def page_of(folder: str) -> Page:
    return next(page for page in PAGES if page.name == f"{folder}/README.md")


def edit(path: Path, before: str, added: str) -> None:
    """Put text behind what stands in a file once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{before!r} in {path.name}"
    path.write_text(text.replace(before, before + added), encoding="utf-8")


def add_methods(root: Path) -> None:
    """Two edits: the file, and its row."""
    page = page_of("vidattn/methods")
    for name, text in page.files.items():
        (root / name).write_text(text, encoding="utf-8")
    rows = "| `near_frames` | the grid | | | |\n| `long_keys` | content | | | |\n"
    edit(root / page.name, "|---|---|---|---|---|\n", rows)


def add_policy(root: Path) -> None:
    """Two edits: the file, and its row."""
    page = page_of("vidattn/cache")
    ((name, text),) = page.files.items()
    (root / name).write_text(text, encoding="utf-8")
    edit(root / page.name, "|---|---|---|\n", "| `echo` | | |\n")


def add_guide(root: Path) -> None:
    """Two edits: the file, and its row."""
    page = page_of("vidattn/guides")
    ((name, text),) = page.files.items()
    (root / name).write_text(text, encoding="utf-8")
    edit(root / page.name, "|---|---|---|---|\n", "| `calm` | | | |\n")


def add_family(root: Path) -> None:
    """Three edits: the file; a small one in the tests and its row have stayed."""
    ((name, text),) = page_of("pipelines").files.items()
    (root / name).unlink()
    (root / "pipelines/families/added.py").write_text(text, encoding="utf-8")


def add_backbone(root: Path) -> None:
    """Three edits: the file, its parameters, and a small version; the row is prose."""
    ((name, text),) = page_of("backbones").files.items()
    (root / name).write_text(text, encoding="utf-8")
    facts, small = (root / f"tests/backbones/test_{x}.py" for x in ("facts", "pyramid"))
    edit(facts, "\nFACTS = {", f'"pooling_tiny": ({NUM_PARAMETERS}, None),')
    edit(small, "\nMODELS = {", '"pooling_tiny": {"embed_dim": 8, "depths": (1, 1, 1, 1)},')
    edit(small, "\nNO_TABLES = (", '"pooling_tiny",')


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """What each of the chosen tests of an edited copy of the checkout came to."""
    root = tmp_path_factory.mktemp("copy") / "project"
    for name in COPIED:
        unmade = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=unmade)
    (root / "assets").symlink_to(ROOT / "assets")
    for path in (*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "CITATION.cff"):
        shutil.copy(path, root)
    (root / "LICENSE").touch()
    for add in (add_methods, add_policy, add_guide, add_family, add_backbone):
        add(root)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", CHOSEN, *FILES],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return dict(re.findall(r"^(\S+::.*\S) (PASSED|SKIPPED) +\[", done.stdout, re.MULTILINE))


@pytest.mark.parametrize(
    ("what", "least"),
    [
        ("[near_frames", 10),
        ("[long_keys", 8),
        ("table_of_methods", 1),
        ("limit[window-int4-echo", 1),
        ("table_of_policies", 1),
        ("comes_off[calm", 2),
        ("table_of_guides", 1),
        ("AnyFlowTransformer3DModel", 3),
        ("every_known_model_has_a_tiny_one", 1),
        ("table_of_models", 1),
        ("size_of[pooling_tiny", 1),
        ("pyramid.py::test_feature_maps[pooling_tiny", 1),
    ],
)
def test_what_is_added_is_tested(outcomes, what, least):
    some = [outcome for name, outcome in outcomes.items() if what in name]
    assert some.count("PASSED") >= least


def test_the_family_of_the_page_is_the_one_that_ships():
    ((name, text),) = page_of("pipelines").files.items()
    assert text.replace(f"    # {name}", "", 1) == (ROOT / name).read_text(encoding="utf-8")
