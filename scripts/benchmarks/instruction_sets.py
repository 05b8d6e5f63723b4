"""Which instruction set the C++ engine runs on while it is measured."""

import argparse

import torch

from vidattn.kernels.cpp import processor


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """A flag for ``limit_to``."""
    parser.add_argument(
        "--set", choices=processor.instruction_sets(),
        default=processor.instruction_sets()[0],
        help="best instruction set of the cpp engine; by default that of this processor",
    )  # fmt: skip


def sets_in_use() -> str:
    """The set of each dtype, in words."""
    return ", ".join(
        f"{processor.instruction_set(getattr(torch, name))} for {name}"
        for name in ("float32", "bfloat16")
    )


def limit_to(name: str) -> dict[str, str]:
    """Let the engine use no better set than one; the set of each dtype."""
    all_sets = processor.instruction_sets()
    fewer = all_sets[all_sets.index(name) :]
    processor.instruction_sets = lambda: fewer
    processor.instruction_set.cache_clear()
    dtypes = (torch.float32, torch.bfloat16)
    return {str(x).removeprefix("torch."): processor.instruction_set(x) for x in dtypes}
