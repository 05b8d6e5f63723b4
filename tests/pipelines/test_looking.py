"""What is seen of a word, against the cross-attention computed from the layers' own inputs."""

import pytest
import torch

import vidattn
from tests.commands.cli_cases import tiny_wan
from tests.pipelines.tiny import build
from vidattn.pipelines.looking import looking_at, places_of

PROMPT = "a red boot a red"
CALL = {
    "height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()  # no dropout
    return pipe


def make(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, **(CALL | {"guidance_scale": 3.0} | options), generator=generator).frames


def expected(pipe, words: list[int], mine: list[int], **options) -> torch.Tensor:
    """The mean over layers, steps and heads, from what each attn2 is given with the prompt."""
    shares, passes = [], []

    def before(module, args, given):
        passes.append(given["encoder_hidden_states"])

    def seen(module, args, given, output):
        text = given.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        q, k = module.norm_q(module.to_q(args[0])), module.norm_k(module.to_k(text))
        q, k = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (q, k[:, words]))
        weights = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
        shares.append((len(passes), weights[..., mine].sum(-1).mean(1)))

    blocks = pipe.transformer.blocks
    hooks = [x.attn2.register_forward_hook(seen, with_kwargs=True) for x in blocks]
    hooks.append(pipe.transformer.register_forward_pre_hook(before, with_kwargs=True))
    make(pipe, **options)
    for hook in hooks:
        hook.remove()
    # passes with the prompt and without it take turns
    return (
        torch.stack([x for count, x in shares if count % 2 == 1]).mean(0).unflatten(1, (3, 6, 10))
    )


@pytest.mark.parametrize("word", ["boot", "red", "Red BOOT", "a"])
def test_heat_is_the_share_of_the_prompts_words(pipe, word):
    mine = {"boot": [2], "red": [1, 4], "Red BOOT": [1, 2], "a": [0, 3]}[word]
    plain = make(pipe)
    with looking_at(pipe, PROMPT, word) as looked:
        assert torch.equal(make(pipe), plain)
    wanted = expected(pipe, [0, 1, 2, 3, 4], mine)
    torch.testing.assert_close(looked.heat().double(), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(make(pipe), plain)
    assert not pipe.transformer._forward_pre_hooks
    assert "cache_context" not in vars(pipe.transformer)


def test_a_patch_goes_with_it(pipe):
    with vidattn.patch(pipe, "neighborhood", window=(1, 3, 3)):
        plain = make(pipe)
        with looking_at(pipe, PROMPT, "boot") as looked:
            assert torch.equal(make(pipe), plain)
        sparse = expected(pipe, [0, 1, 2, 3, 4], [2])
        assert torch.equal(make(pipe), plain)
    torch.testing.assert_close(looked.heat().double(), sparse, atol=1e-5, rtol=1e-4)
    with looking_at(pipe, PROMPT, "boot") as dense:
        make(pipe)
    assert (dense.heat() - looked.heat()).abs().max() > 1e-6


def test_several_videos_have_a_map_each(pipe):
    with looking_at(pipe, PROMPT, "boot") as looked:
        make(pipe, num_videos_per_prompt=2)
    heat = looked.heat()
    assert heat.shape == (2, 3, 6, 10) and not torch.allclose(heat[0], heat[1])


def test_bad_input(pipe):
    for word in ("boo", "dog", "", " "):
        with pytest.raises(ValueError, match="the prompt has no word"):
            places_of(pipe.tokenizer, PROMPT, word)
    with looking_at(pipe, PROMPT, "boot") as looked:
        with pytest.raises(RuntimeError, match="call the pipeline first"):
            looked.heat()
        make(pipe)
        with pytest.raises(RuntimeError, match="of one size"):
            make(pipe, width=64)
    with pytest.raises(ValueError, match="cross-attention of Wan's text-to-video pipelines"):
        with looking_at(build("CogVideoXTransformer3DModel"), PROMPT, "boot"):
            pass
