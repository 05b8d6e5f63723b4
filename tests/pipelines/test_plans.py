"""Where a kept plan belongs: to one sample, pass, layer and step of one generation."""

import pytest
import torch

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.tiny import TINY

METHODS = ["topk", "adaspa", "cluster", "paro"]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_of_a_batch_is_that_sample_alone(method):
    # Mochi attends sample by sample, and prompts of one length give one grid
    pipe = tiny_pipes.mochi()
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 6, 16, generator=generator)
    noise = torch.randn(2, 4, 3, 10, 14, generator=generator)

    def videos(rows):
        with vidattn.patch(pipe, method, density=0.3, dense_layers=0, dense_steps=0):
            return pipe(
                prompt_embeds=text[rows],
                prompt_attention_mask=torch.ones(len(text[rows]), 6, dtype=torch.bool),
                latents=noise[rows],
                guidance_scale=1.0,
                num_inference_steps=3,
                height=80,
                width=112,
                num_frames=13,
                output_type="latent",
            ).frames

    both = videos(slice(0, 2))
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], videos(slice(i, i + 1)), atol=1e-5, rtol=1e-4)


STATES = {
    "bfloat16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", STATES)
def test_plans_hang_on_no_state_of_the_process(method, state, monkeypatch):
    # of a model whose attention is given the same numbers in every state
    model, made = tiny_pipes.wan().transformer, []
    from vidattn.pipelines.plans import Plans

    search = Plans._search

    def spy(self, part, layer, current, call, q, k, last):
        q, k = (torch.linspace(-2, 2, x.numel()).view(x.shape).sin() for x in (q, k))
        made.append(search(self, part, layer, current, call, q, k, last))
        return made[-1]

    monkeypatch.setattr(Plans, "_search", spy)
    inputs = TINY["WanTransformer3DModel"].inputs()
    inputs["hidden_states"] = torch.randn(2, 16, 3, 11, 15)
    with vidattn.patch(model, method, dense_layers=1):
        with torch.no_grad():
            model(**inputs)
        with STATES[state]():
            model(**inputs)
    (one, _), (other, _) = made
    assert torch.equal(one.mask(), other.mask())
