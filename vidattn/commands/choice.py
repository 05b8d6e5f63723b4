"""What the command line is to run, read without PyTorch: methods with options, and schedules."""

from __future__ import annotations

import argparse
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

from vidattn.catalog import describe, list_presets
from vidattn.config import alternatives, describe_type, show_value
from vidattn.registry import unknown

if typing.TYPE_CHECKING:
    from vidattn.method import Method

DEFAULT_METHOD = "radial:density=0.3"
SYNTAX = "NAME or NAME:OPTION=VALUE,... as in radial:density=0.3,window=tile"
SCHEDULE_HELP = "a preset (`vidattn list --presets`) or a YAML file, instead of a method"
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Choice:
    """A method by name, with the options that were given."""

    name: str
    options: dict[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The choice in the words of the command line.

        >>> Choice("neighborhood", {"window": (5, 9, 9)}).label
        'neighborhood:window=5,9,9'
        """
        options = ",".join(f"{name}={show_value(x)}" for name, x in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def create(self) -> Method:
        """The method itself.

        Raises:
            ValueError: a value out of range.
        """
        from vidattn.methods import create_method

        return create_method(self.name, **self.options)

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        return {"method": self.name, **self.options}


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


def parse_choice(text: str) -> Choice:
    """A choice from ``name:option=value,option=value``.

    A piece without '=' belongs to the value before it, so a size is written ``window=5,9,9``.

    Raises:
        ValueError: no such method or option (the nearest are listed), or a value of another type.

    >>> parse_choice("neighborhood:window=5,9,9,stride=1").options
    {'window': (5, 9, 9), 'stride': 1}
    """
    name, _, rest = text.partition(":")
    describe(name)
    given: dict[str, str] = {}
    last = ""
    for piece in filter(None, (x.strip() for x in rest.split(","))):
        option, equals, value = piece.partition("=")
        if equals:
            last = option.strip().replace("-", "_")
            given[last] = value.strip()
        elif last:
            given[last] += f",{piece}"
        else:
            raise ValueError(f"--method {text!r} has no '=' in {piece!r}; write {SYNTAX}")
    return make_choice(name, given)


def make_choice(name: str, given: dict[str, str]) -> Choice:
    """A choice from options in words.

    Raises:
        ValueError: no such method or option (the nearest are listed), or a value of another type.
    """
    known = describe(name).options
    for option in given:
        if option not in known:
            raise unknown(f"option of method {name!r}", option, known)
    values = {
        option: parse_value(option, text, known[option].hint) for option, text in given.items()
    }
    return Choice(name, values)


def parse_value(option: str, text: str, hint: object) -> object:
    """A value of the type ``hint`` in words: 0.3, 5,9,9, true, none.

    Raises:
        ValueError: the words fit no type of the option.
    """
    for kind in sorted(alternatives(hint), key=_rank):
        try:
            return _parse(text.strip(), kind)
        except (ValueError, KeyError):
            continue
    raise ValueError(f"{option} must be {describe_type(hint)}, got {text!r}")


def _parse(text: str, kind: object) -> object:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return {"none": None}[text.lower()]
    if kind is bool:
        return _WORDS[text.lower()]
    if origin is tuple:
        pieces = [piece for piece in re.split(r"[,x×\s]+", text.strip("()[] ")) if piece]
        kinds = args[:1] * len(pieces) if args[-1] is Ellipsis else args
        if len(pieces) != len(kinds):
            raise ValueError
        return tuple(_parse(piece, kind) for piece, kind in zip(pieces, kinds))
    if origin is typing.Literal:
        return {str(arg): arg for arg in args}[text]
    return kind(text)


def _rank(kind: object) -> int:
    """Narrow types are tried before wide ones: everything is a str."""
    order = (type(None), bool, int, float, str)
    return order.index(kind) if kind in order[:-1] else len(order) + (kind is str)


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
