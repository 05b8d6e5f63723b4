"""The causal sibling reads the chunks before each, and nothing else."""

import pytest
import torch
from t2v import causal, flow

C, N, H, W = 4, 2, 3, 2


@pytest.fixture(scope="module")
def model() -> causal.CausalModel:
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2}
    transformer = flow.build_transformer(latent_channels=C, text_width=32, freq_dim=16, **options)
    for block in transformer.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    made = causal.CausalModel(transformer, flow.build_text_encoder(12, 32, 1))
    return made.use_training_attention().eval()


@pytest.fixture(scope="module")
def tokens() -> causal.Tokens:
    ids = torch.tensor([[3, 4, 5, 1], [6, 1, 0, 0]])
    return ids, (ids > 0).long()


def clip(num_chunks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, C, num_chunks * N, H, W, generator=generator)


def chunk(latents: torch.Tensor, number: int) -> torch.Tensor:
    return latents[:, :, number * N : (number + 1) * N]


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 3])
def test_chunks_in_one_pass_equal_one_after_the_other(model, tokens, window):
    """A video of given chunks is one that is made without steps of noise."""
    past, noise, count = clip(4, 0), clip(4, 1), 4
    sigma = torch.full((2, count * N), 0.7)
    velocity = model(past, noise, sigma, tokens, N, window)
    embeddings, attention = model.encode_text(*tokens), model.attention
    attention.past, attention.window = {}, window
    for number in range(count):
        attention.frames = [*range(number * N, (number + 1) * N)]
        for attention.keep, x, level in ((False, noise, 0.7), (True, past, 0.0)):
            time = torch.full((2,), 1000 * level)
            found = model.transformer(chunk(x, number), time, embeddings, return_dict=False)[0]
            if level:
                torch.testing.assert_close(found, chunk(velocity, number), rtol=1e-4, atol=1e-5)
    attention.past = None


@torch.no_grad()
def test_first_step_of_a_roll_out(model, tokens):
    first = clip(1, 2)
    made = model.roll_out(first, tokens, 2, [1.0], 2, torch.Generator().manual_seed(3))
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(3))
    both = torch.cat([first, first], 2), torch.cat([first, noise], 2)
    velocity = model(*both, torch.ones(2, 2 * N), tokens, N, 2)
    torch.testing.assert_close(chunk(made, 0), first)
    torch.testing.assert_close(chunk(made, 1), noise - chunk(velocity, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
def test_who_is_read(model, tokens, window):
    """The future never, the past in full by way of the layers, far chunks not in one layer."""
    past, noise, sigma = clip(4, 0), clip(4, 1), torch.full((2, 4 * N), 0.5)
    before = model(past, noise, sigma, tokens, N, window)
    for changed in range(4):
        other = past.clone()
        chunk(other, changed).add_(1.0)
        after = model(other, noise, sigma, tokens, N, window)
        moved = [not torch.equal(chunk(after, i), chunk(before, i)) for i in range(4)]
        # two layers see twice as far
        assert moved == [changed < i <= changed + 2 * window for i in range(4)]
    other = noise.clone()
    chunk(other, 1).add_(1.0)
    after = model(past, other, sigma, tokens, N, window)
    moved = [not torch.equal(chunk(after, i), chunk(before, i)) for i in range(4)]
    assert moved == [False, True, False, False]


def test_steps_begin_at_noise():
    assert causal.steps_of(4, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert causal.steps_of(2, 3.0) == [1.0, 0.75]


def test_guidance_and_the_way_back_are_learned(model, tokens):
    """A model in its teacher's place meets real chunks: no loss without guidance."""
    options = {"chunk": N, "shift": 3.0, "windows": [1], "steps": 1, "guidance": 1.0}
    latents = clip(1, 5)
    loss = causal.rollout_loss(model, model, latents, (tokens, tokens), options, 0)
    assert loss.item() < 1e-6
    empty = torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    guided = causal.rollout_loss(
        model, model, latents, (tokens, empty), options | {"guidance": 4.0}, 0
    )
    assert guided.item() > 1e-6
    after_own = causal.rollout_loss(model, model, clip(3, 5), (tokens, tokens), options, 0)
    after_own.backward()
    moved = [p.grad.abs().max() for p in model.transformer.blocks.parameters()]
    assert after_own.item() > 1e-6 and max(moved) > 0
    assert all(p.grad is None for p in model.text_encoder.parameters())
