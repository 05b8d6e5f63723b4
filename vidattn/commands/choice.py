"""A method with its options, read from the command line by way of the method's dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

from vidattn.config import alternatives, describe_type, show_value
from vidattn.methods import create_method, list_methods, method_class
from vidattn.registry import unknown
from vidattn.schedule_file import load_schedule

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

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^\w.=+-]+", "-", self.label)

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        return {"method": self.name, **self.options}


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule by the name of a preset, or by its file.

    Raises:
        ValueError: there is none, or it is broken.
    """

    where: str

    def __post_init__(self):
        load_schedule(self.where)

    @property
    def label(self) -> str:
        """The choice in the words of the command line."""
        return f"schedule:{self.where}"

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        return {"schedule": self.where}


def parse_choice(text: str) -> Choice:
    """A choice from ``name:option=value,option=value``.

    A piece without '=' belongs to the value before it, so a size is written ``window=5,9,9``.

    Raises:
        ValueError: no such method or option (the nearest are listed), or a bad value.

    >>> parse_choice("neighborhood:window=5,9,9,stride=1").options
    {'window': (5, 9, 9), 'stride': 1}
    """
    name, _, rest = text.partition(":")
    method_class(name)
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
        ValueError: no such method or option (the nearest are listed), or a bad value.
    """
    hints = option_hints(name)
    for option in given:
        if option not in hints:
            raise unknown(f"option of method {name!r}", option, hints)
    options = {option: parse_value(option, text, hints[option]) for option, text in given.items()}
    create_method(name, **options)
    return Choice(name, options)


def option_hints(name: str) -> dict[str, object]:
    """The type of every option of a method, its own before those that others have too."""
    cls = method_class(name)
    hints, own = typing.get_type_hints(cls), inspect.get_annotations(cls)
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)
    return {field.name: hints[field.name] for field in fields}


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


def describe_method(name: str) -> str:
    """The first sentence of a method's docstring."""
    return _clean(inspect.getdoc(method_class(name))).split("\n\n")[0].replace("\n", " ")


def explain_method(name: str) -> str:
    """What a method is and where it comes from: the docstring of its file."""
    paragraphs = _clean(inspect.getdoc(inspect.getmodule(method_class(name)))).split("\n\n")
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", paragraph) for paragraph in paragraphs)


def describe_options(name: str) -> dict[str, str]:
    """The meaning of every option, from the Args section of the method's docstring."""
    doc = inspect.getdoc(method_class(name)) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = dict.fromkeys(option_hints(name), "")
    entries = re.findall(
        r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1] if section else "", re.M | re.S
    )
    found.update({option: _clean(re.sub(r"\s+", " ", text).strip()) for option, text in entries})
    return found


def default_of(name: str, option: str) -> str:
    """The default of an option in words."""
    fields = {field.name: field for field in dataclasses.fields(method_class(name))}
    default, factory = fields[option].default, fields[option].default_factory
    if default is not dataclasses.MISSING:
        return show_value(default)
    return "" if factory is dataclasses.MISSING else show_value(factory())


def _clean(doc: str | None) -> str:
    return (doc or "").replace("``", "")


def add_option_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """One flag for every option of a method; options that share a name with a flag are left out."""
    meanings = describe_options(name)
    group = parser.add_argument_group(f"options of {name}")
    for option, hint in option_hints(name).items():
        flag = "--" + option.replace("_", "-")
        if flag in parser._option_string_actions:
            continue
        words = f"{meanings[option]} [{describe_type(hint)}; default {default_of(name, option)}]"
        words = words.replace("%", "%%").strip()
        how = {"action": argparse.BooleanOptionalAction} if hint is bool else {"metavar": "X"}
        group.add_argument(flag, dest=f"option_{option}", default=None, help=words, **how)


def flagged_options(args: argparse.Namespace) -> dict[str, str]:
    """The options that were given as flags of their own."""
    prefix = "option_"
    return {
        key.removeprefix(prefix): show_value(value)
        for key, value in vars(args).items()
        if key.startswith(prefix) and value is not None
    }


def choices_of(args: argparse.Namespace) -> list[Choice]:
    """The methods named on the command line, each once, with the options given as flags.

    Raises:
        ValueError: no method, or flags beside more than one method.
    """
    texts = [*getattr(args, "methods", []), *args.method]
    flags = flagged_options(args)
    if not texts:
        raise ValueError("no method given; `vidattn list` shows them")
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


def expand_all(methods: Sequence[str]) -> list[str]:
    """The methods with "all", or "all:density=...", replaced by every method but dense.

    Raises:
        ValueError: another option than a density.
    """
    expanded = []
    for text in methods:
        name, _, options = text.partition(":")
        if name != "all":
            expanded.append(text)
            continue
        option = options.partition("=")[0]
        if options and option != "density":
            raise ValueError(f"all takes a density and no other option, got {text!r}")
        for name in list_methods():
            if name != "dense":
                expanded.append(f"{name}:{options}" if option in option_hints(name) else name)
    return expanded
