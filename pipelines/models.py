"""Finds the transformers of what a user hands over, whatever they are wrapped in."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vidattn.pipelines.family import family_of, find_family, known_models

WRAPPERS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)


def unwrap(model: object) -> object:
    """The module inside torch.compile, PEFT and parallel wrappers; anything else as it is."""
    while isinstance(model, nn.Module):
        if isinstance(model, WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    return model


def find_transformers(pipe_or_transformer: object) -> dict[str, nn.Module]:
    """The transformers of a pipeline by their component names, or the one given.

    Raises:
        ValueError: there is none that can be patched.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        model = unwrap(pipe_or_transformer)
        family_of(model)
        return {"transformer": model}
    kind, components = type(pipe_or_transformer).__name__, parts_of(pipe_or_transformer)
    if components is None:
        raise ValueError(
            f"cannot patch a {kind}: give a diffusers pipeline or a transformer. "
            f"Known: {', '.join(known_models())}"
        )
    found = transformers_of(components)
    if not found:
        name = next((name for name in components if name.startswith(("transformer", "unet"))), None)
        if name is not None:
            family_of(components[name])
        raise ValueError(
            f"{kind} has no transformer that vidattn knows. Known: {', '.join(known_models())}"
        )
    for part in found.values():
        family_of(part)
    return found


def transformers_of(components: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those among the parts of a pipeline, each once."""
    found = {name: part for name, part in components.items() if find_family(part) is not None}
    # one transformer may stand under two names
    names = {id(part): name for name, part in reversed(found.items())}
    return {name: part for name, part in found.items() if names[id(part)] == name}


def parts_of(pipe: object) -> dict[str, nn.Module] | None:
    """The modules of a pipeline by name, unwrapped; None for what is no pipeline."""
    components = getattr(pipe, "components", None)
    if components is None:
        return None
    parts = {name: unwrap(part) for name, part in components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
