"""The command line: vidattn generate, stream, compare, look, tune, and what else is a command."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from vidattn import __version__
from vidattn.catalog import list_methods
from vidattn.runs.choices import add_option_flags
from vidattn.support.registry import unknown

COMMANDS = {
    "generate": "make a video",
    "stream": "make a video of any length with a causal model, while it can be watched",
    "compare": "time methods against dense attention, on one seed",
    "look": "show where a word of the prompt is looked at",
    "tune": "mix methods by layer and head, and write the schedule",
    "calibrate": "find the orders and masks of paro, and write its file",
    "list": "show the methods, the options of one, or the models",
    "draw": "draw the plan of a method on a grid",
    "simulate": "bound how fast a method can be on a GPU, and pick its tile",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 asked wrongly, 130 stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return _fail("stopped; nothing unfinished was left behind", 130)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ValueError, NotImplementedError) as error:
        if debug:
            raise
        return _fail(str(error), 2)
    except Exception as error:
        if debug:
            raise
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _fail(f"{words}\n(--debug shows where)", 1)


def _run(argv: list[str]) -> int:
    if argv[:1] in (["help"], ["-h"], ["--help"]):
        argv = [*argv[1:2], "--help"] if argv[1:] else []
        if not argv:
            print(_overview())
            return 0
    if not argv:
        print(_overview(), file=sys.stderr)
        return 2
    if argv[0] == "--version":
        print(f"vidattn {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    # the flags need no PyTorch, so a question or a mistake is answered before it is imported
    flags = importlib.import_module(f"vidattn.flags.{name}")
    parser = _Parser(
        prog=f"vidattn {name}",
        description=(flags.__doc__ or "").partition(": ")[2],
        epilog=flags.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_method_flags(parser, rest, flags)
    args, extra = parser.parse_known_args(rest)
    args.argv, args.version = argv, __version__
    if extra:
        raise _unknown_words(parser, extra)
    flags.read(args)
    importlib.import_module(f"vidattn.commands.{name}").run(args)
    return 0


def _add_method_flags(parser: _Parser, rest: list[str], flags: ModuleType) -> None:
    """Give the options of the method on the command line flags of their own, where it is one."""
    is_bare = getattr(flags, "BARE_METHODS", False)
    words = [
        word.removeprefix("--method=").partition(":")[0]
        for before, word in zip(["", *rest], rest)
        if before == "--method" or word.startswith("--method=") or is_bare
    ]
    names = list(dict.fromkeys(word for word in words if word in list_methods()))
    names = names or [name for name in list_methods() if name == getattr(flags, "FLAGS_OF", None)]
    if len(names) == 1:
        add_option_flags(parser, names[0])


def _unknown_words(parser: _Parser, extra: list[str]) -> ValueError:
    flag = next((word.partition("=")[0] for word in extra if word.startswith("-")), None)
    if flag is None:
        return ValueError(f"unexpected {extra[0]!r}; quote a prompt of several words")
    known = sorted(x for x in parser._option_string_actions if x.startswith("--"))
    return unknown("option", flag, known, near=_near_flags(flag, known))


def _near_flags(flag: str, known: list[str]) -> list[str]:
    """Flags that share a whole word with one that is not known, or are spelt almost like it."""
    words = set(flag.strip("-").split("-"))
    shared = [x for x in known if words & set(x.strip("-").split("-"))]
    return shared[:3] or difflib.get_close_matches(flag, known, n=3, cutoff=0.75)


def _overview() -> str:
    lines = [f"  {name:<10}{words}" for name, words in COMMANDS.items()]
    return "\n".join(
        [
            f"vidattn {__version__}: sparse attention for video diffusion",
            "",
            "usage: vidattn COMMAND ...   (vidattn COMMAND --help explains one)",
            "",
            *lines,
        ]
    )


def _fail(message: str, code: int) -> int:
    print(f"vidattn: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
