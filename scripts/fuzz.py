"""Try the package with random cases against an oracle of its own: python scripts/fuzz.py.

A case draws a grid, a method with options, tensors, an engine and the state of the process. Plans
are compared with the definitions of their methods, attention with float64 from an explicit mask,
gradients too; bad values have to be refused. Each failure is shrunk, and printed with the command
that replays it. The same seed and number make the same case on any machine.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

ENGINES = ("auto", "cpp", "torch", "reference")


def main() -> None:
    """Try cases until the time or their number is up; exit 1 where any was wrong."""
    args = _arguments()
    if "triton" in args.engines:
        # before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    from fuzzing.report import write
    from fuzzing.run import Run, replay

    torch.set_num_threads(1)
    if args.case is not None:
        complaint = replay(args.case, args.seed, args.engines)
        print(complaint or "right")
        sys.exit(complaint is not None)
    run = Run(args.seed, args.only, args.engines)
    seconds = 60.0 if args.cases is None and args.seconds is None else args.seconds
    run.go(cases=args.cases, seconds=seconds)
    print(run.tally)
    if args.report is not None:
        write(args.report, run.tally, _command(args))
    sys.exit(bool(run.failures))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, help="stop after so long; 60 by default")
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other cases")
    parser.add_argument("--case", help="replay one: its number, or its description in JSON")
    parser.add_argument("--only", type=_names, default=(), help="kinds or methods, with commas")
    parser.add_argument(
        "--engines", type=_names, default=ENGINES,
        help='with commas; "flex" compiles for seconds, "triton" runs in its interpreter',
    )  # fmt: skip
    parser.add_argument("--report", type=Path, help="a page of Markdown that the figures go into")
    return parser.parse_args()


def _command(args: argparse.Namespace) -> str:
    """What makes the same cases again."""
    words = ["python scripts/fuzz.py", f"--seed {args.seed}"]
    words += [f"--cases {args.cases}"] if args.cases is not None else []
    words += [f"--only {','.join(args.only)}"] if args.only else []
    words += [f"--engines {','.join(args.engines)}"] if args.engines != ENGINES else []
    return " ".join(words)


if __name__ == "__main__":
    main()
