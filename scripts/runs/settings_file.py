"""The YAML file of a training run: read, changed on the command line, compared with another's."""

import dataclasses
from pathlib import Path
from typing import TypeVar

import yaml

from vidattn.support.config import build, read_yaml

Settings = TypeVar("Settings")


def read_settings(cls: type[Settings], path: Path, changes: list[str]) -> Settings:
    """The settings in a YAML file, some of them changed.

    Args:
        cls: a dataclass whose fields are the sections of the file.
        changes: 'section.key=value' each, the value as in YAML.

    Raises:
        ValueError: no such file, an unknown key, a value that does not fit.
    """
    given = read_yaml(path)
    for change in changes:
        name, equals, value = change.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise ValueError(f"--set takes section.key=value, got '{change}'")
        if not isinstance(given.setdefault(section, {}), dict):
            raise ValueError(f"'{section}' of '{path}' must hold keys and values")
        try:
            given[section][key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of --set {change} is no valid YAML: {error}") from error
    return build(cls, given, f"'{path}'")


def flat(settings: object) -> dict[str, object]:
    """Every setting as 'section.key'."""
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(settings).items()
        for key, value in values.items()
    }
