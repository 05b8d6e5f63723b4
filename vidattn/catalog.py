"""Methods, cache policies and guides with their options, and presets, found without an import.

Importing a method brings in PyTorch, which takes longer than most answers of the command line.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from vidattn.support.config import show_value
from vidattn.support.registry import unknown
from vidattn.support.resources import resource

PRESETS = "configs/presets"
PACKAGE = Path(__file__).resolve().parent
# the methods that read everything
FULL = ("dense", "exact")
# of a folder of things with options, the word for one of them, and the class they derive from
HOMES = {
    "methods": ("method", "Method"),
    "cache": ("policy", "Policy"),
    "guides": ("guide", "Guide"),
}


@dataclass(frozen=True)
class Option:
    """A field of a method's dataclass.

    Args:
        hint: its type.
        default: as the command line reads it, "" where there is none.
        meaning: its entry in the Args of the docstring.
    """

    name: str
    hint: object
    default: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """What a method says about itself.

    Args:
        summary: the first sentence about its class.
        about: what it is and where it comes from, from the top of its file.
        options: by name, its own before those that others have too.
        reads_content: whether its plans read queries and keys; None where an option decides.
    """

    name: str
    summary: str
    about: str
    options: dict[str, Option]
    reads_content: bool | None


def list_methods() -> list[str]:
    """Names of the registered methods, in alphabetical order."""
    return list_names("methods")


def list_policies() -> list[str]:
    """Names of the registered cache policies, in alphabetical order."""
    return list_names("cache")


def list_names(home: str) -> list[str]:
    """Names of what is registered in one of the folders of things with options."""
    return sorted(module.name for module in pkgutil.iter_modules([str(PACKAGE / home)]))


def list_sparse_methods() -> list[str]:
    """Names of those that leave something out."""
    return [name for name in list_methods() if name not in FULL]


def list_presets() -> list[str]:
    """Names of the schedules that ship with the package, in alphabetical order."""
    return sorted(path.stem for path in resource(PRESETS).glob("*.yaml"))


@cache
def describe(name: str, home: str = "methods") -> Entry:
    """What a method says about itself, or something else with options.

    Raises:
        ValueError: no such method; the nearest names are listed.
    """
    word, root = HOMES[home]
    if name not in list_names(home):
        raise unknown(word, name, list_names(home))
    tree = _tree(f"vidattn.{home}.{name}")
    lines = [_lineage(tree, node) for node in sorted(_classes(tree), key=lambda node: node.name)]
    lineage = next(line for line in lines if line[-1][1].name == root)
    meanings: dict[str, str] = {}
    options: dict[str, Option] = {}
    reads: list[bool | None] = []
    for module, node in lineage:
        meanings = _meanings(node) | meanings
        for field in _fields(module, node):
            options.setdefault(field.name, field)
        reads += _reads_content(node)
    options = {key: replace(x, meaning=meanings.get(key, "")) for key, x in options.items()}
    summary, about = _paragraphs(lineage[0][1])[0], "\n\n".join(_paragraphs(tree))
    return Entry(name, summary, about, options, next(iter(reads), None))


@cache
def _tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _origin(tree: ast.Module, name: str) -> str | None:
    """The module that a name is imported from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module
    return None


def _lineage(tree: ast.Module, node: ast.ClassDef) -> list[tuple[ast.Module, ast.ClassDef]]:
    """A class and those of the package that it derives from, each with its module."""
    line = [(tree, node)]
    for base in map(ast.unparse, node.bases):
        origin = _origin(tree, base) or ""
        home = _tree(origin) if origin.startswith("vidattn.") else tree
        for parent in _classes(home):
            if parent.name == base:
                line += _lineage(home, parent)
    return line


def _fields(tree: ast.Module, node: ast.ClassDef) -> Iterator[Option]:
    """The fields that a dataclass declares itself, but those that a run sets."""
    for line in node.body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if "ClassVar" in ast.unparse(line.annotation):
            continue
        if line.value is not None and ast.unparse(line.value).startswith("run_state("):
            continue
        hint = eval(compile(ast.Expression(line.annotation), "", "eval"), {}, _Names(tree))
        default = "" if line.value is None else _words(line.value)
        yield Option(line.target.id, hint, default, "")


class _Names(dict):
    """What the names in a module mean; only those of others are imported."""

    def __init__(self, tree: ast.Module):
        self.tree = tree

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        if (origin := _origin(self.tree, name)) is None:
            raise KeyError(name)
        if origin.startswith("vidattn."):
            home = _tree(origin)
            for line in home.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
                    return eval(compile(ast.Expression(line.value), "", "eval"), {}, _Names(home))
        return getattr(importlib.import_module(origin), name)


def _words(value: ast.expr) -> str:
    """A default as the command line reads it, or else as it is written."""
    try:
        return show_value(ast.literal_eval(value))
    except ValueError:
        return ast.unparse(value)


def _reads_content(node: ast.ClassDef) -> Iterator[bool | None]:
    """Whether a class says it reads content, None where that takes some working out."""
    for line in node.body:
        if isinstance(line, ast.FunctionDef) and line.name == "reads_content":
            value = getattr(line.body[-1], "value", None)
            yield bool(value.value) if isinstance(value, ast.Constant) else None


def _paragraphs(node: ast.Module | ast.ClassDef) -> list[str]:
    """The docstring, a line for each paragraph."""
    doc = (ast.get_docstring(node) or "").replace("``", "")
    return [re.sub(r"\s*\n\s*", " ", paragraph) for paragraph in doc.split("\n\n")]


def _meanings(node: ast.ClassDef) -> dict[str, str]:
    """The entries in the Args of a docstring."""
    doc = (ast.get_docstring(node) or "").replace("``", "")
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    entry = r"^    ([\w, ]+): (.*?)(?=^    \w[\w, ]*: |\Z)"
    found = re.findall(entry, section[1] if section else "", re.MULTILINE | re.DOTALL)
    entries = [(names.split(", "), re.sub(r"\s+", " ", text).strip()) for names, text in found]
    return {name: text for names, text in entries for name in names}
