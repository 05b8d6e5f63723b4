"""What differs between the diffusers families: where the tokens of the video are.

A family is one file in families/ with a ``FAMILY``, or several of them in a tuple; nothing else
has to know about it. A picture is a video of one frame.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

import vidattn.pipelines.families
from vidattn.grid import Size
from vidattn.schedule import Model
from vidattn.support.registry import unknown

Arguments = Mapping[str, Any]

# what wrappers of modules call the module inside
WRAPPED = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class Place(NamedTuple):
    """Where the video stands in the sequence of one forward pass.

    ``num_before`` tokens stand in front of it, or -1 for all those beside it that the family puts
    there.
    """

    size: Size
    num_before: int = -1


@dataclass(frozen=True)
class Family:
    """Transformers that lay out their tokens in the same way.

    Args:
        models: names of the diffusers classes.
        layers: pattern that the names of the self-attentions over the video match in full.
        axes: those of the latents, such as "BCTHW", or "BCHW" for one frame.
        beside: where the tokens stand that share the sequence with the video (text, conditions).
        locate: for models that the axes do not describe: takes the transformer and the arguments
            of its forward by name.
        prefix: text in front of the sequence attends to itself alone, causally, in a call of its
            own; the video reads its keys, which stand before its own.
        latents, times: names of the arguments with the latents, a tensor or a list of them, and
            with the time step.
        halves: layers see the video at the size of the pass, at half of it, and so on.
        joins: some blocks join text to the video before their attention, which is not told.
        chunk: for models whose frames wait for each other: how many frames, from the first on, make
            a chunk of a transformer, where each reads its own and those before; None where none do.
        paired_mask: the mask of (B, 1, S, S) is that of the keys, paired with itself.
        may_skip: an attention may run without computing scores, as perturbed guidance does.
        pixels: what height and width of the frames are multiples of, whatever else they must be.
        refuse: why the models cannot be patched, or a function that says so for a model, if at all.
    """

    models: tuple[str, ...]
    layers: str = r"transformer_blocks\.\d+\.attn1"
    axes: str = "BCTHW"
    beside: Literal["nothing", "before", "after"] = "nothing"
    locate: Callable[[nn.Module, Arguments], Place] | None = None
    prefix: bool = False
    latents: str = "hidden_states"
    times: str = "timestep"
    halves: bool = False
    joins: bool = False
    chunk: Callable[[nn.Module], int | None] | None = None
    paired_mask: bool = False
    may_skip: bool = False
    pixels: int = 1
    refuse: str | Callable[[nn.Module], str | None] | None = None

    def place(self, model: nn.Module, arguments: Arguments) -> Place:
        """Where the video stands in the forward pass with these arguments."""
        if self.locate is not None:
            return self.locate(model, arguments)
        return Place(patched_size(model, arguments[self.latents], self.axes))


def patched_size(model: nn.Module, latents: Tensor, axes: str = "BCTHW") -> Size:
    """(t, h, w) of the latents in patches, as the patch embedding of the transformer cuts them."""
    patch = model.config.get("patch_size") or 1
    if isinstance(patch, int):
        patch = (model.config.get("patch_size_t") or 1, patch, patch)
    # latents and patches of one frame may be without the axis of time
    extent = [latents.shape[axes.index(axis)] if axis in axes else 1 for axis in "THW"]
    t, h, w = (length // edge for length, edge in zip(extent, (1, *patch)[-3:]))
    return t, h, w


def attentions(family: Family, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The self-attentions over the video of a model, with their names, whatever wraps blocks."""
    named = ((WRAPPED.sub("", path), module) for path, module in model.named_modules())
    return [
        (path, module)
        for path, module in named
        if re.fullmatch(family.layers, path) and hasattr(module, "processor")
    ]


def num_heads(module: nn.Module) -> int | None:
    """Heads of an attention layer, where it says how many."""
    return getattr(module, "heads", getattr(module, "num_attention_heads", None))


def shape_of(model: nn.Module) -> Model:
    """What schedules compare with what they were made for."""
    modules = attentions(family_of(model), model)
    heads = {num_heads(module) for _, module in modules}
    return Model(type(model).__name__, len(modules), heads.pop() if len(heads) == 1 else None)


@cache
def families() -> tuple[Family, ...]:
    """Every family: what each file in families/ calls ``FAMILY``."""
    found: list[Family] = []
    for entry in pkgutil.iter_modules(list(vidattn.pipelines.families.__path__)):
        module = importlib.import_module(f"vidattn.pipelines.families.{entry.name}")
        family = getattr(module, "FAMILY", ())
        found += (family,) if isinstance(family, Family) else family
    return tuple(found)


def find_family(model: nn.Module) -> Family | None:
    """The family of a model or of a class it derives from, None for a stranger."""
    by_name = {name: family for family in families() for name in family.models}
    bases = (cls.__name__ for cls in type(model).__mro__)
    return next((by_name[name] for name in bases if name in by_name), None)


def refusal(family: Family, model: nn.Module) -> str | None:
    """Why a model of a family cannot be patched, None if it can."""
    return family.refuse(model) if callable(family.refuse) else family.refuse


def known_models() -> list[str]:
    """Names of the transformer classes that can be patched."""
    return sorted(
        name
        for family in families()
        if not isinstance(family.refuse, str)
        for name in family.models
    )


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ValueError: the model is unknown, or known not to work; what is known is listed.
    """
    family, name = find_family(model), type(model).__name__
    if family is None:
        raise unknown("transformer", name, known_models())
    if reason := refusal(family, model):
        raise ValueError(f"{name} cannot be patched: {reason}")
    return family
