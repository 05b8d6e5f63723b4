"""What a transformer is trained with is what its pipeline gives it, in every family."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from video_training import batches
from video_training import pipeline as pipelines
from video_training import recorder as recorders

from tests.scripts import video_cases as cases


class Seen(Exception):
    """Carries what was seen out of a pipeline."""


@pytest.fixture(scope="module", params=list(cases.PIPELINES))
def made(request, tmp_path_factory):
    """A pipeline as it is, the recorder of it, and the size of a clip."""
    folder = tmp_path_factory.mktemp("pipeline")
    cases.write_pipeline(folder, request.param)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    frame = pipelines.load_frame(folder, torch.float32, torch.device("cpu"), tiling=False)
    recorder = recorders.Recorder(frame, fps=12.0, call={"max_sequence_length": 6})
    return pipe, recorder, cases.PIPELINES[request.param][1]


def clip(size) -> np.ndarray:
    frames, height, width = size
    source = np.random.default_rng(0)
    return source.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def run(pipe, size, prompt, **more):
    frames, height, width = size
    given = {"num_frames": frames, "height": height, "width": width, "max_sequence_length": 6}
    given |= {"guidance_scale": 1.0, "num_inference_steps": 3, "frame_rate": 12.0} | more
    names = inspect.signature(type(pipe).__call__).parameters
    return pipe(prompt, **{name: value for name, value in given.items() if name in names})


def test_transformers_are_not_loaded_to_record_their_arguments(made, monkeypatch):
    pipe, _, size = made

    def load(*args, **kwargs):
        raise AssertionError("the weights of a transformer are loaded")

    monkeypatch.setattr(type(pipe.transformer), "from_pretrained", load)
    folder = Path(pipe.config._name_or_path)
    frame = pipelines.load_frame(folder, torch.float32, torch.device("cpu"), tiling=False)
    names = [name for name in pipe.components if name.startswith("transformer")]
    assert all(type(getattr(frame, name)) is type(getattr(pipe, name)) for name in names)


@pytest.mark.parametrize("caption", [cases.CAPTION, ""])
def test_the_arguments_are_those_of_the_pipeline(made, monkeypatch, caption):
    pipe, recorder, size = made

    def see(**arguments):
        raise Seen(arguments)

    monkeypatch.setattr(pipe.transformer, "forward", see)
    with pytest.raises(Seen) as caught:
        run(pipe, size, caption)
    (wanted,) = caught.value.args
    base = recorder.base(size, None)
    leaves = base | recorder.own(caption, size, None, base)
    found = recorders.nest({k: v for k, v in leaves.items() if not k.startswith(".")})
    hidden_states, timestep = wanted.pop("hidden_states"), wanted.pop("timestep")
    wanted = {k: v for k, v in wanted.items() if v is not None and k != "return_dict"}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert base[".shape"] == list(hidden_states.shape)
    assert list(recorder.latents(clip(size)).shape) == base[".shape"]
    assert base[".time_shape"] == list(timestep.shape[1:]) and base[".time_scale"] == 1


def test_several_captions_are_what_the_pipeline_makes_of_them(made, monkeypatch):
    pipe, recorder, size = made
    captions = ["a red boot", cases.CAPTION]

    def see(**arguments):
        raise Seen(arguments)

    monkeypatch.setattr(pipe.transformer, "forward", see)
    with pytest.raises(Seen) as caught:
        run(pipe, size, captions)
    (wanted,) = caught.value.args
    base = recorder.base(size, None)
    leaves = [base | recorder.own(caption, size, None, base) for caption in captions]
    joined = batches._join(leaves, base[".per_sample"], captions)
    found = recorders.nest({k: v for k, v in joined.items() if not k.startswith(".")})
    wanted = {
        k: v
        for k, v in wanted.items()
        if v is not None and k not in ("hidden_states", "timestep", "return_dict")
    }
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_pipeline_decodes_the_latents_to_what_was_encoded(made, monkeypatch):
    pipe, recorder, size = made
    frames = clip(size)
    latents = recorder.latents(frames)
    # a sampler that leaves the latents alone
    monkeypatch.setattr(pipe.scheduler, "step", lambda _, t, sample, **more: (sample,))

    def see(latents, *args, **more):
        raise Seen(latents)

    monkeypatch.setattr(pipe.vae, "decode", see)
    with pytest.raises(Seen) as caught:
        run(pipe, size, "", latents=latents, output_type="np")
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    expected = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(caught.value.args[0], expected, rtol=1e-4, atol=1e-4)
    assert latents.std() > 1e-3


def test_what_a_pipeline_cannot_do_is_said(made):
    _, recorder, (frames, height, width) = made
    with pytest.raises(ValueError, match="cannot be run on .*divisible"):
        recorder.base((frames, height + 3, width), None)
    with pytest.raises(ValueError, match="model.call: .* does not take colour"):
        recorders.Recorder(recorder.pipe, call={"colour": 1})


def test_leaves_and_back():
    given = {"a": 1, "b": (1.5, "x", (3, True)), "c": {"d": 2, "e": (3,)}, "f": None}
    leaves = dict(recorders._leaves(given))
    assert list(leaves) == ["a", "b/0", "b/1", "b/2/0", "b/2/1", "c/d", "c/e/0"]
    del given["f"]
    assert recorders.nest(leaves) == given
    with pytest.raises(ValueError, match="called with a=<object"):
        dict(recorders._leaves({"a": object()}))


def test_components_that_are_not_there(tmp_path):
    cases.write_pipeline(tmp_path, "wan")
    with pytest.raises(ValueError, match="has no 'transformer_2'; it has transformer$"):
        pipelines.transformer_class(tmp_path, "transformer_2")
    with pytest.raises(ValueError, match="no folder on this machine, and no hub id"):
        pipelines.model_folder("./nowhere")
