"""`vidattn list`: the methods, everything about one of them, the models or the presets."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vidattn.commands.choice import (
    default_of,
    describe_method,
    describe_options,
    explain_method,
    option_hints,
)
from vidattn.config import describe_type
from vidattn.methods import create_method, label, list_methods
from vidattn.resources import resource
from vidattn.schedule_file import PRESETS, list_presets, load_schedule

EXAMPLES = """\
examples:
  vidattn list
  vidattn list radial
  vidattn list --models
  vidattn list --presets"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("method", nargs="?", help="show the options of this method")
    parser.add_argument(
        "--presets", action="store_true", help="show the schedules for published models"
    )
    parser.add_argument(
        "--models", action="store_true", help="show the transformers of diffusers that are known"
    )


def run(args: argparse.Namespace) -> None:
    """Print what is asked for."""
    console = Console(highlight=False)
    asked = [args.method, args.models and "--models", args.presets and "--presets"]
    if len(asked := [word for word in asked if word]) > 1:
        raise ValueError(f"list takes a method, --models or --presets, got {' and '.join(asked)}")
    if args.models:
        _show_models(console)
    elif args.presets:
        _show_presets(console)
    elif args.method:
        _show_method(console, args.method)
    else:
        _show_methods(console)


def _show_methods(console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "what it keeps", "options"):
        table.add_column(column, overflow="fold")
    for name in list_methods():
        table.add_row(
            f"[bold cyan]{name}[/]", escape(describe_method(name)), " ".join(option_hints(name))
        )
    console.print(table)
    console.print(
        "\nvidattn list METHOD explains the options, vidattn draw METHOD makes a picture."
    )


def _show_models(console: Console) -> None:
    from vidattn.pipelines.family import families

    refused = [family for family in families() if isinstance(family.refuse, str)]
    known = [family for family in families() if family not in refused]
    console.print("[bold]vidattn can patch pipelines of these transformers[/]")
    for name in sorted(name for family in known for name in family.models):
        console.print(f"  {name}")
    console.print("\n[bold]and refuses these[/]")
    for family in refused:
        console.print(f"  {', '.join(family.models)}:\n    {escape(family.refuse)}")


def _show_presets(console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("preset", "transformer", "dense layers", "dense steps", "methods"):
        table.add_column(column, overflow="fold")
    for name in list_presets():
        schedule = load_schedule(name)
        guard, methods = (
            schedule.guard,
            dict.fromkeys(label(rule.method) for rule in schedule.rules),
        )
        cells = (
            schedule.model.transformer,
            str(guard.layers),
            str(guard.steps),
            "\n".join(methods),
        )
        table.add_row(f"[bold cyan]{name}[/]", *map(escape, cells))
    console.print(table)
    console.print(
        "\nUsed as --schedule NAME, or vidattn.patch(pipe, schedule=NAME); the sources stand in\n"
        f"{resource(PRESETS)}",
        soft_wrap=True,
    )


def _show_method(console: Console, name: str) -> None:
    console.print(f"[bold cyan]{name}[/]  {escape(describe_method(name))}\n")
    console.print(escape(explain_method(name)), soft_wrap=False)
    reads = create_method(name).reads_content
    what = "reads queries and keys" if reads else "is the same for every content"
    console.print(f"\nThe plan {what}.\n")
    meanings = describe_options(name)
    if not meanings:
        console.print("It has no options.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for option, hint in option_hints(name).items():
        table.add_row(
            f"[bold]{option}[/]",
            describe_type(hint),
            escape(default_of(name, option)),
            escape(meanings[option]),
        )
    console.print(table)
    defaults = {option: default_of(name, option) for option in meanings}
    option = next(x for x in meanings if x == "density" or defaults[x] != "none")
    example = "0.3" if option == "density" else defaults[option]
    console.print(
        f"\nWritten --{option.replace('_', '-')} {example}, or inside the method as "
        f"{name}:{option}={example}."
    )
