"""Models by name, weights that fit them, and the ways to tune them."""

import argparse
import difflib
import json
import pickle
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from backbone_training.probe import Probed
from backbone_training.settings import Input, Model, Tune
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vidattn.backbones  # noqa: F401  (its models register themselves)
from vidattn.runs.output import write_atomically
from vidattn.support.config import build

METADATA = "vidattn_backbone"
# under which published checkpoints keep their weights, the better ones first
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Description:
    """What it takes to build the model of a weights file, and to feed it.

    Args:
        queries: of the probe that reads the backbone; None for the model's own head.
    """

    name: str
    classes: tuple[str, ...]
    input: Input
    options: dict = field(default_factory=dict)
    queries: int | None = None


def create_model(
    name: str,
    num_classes: int | None,
    channels: int | None,
    options: dict,
    pretrained: bool = False,
    size: int | None = None,
) -> nn.Module:
    """A model of timm's or vidattn's.

    Args:
        num_classes, channels: None for those that the model is released with.
        size: pixels a side of its images, for a model that is made for one size; None for that
            which it is released with. An ``img_size`` among the options comes first.

    Raises:
        ValueError: no such model, one that takes other options, or weights that cannot be fetched.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        raise ValueError(
            f"unknown model '{name}'; near are {', '.join(near) or 'none'}. "
            f"timm.list_models('*{name.split('_')[0]}*') lists more"
        )
    if size and timm.get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size:
        options = {"img_size": size} | options
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **options
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model '{name}' does not take options {options}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the released weights of '{name}' cannot be fetched ({error}); "
            "give a file of weights instead"
        ) from error


@torch.no_grad()
def check_input(model: nn.Module, name: str, form: Input) -> None:
    """Raise a ValueError unless a model takes images of this form."""
    image = torch.zeros(1, form.channels, form.size, form.size)
    was_training = model.training
    try:
        model.eval()(image)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"model '{name}' does not take images of {form.channels} x {form.size} x {form.size}: "
            f"{reason.splitlines()[0]}. Set input.size to what it takes, or its model.options to "
            "these images; models of videos and scans take no images"
        ) from error
    model.train(was_training)


def describe(file: Path) -> Description | None:
    """What a weights file of ours says about its model; None for another file."""
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA)
    except SafetensorError as error:
        raise ValueError(f"'{file}' is no safetensors file: {error}") from error
    return build(Description, json.loads(text), f"the metadata of '{file}'") if text else None


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a weights file; of a pickle only what torch's weights-only loader takes.

    A ``Namespace`` may stand beside them, as the arguments of a run do in the checkpoints of timm.

    Raises:
        ValueError: no such file, a broken one, one that would run code, or one without tensors.
    """
    if not file.is_file():
        raise ValueError(f"no weights file '{file}'")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{file}' holds more than tensors, and a pickle can run code, so it is not loaded; "
            f"save its state dict alone, best as .safetensors. torch says: {error}"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"'{file}' holds no dictionary of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of the parameters of a model's last layer."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{n}." for n in ([names] if isinstance(names, str) else names))


def load_weights(model: nn.Module, file: Path, *, new_head: bool) -> list[str]:
    """Fill a model from a file, in its own layout or one that the model's module converts.

    Args:
        new_head: whether a last layer for other classes is left as it was drawn.

    Returns:
        The parameters that were left.

    Raises:
        ValueError: keys that are missing, unexpected or of another shape; they are listed.
    """
    state, wanted = read_weights(file), model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and state.keys() != wanted.keys():
        try:
            state = convert(state, model)
        except (AssertionError, KeyError, RuntimeError, ValueError):
            # a layout that is not the authors' either; the keys are listed below
            pass
    prefixes = classifier_prefixes(model)
    shapes = {key: tuple(value.shape) for key, value in wanted.items()}
    head = [key for key in wanted if prefixes and key.startswith(prefixes)]
    left = []
    if new_head and any(k not in state or tuple(state[k].shape) != shapes[k] for k in head):
        left = head
        state = {k: v for k, v in state.items() if not k.startswith(prefixes)}
        wanted = {k: v for k, v in wanted.items() if k not in left}
    problems = {
        "missing": [k for k in wanted if k not in state],
        "unexpected": [k for k in state if k not in wanted],
        "of another shape": [
            f"{k} {tuple(state[k].shape)}, needed {shapes[k]}"
            for k in wanted
            if k in state and tuple(state[k].shape) != shapes[k]
        ],
    }
    if any(problems.values()):
        lines = [f"  {len(v)} {k}: {_some(v)}" for k, v in problems.items() if v]
        raise ValueError(f"'{file}' holds the weights of another model:\n" + "\n".join(lines))
    model.load_state_dict(state, strict=not left)
    return left


def _some(names: list[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def prepare_tuning(model: nn.Module, tune: Tune, num_classes: int) -> nn.Module:
    """The model with only those weights trainable that a method moves."""
    if tune.method == "probe":
        return Probed(model, num_classes, tune.queries)
    if tune.method == "linear":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if tune.method == "lora":
        heads = [prefix.removesuffix(".") for prefix in classifier_prefixes(model)]
        config = LoraConfig(
            r=tune.rank,
            lora_alpha=tune.alpha,
            lora_dropout=tune.dropout,
            target_modules=list(tune.targets),
            modules_to_save=heads,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"tune.targets {list(tune.targets)}: {error}") from error
    return model


def set_training(model: nn.Module, method: str) -> None:
    """Put a model in training mode, and what is frozen in the mode of a test."""
    model.train()
    for module in model.modules():
        is_frozen = not any(p.requires_grad for p in module.parameters())
        if method in ("linear", "probe") and is_frozen:
            module.eval()
        # with low-rank updates, statistics of batches would change weights that are frozen
        if method == "lora" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def build_start(model: Model, tune: Tune, num_classes: int, form: Input) -> nn.Module:
    """The model that training begins with."""
    made = create_model(
        model.name, num_classes, form.channels, model.options, model.pretrained, form.size
    )
    check_input(made, model.name, form)
    if model.weights:
        left = load_weights(made, Path(model.weights), new_head=True)
        if left:
            print(f"{model.weights}: a head for other classes; {', '.join(left)} start anew")
    if model.checkpointing:
        made.set_grad_checkpointing(True)
    return prepare_tuning(made, tune, num_classes)


def build_described(description: Description) -> nn.Module:
    """The model of a weights file, without its weights."""
    count = len(description.classes)
    form = description.input
    model = create_model(
        description.name, count, form.channels, description.options, size=form.size
    )
    return Probed(model, count, description.queries) if description.queries else model


def merge(state: dict[str, Tensor], description: Description, tune: Tune) -> dict[str, Tensor]:
    """The state of a model with low-rank updates as that of the plain model."""
    model = prepare_tuning(build_described(description), tune, len(description.classes))
    model.load_state_dict(state)
    return model.merge_and_unload().state_dict()


def save_weights(file: Path, state: dict[str, Tensor], description: Description) -> None:
    """Write weights with what it takes to build their model, whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with write_atomically(file) as partial:
        save_file(tensors, partial, metadata={METADATA: json.dumps(asdict(description))})
