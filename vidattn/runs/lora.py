"""Low-rank updates for `vidattn generate --lora`: which model they fit, what comes with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# key of a safetensors file's metadata under which scripts/train_video.py writes JSON
METADATA = "vidattn"


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates, and how strongly they are added.

    Args:
        component: of the pipeline that they are for.
        schedule: of the attention they were trained with, as its file reads; None where the file
            does not say.
        learned: the file with the parameters of learned methods that were trained with them.
    """

    path: Path
    weight: float = 1.0
    component: str = "transformer"
    schedule: str | None = None
    learned: Path | None = None


@dataclass(frozen=True)
class LoraChoice:
    """The attention that low-rank updates were trained with."""

    lora: Lora

    @property
    def label(self) -> str:
        """What progress bars and reports say."""
        return f"schedule of {self.lora.path.name}"

    @property
    def parameters(self) -> Path | None:
        """Of its learned methods."""
        return self.lora.learned

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        from vidattn.schedule_file import load_schedule

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "schedule.yaml"
            path.write_text(self.lora.schedule, encoding="utf-8")
            return {"schedule": replace(load_schedule(path), name=self.label)}


def parse_lora(text: str) -> Lora:
    """A FILE or FILE:WEIGHT of the command line, with what the file says about itself.

    Raises:
        ValueError: no such file, no safetensors file, or a weight that is no number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).is_file():
        name, number = text, "1"
    path = Path(name).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"--lora '{name}' must be a .safetensors file that exists")
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(
            f"--lora takes FILE or FILE:WEIGHT, the weight a number such as 0.8, got '{text}'"
        ) from None
    facts = _facts(path)
    learned = path.with_name(facts["learned"]) if "learned" in facts else None
    if learned is not None and not learned.is_file():
        raise ValueError(
            f"--lora '{path}' was trained with '{learned.name}', which is not beside it: copy it "
            "from the folder of the run"
        )
    component, schedule = facts.get("component", "transformer"), facts.get("schedule")
    return Lora(path, weight, component, schedule, learned)


def _facts(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"--lora '{path}' is no safetensors file: {error}") from error


def trained_attention(loras: Iterable[Lora]) -> LoraChoice | None:
    """The attention of the first updates that say what they were trained with."""
    return next((LoraChoice(lora) for lora in loras if lora.schedule), None)


def check_loras(pipe: object, loras: Iterable[Lora]) -> None:
    """Compare low-rank updates with the transformers of a pipeline, or of its skeleton.

    Raises:
        ValueError: updates that are for another model; the keys that do not fit are named.
    """
    for lora in loras:
        model = getattr(pipe, lora.component, None)
        if model is None or not hasattr(pipe, "load_lora_weights"):
            raise ValueError(
                f"--lora '{lora.path}' is for the {lora.component} of a pipeline, which this "
                f"{type(pipe).__name__} does not have or cannot add to"
            )
        _require_fit(pipe, lora, model)


def load_loras(pipe: object, loras: Iterable[Lora]) -> None:
    """Add low-rank updates to the transformers of a pipeline.

    Raises:
        ValueError: updates that are for another model; the keys that do not fit are named.
    """
    loras = list(loras)
    check_loras(pipe, loras)
    weights: dict[str, dict[str, float]] = {}
    for number, lora in enumerate(loras):
        name = f"lora_{number}"
        second = {"load_into_transformer_2": True} if lora.component == "transformer_2" else {}
        pipe.load_lora_weights(str(lora.path), adapter_name=name, **second)
        weights.setdefault(lora.component, {})[name] = lora.weight
    for component, own in weights.items():
        getattr(pipe, component).set_adapters(list(own), list(own.values()))


def _require_fit(pipe: object, lora: Lora, model: object) -> None:
    try:
        state = type(pipe).lora_state_dict(str(lora.path))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"--lora '{lora.path}' has no layout that {type(pipe).__name__} reads: {error}"
        ) from error
    state = state[0] if isinstance(state, tuple) else state
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    problems = []
    for key, value in state.items():
        name, _, part = key.removeprefix("transformer.").partition(".lora_")
        layer = layers.get(name, layers.get(f"{name}.base_layer"))
        if layer is None:
            problems.append(f"{key}: no such layer")
            continue
        outputs, inputs = layer.weight.shape[:2]
        if part == "A.weight" and value.shape[1] != inputs:
            problems.append(f"{key}: {value.shape[1]} inputs, the layer has {inputs}")
        if part == "B.weight" and value.shape[0] != outputs:
            problems.append(f"{key}: {value.shape[0]} outputs, the layer has {outputs}")
    if problems or not state:
        shown = "\n  ".join(problems[:6]) or "it holds no updates"
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"--lora '{lora.path}' is for another model than the {lora.component} here, "
            f"{type(model).__name__}; {len(problems)} of {len(state)} keys do not fit:\n"
            f"  {shown}{more}"
        )
