"""Pipelines without weights, and the grids that are known before anything is loaded."""

import inspect

import diffusers
import pytest
import torch

from vidattn.runs.folder import find_model
from vidattn.runs.model import pipeline_config
from vidattn.runs.request import Request, resolve
from vidattn.runs.skeleton import skeleton, video_grid
from vidattn.simulation.video_models import find_video_model

MODELS = {
    "wan2.1-14b": ("Wan", "Wan", "Wan"),
    "cogvideox-5b": ("CogVideoX", "CogVideoX", "CogVideoX"),
    "hunyuanvideo": ("HunyuanVideo", "HunyuanVideo", "HunyuanVideo"),
    "hunyuanvideo-1.5": ("HunyuanVideo15", "HunyuanVideo15", "HunyuanVideo15"),
    "ltx-video": ("LTX", "LTXVideo", "LTXVideo"),
    "mochi-1": ("Mochi", "Mochi", "Mochi"),
}


def pipeline(name: str, transformer: str, vae: str, **parts: object) -> object:
    """A pipeline of stock classes in their default sizes, with nothing in them."""
    cls = getattr(diffusers, f"{name}Pipeline")
    with torch.device("meta"):
        parts["transformer"] = getattr(diffusers, f"{transformer}Transformer3DModel")(num_layers=1)
        parts["vae"] = getattr(diffusers, f"AutoencoderKL{vae}")()
    needed = [
        key
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if key != "self" and parameter.default is inspect.Parameter.empty
    ]
    return cls(**dict.fromkeys(needed) | parts)


@pytest.mark.parametrize("name", MODELS)
def test_the_grid_of_a_known_model_is_found_without_running_it(name):
    model = find_video_model(name)
    sizes = dict(zip(("num_frames", "height", "width"), model.size))
    grid = video_grid(pipeline(*MODELS[name]), Request("a", **sizes))
    assert grid.size == model.grid(*model.size).size


def test_the_bundled_model_is_known_without_its_weights():
    where = find_model(None)
    pipe = skeleton(where, pipeline_config(where))
    assert {x.device.type for x in pipe.transformer.parameters()} == {"meta"}
    request = resolve(pipe, Request("a", num_frames=33, height=128, width=128))
    assert request.num_inference_steps is not None
    assert video_grid(pipe, request).size == (9, 16, 16)


def test_what_is_not_known_is_no_grid():
    pipe = pipeline(*MODELS["wan2.1-14b"])
    assert video_grid(pipe, Request("a", num_frames=33, height=128)) is None
    assert video_grid(pipe, Request("a", num_frames=34, height=128, width=128)) is None
    # it makes a long video window by window
    forcing = pipeline("SkyReelsV2DiffusionForcing", "SkyReelsV2", "Wan")
    assert video_grid(forcing, Request("a", num_frames=257, height=128, width=128)) is None


def test_a_pipeline_that_cannot_be_built_is_none():
    assert skeleton("nowhere", {"_class_name": "NoSuchPipeline"}) is None
