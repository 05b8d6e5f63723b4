"""A transformer as it is and with a window of three, side by side."""

import torch

import vidattn
from tests.pipelines.tiny import TINY

WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
OPTIONS = {"window": 3, "dense_layers": 0}


def patch(model, **options):
    return vidattn.patch(model, "neighborhood", **{**OPTIONS, **options})


def outputs(key, model, **changes):
    """What a transformer gives as it is and patched."""
    with torch.no_grad():
        dense = TINY[key].call(model, **changes)
        with patch(model):
            return dense, TINY[key].call(model, **changes)


@torch.no_grad()
def check(key, model, dense, sparse):
    """The patched ``model`` gives ``sparse``, and once unpatched ``dense``."""
    assert torch.equal(TINY[key].call(model), sparse)
    vidattn.unpatch(model)
    assert torch.equal(TINY[key].call(model), dense)


def call_at(handle, key, model, times, passes=1):
    """What a transformer gives in a loop of our own that tells its steps, one for each time."""
    outs = []
    with handle.generation(num_steps=len(times)) as generation:
        for step, time in enumerate(times):
            generation.at(step)
            timestep = torch.full((2,), time)
            outs += [TINY[key].call(model, timestep=timestep) for _ in range(passes)]
    return outs
