"""Low-rank updates for `vidattn generate --lora`: which model they fit, what comes with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

# key of a safetensors file's metadata under which scripts/train_video.py writes JSON
METADATA = "vidattn"


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates, and how strongly they are added."""

    path: Path
    weight: float = 1.0

    def facts(self) -> dict[str, object]:
        """What scripts/train_video.py wrote into it: component, schedule; empty for other files.

        Raises:
            ValueError: it is no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                return json.loads((file.metadata() or {}).get(METADATA, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"--lora '{self.path}' is no safetensors file: {error}") from error


def parse_lora(text: str) -> Lora:
    """A FILE or FILE:WEIGHT of the command line.

    Raises:
        ValueError: no such file, or a weight that is no number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).is_file():
        name, number = text, "1"
    path = Path(name).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"--lora '{name}' must be a .safetensors file that exists")
    try:
        return Lora(path, float(number))
    except ValueError:
        raise ValueError(
            f"--lora takes FILE or FILE:WEIGHT, the weight a number such as 0.8, got '{text}'"
        ) from None


def load_loras(pipe: object, loras: Iterable[Lora]) -> None:
    """Add low-rank updates to the transformers of a pipeline.

    Raises:
        ValueError: updates that are for another model; the keys that do not fit are named.
    """
    names: dict[str, dict[str, float]] = {}
    for number, lora in enumerate(loras):
        component = str(lora.facts().get("component", "transformer"))
        model = getattr(pipe, component, None)
        if model is None or not hasattr(pipe, "load_lora_weights"):
            raise ValueError(
                f"--lora '{lora.path}' is for the {component} of a pipeline, which this "
                f"{type(pipe).__name__} does not have or cannot add to"
            )
        _require_fit(pipe, lora, component, model)
        name = f"lora_{number}"
        second = {"load_into_transformer_2": True} if component == "transformer_2" else {}
        pipe.load_lora_weights(str(lora.path), adapter_name=name, **second)
        names.setdefault(component, {})[name] = lora.weight
    for component, weights in names.items():
        getattr(pipe, component).set_adapters(list(weights), list(weights.values()))


def _require_fit(pipe: object, lora: Lora, component: str, model: nn.Module) -> None:
    what = f"--lora '{lora.path}'"
    try:
        state = type(pipe).lora_state_dict(str(lora.path))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{what} is in no layout known for {type(pipe).__name__}: {error}"
        ) from None
    state = state[0] if isinstance(state, tuple) else state
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    problems = []
    for key, value in state.items():
        name, _, part = key.removeprefix("transformer.").partition(".lora_")
        layer = layers.get(name, layers.get(f"{name}.base_layer"))
        if layer is None:
            problems.append(f"{key}: no such layer")
        elif part == "A.weight" and value.shape[1] != layer.weight.shape[1]:
            problems.append(
                f"{key}: {value.shape[1]} inputs, the layer has {layer.weight.shape[1]}"
            )
        elif part == "B.weight" and value.shape[0] != layer.weight.shape[0]:
            problems.append(
                f"{key}: {value.shape[0]} outputs, the layer has {layer.weight.shape[0]}"
            )
    if problems or not state:
        shown = "\n  ".join(problems[:6]) or "it holds no updates"
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"{what} is for another model than the {component} here, {type(model).__name__}; "
            f"{len(problems)} of {len(state)} keys do not fit:\n  {shown}{more}"
        )
