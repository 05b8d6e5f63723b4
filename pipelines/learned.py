"""The parameters that learned methods have in the layers of one transformer.

They stand in the attention layers for as long as the patch is on, so that they are trained, moved
and saved with the model; those that stood there before stay.

Letters: B batch, H heads, S tokens, C channels, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vidattn.grid import Grid
from vidattn.pipelines.family import attentions, family_of, num_heads
from vidattn.pipelines.heads import context_parallel
from vidattn.pipelines.sequence import Call
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.learned import LearnedMethod, Seen
from vidattn.schedule import Schedule


class Learned:
    """What stands in the layers of a transformer.

    Args:
        name: of the transformer in its pipeline.

    Raises:
        ValueError: a layer that does not say how wide it is, a rule that has a learned method for
            some heads of a layer, or processes that share the model.
    """

    def __init__(self, name: str, model: nn.Module, schedule: Schedule):
        # by (number of a layer, name of its parameters)
        self.modules: dict[tuple[int, str], nn.Module] = {}
        self._paths: dict[tuple[int, str], str] = {}
        self._ours: list[tuple[nn.Module, str]] = []
        layers = attentions(family_of(model), model)
        for index in range(schedule.guard.num_layers(len(layers)), len(layers)):
            path, module = layers[index]
            for method in _methods(schedule, name, index):
                key = index, method.parameters
                if key in self.modules:
                    continue
                if context_parallel(module.processor, model) is not None:
                    raise ValueError(SPREAD.format(method.parameters))
                if not hasattr(module, method.parameters):
                    module.add_module(method.parameters, _make(method, path, module, model))
                    self._ours.append((module, method.parameters))
                self.modules[key] = getattr(module, method.parameters)
                self._paths[key] = f"{path}.{method.parameters}"

    def remove(self) -> None:
        """Take out of the model what was put in."""
        for module, name in self._ours:
            module._modules.pop(name, None)
        self._ours = []

    def state(self) -> dict[str, Tensor]:
        """The parameters by their names in the model."""
        return {
            f"{self._paths[key]}.{name}": value
            for key, module in self.modules.items()
            for name, value in module.state_dict().items()
        }

    def load(self, state: Mapping[str, Tensor], keys: Iterable[str]) -> None:
        """Take parameters over from some keys of a state, with the rest of a model or without.

        Beside the names of ``state`` those of other libraries are understood: what counts is the
        block, and the name of the parameters. A bias that is not there is zero.

        Raises:
            ValueError: parameters of a layer that are not there, of another shape, or of a layer
                that stays dense.
        """
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        left = set(_ending(keys, {name for _, name in self.modules}))
        for key, path in self._paths.items():
            names = _names(path, left)
            left -= set(names.values())
            found[key] = {part: state[name] for part, name in names.items()}
            _check(path, self.modules[key], found[key])
        if left:
            raise ValueError(
                f"{sorted(left)[0]} is of a layer that has no such parameters here: patch with "
                "dense_layers=0, so that every layer has them"
            )
        with torch.no_grad():
            for key, module in self.modules.items():
                for name, parameter in module.named_parameters():
                    value = found[key].get(name)
                    parameter.zero_() if value is None else parameter.copy_(value)

    def add(
        self,
        out: Tensor,
        method: LearnedMethod,
        layer: int,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AnyPlan,
        call: Call,
    ) -> Tensor:
        """The (B, H, S, D) output of a call in the order of the grid, with what is learned.

        Raises:
            ValueError: hidden states that are not those of the video, or tokens that are hidden.
        """
        grid, device = call.grid, q.device
        start, stop = grid.video_start, grid.video_start + grid.num_video_tokens
        if hidden.shape[1] == q.shape[2]:
            hidden = call.to_grid(hidden[:, None])[:, 0, start:stop]
        if hidden.shape[1] != grid.num_video_tokens:
            raise ValueError(
                f"its {hidden.shape[1]} hidden states are not those of the "
                f"{grid.num_video_tokens} tokens of the video, which {method.parameters} needs"
            )
        if call.keys is not None and not bool(call.keys[:, start:stop].all()):
            raise ValueError(f"it hides tokens of the video, which {method.parameters} would see")
        module = self.modules[layer, method.parameters]
        weight = next(module.parameters())
        if weight.device != device:
            module.to(device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        with torch.autocast(device.type, enabled=False):
            q, k, v = (x[:, :, start:stop].to(dtype) for x in (q, k, v))
            scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
            layout = method.layout(Grid(*grid.size), device)
            assert isinstance(plan, Plan), "all heads of all samples share the layout"
            seen = Seen(hidden.to(dtype), q, k, v, scale, layout, plan)
            more = method.beside(_In(module, weight.dtype, dtype), seen).to(out.dtype)
        return torch.cat([out[:, :, :start], out[:, :, start:stop] + more, out[:, :, stop:]], 2)


class _In:
    """A module that is run in its own dtype, and gives another."""

    def __init__(self, module: nn.Module, own: torch.dtype, other: torch.dtype):
        self._module, self._own, self._other = module, own, other

    def __call__(self, x: Tensor) -> Tensor:
        return self._module(x.to(self._own)).to(self._other)


SPREAD = "{} is not spread over processes: run a learned method in one process"


def _methods(schedule: Schedule, name: str, layer: int) -> Iterable[LearnedMethod]:
    """The learned methods that serve a layer at some step.

    Raises:
        ValueError: one that serves some of its heads.
    """
    for rule in schedule.rules:
        here = rule.transformer in (None, name) and (rule.layers is None or layer in rule.layers)
        if not here:
            continue
        if isinstance(rule.method, LearnedMethod):
            if rule.heads is not None:
                raise ValueError(
                    f"{type(rule.method).__name__} is for all heads of a layer, got a rule for "
                    f"heads {list(rule.heads)}: leave heads out of it"
                )
            yield rule.method
        if rule.heads is None and rule.steps is None:
            return


def _make(method: LearnedMethod, path: str, module: nn.Module, model: nn.Module) -> nn.Module:
    linear: Any = getattr(module, "to_q", None)
    heads = num_heads(module)
    if not hasattr(linear, "in_features") or heads is None:
        raise ValueError(
            f"{path} of {type(model).__name__} has no to_q that says how wide it is, and "
            f"{type(method).__name__} adds parameters beside it"
        )
    made = method.make(linear.in_features, heads, linear.out_features // heads)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return made.to(device=next(linear.parameters()).device, dtype=dtype)


def _ending(state: Iterable[str], names: set[str]) -> Iterable[str]:
    """The keys that are of parameters of some names."""
    return (key for key in state if {*key.split(".")[:-1]} & names)


def _names(path: str, keys: set[str]) -> dict[str, str]:
    """The keys of one layer, by the part of its parameters that they are."""
    whole, _, name = path.rpartition(".")
    block = whole.rpartition(".")[0]
    found: dict[str, str] = {}
    for place in (re.escape(whole), rf"{re.escape(block)}(?:\.\w+)*?"):
        form = re.compile(rf"(?:.*\.)?{place}\.{name}\.(\w+)")
        for key in sorted(keys):
            if (match := form.fullmatch(key)) is not None:
                found.setdefault(match[1], key)
    return found


def _check(path: str, module: nn.Module, found: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        value = found.get(name)
        if value is None and name != "bias":
            raise ValueError(
                f"{path}.{name} is not among what is loaded: is it from another model, or from "
                "one without such parameters?"
            )
        if value is not None and value.shape != parameter.shape:
            raise ValueError(
                f"{path}.{name} is {tuple(value.shape)} in what is loaded, and the layer needs "
                f"{tuple(parameter.shape)}: it is from another model"
            )


def read_state(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or of all in a folder, each read when it is asked for.

    Raises:
        ValueError: no such file, or none in the folder.
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"'{path}' must be a .safetensors file, or a folder with some")
    return _Files(files)


class _Files(Mapping[str, Tensor]):
    """Tensors of safetensors files by their names."""

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                self._places |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self._places[key], "pt") as opened:
            return opened.get_tensor(key)

    def __iter__(self):
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def keys_of(state: Iterable[str], name: str, names: Iterable[str]) -> set[str]:
    """The keys of a state that are for one of some transformers; all where nothing says so.

    Raises:
        ValueError: nothing says it, and there are several.
    """
    names = list(names)
    prefixes = {key.partition(".")[0] for key in state} & set(names)
    if not prefixes:
        if len(names) > 1:
            raise ValueError(
                f"nothing says which of {', '.join(names)} the parameters are for: begin their "
                "names with it and a dot"
            )
        return set(state)
    return {key for key in state if key.startswith(f"{name}.")}
