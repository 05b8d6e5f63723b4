"""Test a backbone: python scripts/validate_backbone.py runs/nat/best.safetensors --data images.npz.

A file that scripts/train_backbone.py wrote says itself what it holds. Weights from elsewhere need
--model, and --options where the model was not made by its name alone; they tell as many classes
apart as the images have. Without a file, --model takes its released weights.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from accelerate import Accelerator
from backbone_training.data import Images, make_loader, ordered_batches
from backbone_training.model import (
    build_described,
    check_input,
    create_model,
    describe,
    load_weights,
)
from backbone_training.scores import Scores, score
from backbone_training.settings import Input
from backbone_training.sources import Source, open_source, require_same_classes
from timm.data import resolve_model_data_config
from torch import nn

from vidattn.runs.output import writable_file, write_json


def input_of(model: nn.Module) -> Input:
    """The form of an image that timm notes for a model."""
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if height != width:
        raise ValueError(
            f"the model takes images of {height} x {width}; only squares are supported"
        )
    return Input(
        size=height,
        channels=channels,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop=config["crop_pct"],
    )


def read_options(text: str | None) -> dict:
    """The keyword arguments in the text of --options."""
    try:
        options = yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--options takes a mapping such as '{{img_size: 64}}', got '{text}'")
    return options


def build_model(
    weights: Path | None, name: str | None, source: Source, options: dict, size: int | None
) -> tuple[nn.Module, Input]:
    """The model to test, with the form of its images.

    Args:
        options: keyword arguments of a model whose file does not say them.
        size: pixels a side, None for those of the model.
    """
    found = describe(weights) if weights else None
    if found:
        if name and name != found.name:
            raise ValueError(f"'{weights}' holds '{found.name}', --model is '{name}'")
        if options:
            raise ValueError(f"'{weights}' says itself how its model is made: leave out --options")
        require_same_classes(source, found.classes, f"'{weights}'")
        name, model, form = found.name, build_described(found), found.input
    elif name:
        count = len(source.classes) if weights else None
        model = create_model(name, count, None, options, pretrained=weights is None, size=size)
        if model.num_classes != len(source.classes):
            raise ValueError(
                f"'{name}' tells {model.num_classes} classes apart, "
                f"the images have {len(source.classes)}"
            )
        form = input_of(model)
    else:
        raise ValueError(f"'{weights}' does not say which model it holds; name it with --model")
    if weights:
        load_weights(model, weights, new_head=False)
    form = replace(form, size=size or form.size)
    check_input(model, name, form)
    return model, form


def validate(arguments: argparse.Namespace) -> Scores:
    """Scores of what the command line names."""
    source = open_source(arguments.data, arguments.split)
    options = read_options(arguments.options)
    model, form = build_model(arguments.weights, arguments.model, source, options, arguments.size)
    accelerator = Accelerator(mixed_precision=arguments.precision)
    place = (accelerator.process_index, accelerator.num_processes)
    images = Images(source, form, strict=arguments.strict)
    batches = ordered_batches(len(images), arguments.batch_size, place)
    loader = make_loader(images, batches, arguments.workers)
    found = score(accelerator.prepare(model), loader, accelerator)
    accelerator.print(found)
    if arguments.json and accelerator.is_main_process:
        write_json(arguments.json, asdict(found))
    return found


def main() -> None:
    """Parse the command line and test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="?", help=".safetensors, or a file torch loads")
    parser.add_argument("--model", help="name, where the file does not say it")
    parser.add_argument("--options", help="YAML of its keyword arguments: '{img_size: 64}'")
    parser.add_argument("--data", required=True, help=".npz file, folder or hf:NAME")
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, help="pixels a side, if not those of the model")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--strict", action="store_true", help="end at an image that cannot be read")
    parser.add_argument("--json", type=Path, help="file for the scores")
    arguments = parser.parse_args()
    try:
        if arguments.json:
            writable_file(arguments.json, (".json",), "--json")
        validate(arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
