"""What the command line is to run, read without PyTorch: methods with options, and schedules."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from vidattn.catalog import describe, list_presets
from vidattn.choice import Choice, make_choice, parse_choice, parse_value
from vidattn.support.config import alternatives, describe_type, show_value
from vidattn.support.registry import unknown

DEFAULT_METHOD = "radial:density=0.3"
SCHEDULE_HELP = "a preset (`vidattn list --presets`) or a YAML file, instead of a method"


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule by the name of a preset, or by its file.

    Raises:
        ValueError: there is none.
    """

    where: str

    def __post_init__(self):
        is_file = Path(self.where).suffix.lower() in (".yaml", ".yml")
        if not is_file and self.where not in list_presets():
            raise unknown("preset or .yaml file", self.where, list_presets())

    @property
    def label(self) -> str:
        """The choice in the words of the command line."""
        return f"schedule:{self.where}"

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        return {"schedule": self.where}


@dataclass(frozen=True)
class PresetChoice:
    """The preset of the model that is there."""

    label: str

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        return {}


# what patch takes
Served = Choice | ScheduleChoice | PresetChoice


@dataclass(frozen=True)
class AllMethods:
    """Every method but dense, set to a density where one is given."""

    density: float | None = None


def parse_all(text: str) -> AllMethods:
    """Every method, from ``all`` or ``all:density=0.25``.

    Raises:
        ValueError: another option, or no number.
    """
    option, _, value = text.partition(":")[2].partition("=")
    if option not in ("", "density"):
        raise ValueError(f"all takes a density and no other option, got {text!r}")
    return AllMethods(parse_value("density", value, float) if option else None)


def add_option_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """One flag for every option of a method; options that share a name with a flag are left out."""
    group = parser.add_argument_group(f"options of {name}")
    for option in describe(name).options.values():
        flag = "--" + option.name.replace("_", "-")
        if flag in parser._option_string_actions:
            continue
        words = f"{option.meaning} [{describe_type(option.hint)}; default {option.default}]"
        words = words.replace("%", "%%").strip()
        is_switch = set(alternatives(option.hint)) <= {bool, type(None)}
        how = {"action": argparse.BooleanOptionalAction} if is_switch else {"metavar": "X"}
        group.add_argument(flag, dest=f"option_{option.name}", default=None, help=words, **how)


def flagged_options(args: argparse.Namespace) -> dict[str, str]:
    """The options that were given as flags of their own."""
    prefix = "option_"
    return {
        key.removeprefix(prefix): show_value(value)
        for key, value in vars(args).items()
        if key.startswith(prefix) and value is not None
    }


def choices_of(args: argparse.Namespace, default: str | None = None) -> list[Choice]:
    """The methods named on the command line, each once, with the options given as flags.

    Args:
        default: the method that flags belong to where none is named.

    Raises:
        ValueError: flags beside more than one method.
    """
    texts = [*getattr(args, "methods", []), *args.method]
    flags = flagged_options(args)
    if flags and not texts and default:
        texts = [default]
    if flags and len(texts) > 1:
        flag = next(iter(flags))
        raise ValueError(
            f"--{flag.replace('_', '-')} is an option of one method; with several, write it inside "
            f"the method: {texts[0]}:{flag}={flags[flag]}"
        )
    choices = [parse_choice(text) for text in texts]
    if flags:
        (choice,) = choices
        given = {option: show_value(value) for option, value in choice.options.items()}
        choices = [make_choice(choice.name, given | flags)]
    return list({choice.label: choice for choice in choices}.values())


def named_choices(args: argparse.Namespace) -> list[Choice]:
    """The same where there is no default.

    Raises:
        ValueError: no method, or flags beside more than one.
    """
    if not args.methods and not args.method:
        raise ValueError("no method given; `vidattn list` shows them")
    return choices_of(args)
