"""Runs a program that knows the models of this package: python -m vidattn.backbones train.py ..."""

import runpy
import sys
from pathlib import Path

USAGE = """usage: python -m vidattn.backbones PROGRAM [ARGUMENT ...]

Runs a Python program to which timm's models are known and those of vidattn too, such as train.py
and validate.py of timm's repository, https://github.com/huggingface/pytorch-image-models."""


def main() -> str | None:
    """Run what the command line names; returns what is wrong with it."""
    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return None if given else "no program is named"
    if not Path(given[0]).is_file():
        return f"no program '{given[0]}' here; timm's are in its repository, not in its package"
    # as if it had been started itself
    sys.argv = given
    sys.path.insert(0, str(Path(given[0]).resolve().parent))
    runpy.run_path(given[0], run_name="__main__")
    return None


if __name__ == "__main__":
    sys.exit(main())
