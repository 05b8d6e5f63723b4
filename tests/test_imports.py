"""Imports point down the layers of the package, never up or sideways."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A unit may import the units of earlier layers. A module or folder of vidattn/ is a unit, as are
# the three folders beside it and scripts/.
LAYERS = (
    {"support"},
    {"grid", "kernels"},
    {"listing", "inputs", "engines"},
    {"pairs"},
    {"plan"},
    {"head_plan", "catalog"},
    {"planning"},
    {"methods", "attention"},
    {"mixture", "halo_operator", "schedule", "choice"},
    {"neighborhood", "quality", "simulation", "streaming", "guidance"},
    {"draw", "schedule_file", "cache", "guides"},
    {"pipelines", "backbones"},
    {"runs"},
    {"commands"},
    {"flags"},
    {"cli", "scripts"},
    {"__main__"},
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
BESIDE = ("kernels", "pipelines", "backbones")
FOLDERS = ("vidattn", *BESIDE, "scripts")


def python_files(root: Path) -> list[Path]:
    """The project's own modules, tests aside."""
    return [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def unit_of_file(root: Path, path: Path) -> str:
    """The unit a file belongs to; '' for vidattn/__init__.py, the door that sees everything."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] != "vidattn":
        return parts[0]
    return "" if parts[1] == "__init__" else parts[1]


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module == "vidattn":
                yield from ((node.lineno, f"vidattn.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def complaint(me: str, name: str) -> str | None:
    """What is wrong with unit ``me`` importing ``name``, if anything."""
    head, *rest = name.split(".")
    if not head:
        return f"relative import {name}; write the full name"
    if head in BESIDE:
        return f"imports {name}; it is called vidattn.{name}"
    if head != "vidattn" or not me:
        return None
    you = rest[0] if rest else ""
    if you not in RANK:
        # vidattn itself or a name it re-exports: only programs use the front door.
        is_program = RANK[me] >= RANK["cli"]
        return None if is_program else f"imports {name}; import from the module that defines it"
    if you != me and RANK[you] >= RANK[me]:
        return f"{me} imports {you}: layer {RANK[me]} may import lower ones, {you} is {RANK[you]}"
    return None


def violations(root: Path) -> list[str]:
    """Every import in the tree that breaks a rule, as 'file:line: what'."""
    found = []
    for path in python_files(root):
        me, name = unit_of_file(root, path), path.relative_to(root).as_posix()
        if me and me not in RANK:
            found.append(f"{name}:1: {me} has no layer; give it one in tests/test_imports.py")
            continue
        for line, target in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if wrong := complaint(me, target):
                found.append(f"{name}:{line}: {wrong}")
    return found


def test_imports_point_down():
    assert python_files(ROOT)
    assert "\n".join(violations(ROOT)) == ""


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("kernels/a.py", "from vidattn.plan import Plan", "kernels imports plan"),
        ("vidattn/methods/a.py", "import vidattn.attention", "methods imports attention"),
        ("vidattn/plan.py", "def f():\n    from vidattn import cli", "plan imports cli"),
        ("pipelines/a.py", "import vidattn.backbones.b", "pipelines imports backbones"),
        ("vidattn/draw.py", "from vidattn import attend", "imports vidattn.attend; import from"),
        ("vidattn/draw.py", "import vidattn", "imports vidattn; import from the module"),
        ("vidattn/cli.py", "import scripts.a\nimport kernels.a", "imports kernels.a; it is called"),
        ("scripts/a.py", "from pipelines import patch", "imports pipelines; it is called vidattn"),
        ("backbones/a.py", "from .b import c", "relative import .b"),
        ("vidattn/misc.py", "", "misc has no layer"),
    ],
)
def test_a_violation_is_caught(tmp_path, file, source, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:") and expected in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vidattn/__init__.py", "from vidattn.pipelines.patch import patch"),
        ("vidattn/methods/a.py", "from vidattn.methods.b import c\nfrom vidattn.plan import Plan"),
        ("vidattn/cli.py", "import vidattn\nfrom vidattn import attend\nimport rich"),
        ("pipelines/a.py", "from vidattn.pipelines.b import c\nimport diffusers.pipelines"),
        ("vidattn/attention.py", "from vidattn.kernels.block_sparse import forward"),
    ],
)
def test_a_good_import_passes(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []
