"""Counts the operators that would wait for a GPU, on tensors of a CPU."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# their result, or its shape, is a number that the host needs
WAITING = {
    "aten._local_scalar_dense",
    "aten.bincount",
    "aten.equal",
    "aten.masked_select",
    "aten.nonzero",
    "aten.unique_consecutive",
    "aten.unique_dim",
    "aten._unique2",
}


class Waits(TorchDispatchMode):
    """What would have waited while this mode was on, by name; copies to another device as well."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    @property
    def count(self) -> int:
        return self.found.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        if (
            name in WAITING
            or _is_unsized_repeat(name, func, kwargs)
            or _is_move(name, args, kwargs)
        ):
            self.found[name] += 1
        if name.startswith(("aten.index", "aten._index_put")) and isinstance(
            args[1], (list, tuple)
        ):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            self.found[name] += len(masks)
        return func(*args, **kwargs)


def _is_unsized_repeat(name, func, kwargs) -> bool:
    """The host counts the repeats, unless it is told how many there are."""
    return (
        name == "aten.repeat_interleave"
        and func._overloadname == "Tensor"
        and kwargs.get("output_size") is None
    )


def _is_move(name, args, kwargs) -> bool:
    target = kwargs.get("device")
    return name == "aten._to_copy" and target is not None and args[0].device != torch.device(target)
