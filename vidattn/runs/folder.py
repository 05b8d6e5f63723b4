"""Model folders in the diffusers layout: where they are, and what their card says about sizes.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vidattn.support.config import build
from vidattn.support.resources import resource

BUNDLED = "assets/tiny-t2v"
BUNDLED_CAUSAL = "assets/tiny-t2v-causal"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


@dataclass(frozen=True)
class Card:
    """What a model card says under ``vidattn``, in the YAML at its top.

    Args:
        prompt: one that shows what the model can do.
        defaults: arguments of a call of the pipeline, by their names.
        sizes: (frames, height, width) of the clips that the model was trained for.
    """

    prompt: str | None = None
    defaults: dict = field(default_factory=dict)
    sizes: tuple[tuple[int, int, int], ...] = ()


def read_card(model: str | None) -> Card:
    """The card of a --model; an empty one where there is none, or nothing in it for us.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(find_model(model)) / "README.md"
    if not path.is_file():
        return Card()
    head = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
    try:
        given = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise ValueError(f"the top of '{path}' is no valid YAML: {error}") from error
    given = given.get("vidattn") if isinstance(given, dict) else None
    return build(Card, given or {}, f"vidattn in '{path}'")


def find_model(model: str | None) -> str:
    """The folder or hub id to load from, a folder being checked.

    Raises:
        ValueError: it is neither, or a folder that is broken or holds pickles only.
    """
    if model is None:
        try:
            folder = resource(BUNDLED)
        except FileNotFoundError as error:
            raise ValueError(f"the bundled model is missing: {error}") from error
        return str(check_folder(folder))
    path = Path(model).expanduser()
    if path.suffix.lower() in (*PICKLES, ".safetensors") and not path.is_dir():
        raise ValueError(
            f"--model '{model}' is a single file; give a folder in the diffusers layout, with "
            "model_index.json and safetensors weights" + _no_pickle(path)
        )
    if path.is_dir():
        return str(check_folder(path))
    if path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") != 1:
        raise ValueError(
            f"--model '{model}' is no folder on this machine, and no hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"--model '{model}' is no hub id: they read owner/name")
    return model


def find_causal_model(model: str | None) -> str:
    """The --model of a stream; the bundled causal model where none is given.

    Raises:
        ValueError: none is given, and none is bundled.
    """
    if model is not None:
        return model
    try:
        return str(resource(BUNDLED_CAUSAL))
    except FileNotFoundError:
        raise ValueError(
            "a stream needs a causal model, and none ships with this copy of vidattn: give --model "
            "with a folder that scripts/convert_causal.py made of the weights of Self-Forcing, "
            "CausVid, Causal-Forcing, LongLive or Krea"
        ) from None


def is_bundled(model: str | None) -> bool:
    """Whether a --model is the bundled one, by default or by its folder."""
    if model is None:
        return True
    try:
        return Path(model).expanduser().resolve() == resource(BUNDLED).resolve()
    except FileNotFoundError:
        return False


def _no_pickle(path: Path) -> str:
    if path.suffix.lower() in PICKLES:
        return " (pickle checkpoints can run code when loaded and are refused)"
    return ""


def check_folder(folder: Path) -> Path:
    """A model folder in the diffusers layout with safetensors weights.

    Raises:
        ValueError: what is missing or broken, or pickles without safetensors.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"model folder '{folder}' has no model_index.json; give the folder of a whole "
            "diffusers pipeline, not of one of its parts"
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"'{index}' is no valid JSON ({error}); download it again") from error
    if not isinstance(parts, dict) or "_class_name" not in parts:
        raise ValueError(f"'{index}' names no pipeline class; download it again")
    for name, value in parts.items():
        if not (isinstance(value, list) and len(value) == 2 and value[1] is not None):
            continue
        part = folder / name
        if not part.is_dir():
            raise ValueError(
                f"model folder '{folder}' is incomplete: its model_index.json names '{name}', "
                "which is not there; download it again"
            )
        _refuse_pickles(part)
    return folder


def _refuse_pickles(part: Path) -> None:
    files = [path for path in part.iterdir() if path.is_file()]
    pickles = sorted(path.name for path in files if path.suffix.lower() in PICKLES)
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"'{part}' holds pickle weights only ({pickles[0]}), which can run code when loaded "
            "and are refused; convert them to safetensors, or download a safetensors revision"
        )
