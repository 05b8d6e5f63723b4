"""Everything people combine with a patched pipeline gives what it gives with a masked softmax.

The reference runs the same pairing without a patch, with a masked softmax in float64 in the place
of the attention over the video.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers.modular_pipelines.wan import WanBlocks

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.masked_softmax import MaskedSoftmax, relative_rms
from tests.pipelines.pairings import PAIRINGS
from vidattn.pipelines.site import SKIPPED

GRID = vidattn.Grid(5, 5, 7)
RADIAL = {"near": 0, "decay": 0.25, "tile": (1, 4, 4)}
NUM_STEPS, NUM_LAYERS = 6, 2
every = pytest.mark.parametrize("name", PAIRINGS)


def run(pipe, pairing):
    options = {"num_inference_steps": NUM_STEPS} | dict(pairing.options)
    prompt = list(options.pop("prompt", ("a dog",)))
    options |= {
        "prompt": prompt,
        "negative_prompt": ["bad"] * len(prompt),
        "generator": torch.Generator().manual_seed(0),
        "max_sequence_length": 8,
    }
    options = tiny_pipes.WAN_CALL | options
    if pairing.guider is None:
        return pipe(**options, output_type="latent").frames
    modular = WanBlocks().init_pipeline()
    names = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    parts = {name: getattr(pipe, name) for name in names}
    modular.update_components(**parts, guider=pairing.guider())
    return modular(**options, output="latents")


def masked():
    """The attention that the plan stands for."""
    plan = vidattn.plan("radial", GRID, **RADIAL)
    case = SimpleNamespace(num_video=GRID.num_tokens, before=lambda length: 0, silent=0)
    return MaskedSoftmax(case, {GRID.num_tokens: plan.mask()[0, 0]})


def patch(pipe):
    return vidattn.patch(pipe, "radial", dense_layers=0, dense_steps=0, **RADIAL)


@pytest.fixture(scope="module")
def references():
    """What a pairing gives with a masked softmax, and in how many calls."""
    known = {}

    def get(name):
        if name not in known:
            pairing, pipe = PAIRINGS[name], tiny_pipes.wan()
            pairing.put(pipe)
            with masked() as softmax:
                known[name] = run(pipe, pairing), softmax.calls
        return known[name]

    return get


@pytest.fixture
def pairing(name):
    if (missing := PAIRINGS[name].missing) is not None:
        pytest.skip(f"{missing} is not installed")
    return PAIRINGS[name]


@every
@pytest.mark.parametrize("first", ["patch", "pairing"])
def test_sparse_is_the_pairing_with_a_masked_softmax(name, pairing, first, references):
    expected, num_calls = references(name)
    pipe = tiny_pipes.wan()
    if first == "pairing":
        pairing.put(pipe)
    handle = patch(pipe)
    if first == "patch":
        pairing.put(pipe)
    actual = run(pipe, pairing)
    assert relative_rms(actual, expected) < 1e-4
    report = handle.report()
    assert report.num_sparse == num_calls
    assert {why for layer in report.layers for why in layer.num_dense} <= {SKIPPED}
    passes = NUM_STEPS * 2 * NUM_LAYERS
    assert num_calls < passes if pairing.skips else num_calls >= passes
    # off again, and the pairing alone is left
    handle.remove()
    alone = tiny_pipes.wan()
    pairing.put(alone)
    assert torch.equal(run(pipe, pairing), run(alone, pairing))


@pytest.mark.parametrize("name", [name for name in PAIRINGS if PAIRINGS[name].comes_off])
def test_taken_off_while_patched(name, pairing):
    pipe, plain = tiny_pipes.wan(), tiny_pipes.wan()
    handle = patch(pipe)
    expected = run(pipe, pairing)
    undo = pairing.put(pipe)
    run(pipe, pairing)
    undo()
    assert relative_rms(run(pipe, pairing), expected) <= pairing.rounding
    handle.remove()
    assert relative_rms(run(pipe, pairing), run(plain, pairing)) <= pairing.rounding
