"""Tensors of released files under the names that they have here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor, nn

# (pattern, replacement), each applied to a whole name in this order; "{next}" in a replacement is
# one more than the first group of its pattern
Rules = Sequence[tuple[str, str]]


def rename(rules: Rules) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """A filter, as timm takes it, of released state dicts; one in the model's own layout stays."""

    def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """A state dict of ``model`` from one of the authors, or in its own layout."""
        return {new_name(name, rules): x for name, x in tensors_of(state_dict).items()}

    return checkpoint_filter_fn


def tensors_of(file: dict) -> dict[str, Tensor]:
    """The state dict in a file, which may hold more than that."""
    for key in ("model", "state_dict"):
        if key in file:
            return file[key]
    return file


def new_name(name: str, rules: Rules) -> str:
    """The name that a tensor has here."""
    for pattern, replacement in rules:
        if "{next}" in replacement and (found := re.match(pattern, name)):
            # the layer between two stages belonged to the first of them
            replacement = replacement.format(next=int(found[1]) + 1)
        name = re.sub(pattern, replacement, name)
    return name
