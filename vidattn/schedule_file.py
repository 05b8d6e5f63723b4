"""Schedules as YAML files: those that ship in configs/presets/, and anybody's own.

A file has the keys of ``ScheduleFile``, and each of its rules those of ``RuleFile``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from vidattn.catalog import PRESETS, list_presets
from vidattn.methods import method_class, name_of
from vidattn.schedule import DenseGuard, Model, Rule, Schedule, show_numbers
from vidattn.simulation.video_models import find_video_model
from vidattn.support.config import build, plain, read_yaml
from vidattn.support.registry import unknown
from vidattn.support.resources import resource

Numbers = int | str | tuple[int | str, ...]


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule as its file has it.

    Args:
        rules: read from the top; the first that covers a head holds, the others are dense.
        dense_layers: first layers that stay dense: a count or a fraction.
        dense_steps: first denoising steps that stay dense: a count or a fraction.
        model: the transformer that it was made for.
    """

    rules: tuple[dict, ...]
    dense_layers: int | float = 1
    dense_steps: int | float = 0
    model: Model | None = None


@dataclass(frozen=True)
class RuleFile:
    """A rule as the file has it.

    Args:
        method: a registered name.
        options: fields of the method.
        layers: a number, a range such as "4-7" with both its ends, or a list of such.
        heads: likewise.
        steps: [first, end], counts or fractions; the end is not among them, null for no end.
        transformer: component of the pipeline, where it has several.
    """

    method: str
    options: dict | None = None
    layers: Numbers | None = None
    heads: Numbers | None = None
    steps: tuple[int | float, int | float | None] | None = None
    transformer: str | None = None


def load_schedule(where: str | Path) -> Schedule:
    """The schedule in a file, or a preset by its name.

    Raises:
        ValueError: no such file or preset, or something in it that is not understood.

    >>> load_schedule("wan2.1-14b").guard.layers
    1
    """
    path = Path(where)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if str(where) not in list_presets():
            raise unknown("preset or .yaml file", str(where), list_presets())
        path = resource(f"{PRESETS}/{where}.yaml")
    name = f"schedule '{where}'"
    given = build(ScheduleFile, read_yaml(path), name)
    if not given.rules:
        raise ValueError(f"{name} has no rules, so everything would be dense: give at least one")
    rules = (_rule(rule, f"rule {i} of {name}") for i, rule in enumerate(given.rules, 1))
    try:
        guard = DenseGuard(given.dense_layers, given.dense_steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Schedule(tuple(rules), guard, given.model, name)


def find_presets(models: Mapping[str, Model], is_whole: bool = True) -> list[str]:
    """The presets made for the model whose transformers these are, by component name.

    Args:
        is_whole: whether they are all that the model has; else one may be an expert of several.

    >>> find_presets({"transformer": Model("MochiTransformer3DModel", 48, 24)})
    ['mochi-1']
    """
    found = []
    for name in list_presets():
        made_for, shape = load_schedule(name).model, find_video_model(name)
        assert made_for is not None
        wanted = (made_for.transformer, shape.layers, shape.heads)
        is_same = {(x.transformer, x.layers, x.heads) for x in models.values()} == {wanted}
        if is_same and (not is_whole or len(models) == shape.experts):
            found.append(name)
    return found


def save_schedule(schedule: Schedule, path: Path, comment: str = "") -> None:
    """Write a schedule to a file that ``load_schedule`` reads, under a comment."""
    content: dict[str, object] = {}
    if schedule.model is not None:
        content["model"] = plain(schedule.model)
    content["dense_layers"] = schedule.guard.layers
    content["dense_steps"] = schedule.guard.steps
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [yaml.safe_dump(content, sort_keys=False).rstrip(), "rules:"]
    for rule in schedule.rules:
        words = yaml.safe_dump(
            _plain_rule(rule), sort_keys=False, default_flow_style=True, width=999
        )
        lines.append(f"- {words.rstrip()}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rule(given: Mapping[str, object], what: str) -> Rule:
    entry = build(RuleFile, given, what)
    cls = method_class(entry.method)
    method = build(cls, entry.options or {}, f"method {entry.method!r} in {what}")
    limits = {name: _numbers(getattr(entry, name), name, what) for name in ("layers", "heads")}
    try:
        return Rule(method, steps=entry.steps, transformer=entry.transformer, **limits)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _plain_rule(rule: Rule) -> dict[str, object]:
    words: dict[str, object] = {}
    if rule.transformer is not None:
        words["transformer"] = rule.transformer
    for name in ("layers", "heads"):
        if (numbers := getattr(rule, name)) is not None:
            words[name] = numbers[0] if len(numbers) == 1 else show_numbers(numbers)
    if rule.steps is not None:
        words["steps"] = list(rule.steps)
    words["method"] = name_of(rule.method)
    if options := plain(rule.method):
        words["options"] = options
    return words


def _numbers(given: Numbers | None, name: str, what: str) -> tuple[int, ...] | None:
    """The numbers in "0, 4-7", in 3, or in a list of such."""
    if given is None:
        return None
    pieces = given if isinstance(given, tuple) else (given,)
    found: set[int] = set()
    for piece in ",".join(map(str, pieces)).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(
                f"{name} of {what} must be numbers and ranges such as 0, 4-7, got {given!r}"
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))
