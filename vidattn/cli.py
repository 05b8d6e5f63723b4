"""The command line: vidattn generate | compare | tune | calibrate | list | draw | simulate."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from vidattn import __version__
from vidattn.commands.choice import add_option_flags
from vidattn.methods import list_methods
from vidattn.registry import unknown

COMMANDS = {
    "generate": "make a video",
    "compare": "time methods against dense attention, on one seed",
    "tune": "mix methods by layer and head, and write the schedule",
    "calibrate": "find the orders and masks of paro, and write its file",
    "list": "show the methods, the options of one, or the models",
    "draw": "draw the plan of a method on a grid",
    "simulate": "bound how fast a method can be on a GPU, and pick its tile",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
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
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"vidattn {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    command = importlib.import_module(f"vidattn.commands.{name}")
    parser = _Parser(
        prog=f"vidattn {name}",
        description=(command.__doc__ or "").partition(": ")[2],
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_method_flags(parser, rest, getattr(command, "DEFAULT_METHOD", None))
    args, extra = parser.parse_known_args(rest)
    args.argv, args.version = argv, __version__
    if extra:
        raise _unknown_words(parser, extra)
    command.run(args)
    return 0


def _add_method_flags(parser: _Parser, rest: list[str], default: str | None) -> None:
    """Give the options of the method on the command line flags of their own, where it is one."""
    is_bare = parser.prog.endswith((" draw", " simulate"))
    words = [
        word.removeprefix("--method=").partition(":")[0]
        for before, word in zip(["", *rest], rest)
        if before == "--method" or word.startswith("--method=") or is_bare
    ]
    names = list(dict.fromkeys(word for word in words if word in list_methods()))
    names = names or [name for name in [default] if name]
    if len(names) == 1:
        add_option_flags(parser, names[0])


def _unknown_words(parser: _Parser, extra: list[str]) -> ValueError:
    flag = next((word.partition("=")[0] for word in extra if word.startswith("-")), None)
    if flag is None:
        return ValueError(f"unexpected {extra[0]!r}; quote a prompt of several words")
    known = sorted(x for x in parser._option_string_actions if x.startswith("--"))
    return unknown("option", flag, known)


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
