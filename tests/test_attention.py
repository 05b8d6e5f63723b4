"""attend(): engines agree, and bad input is named."""

import pytest
import torch
import torch.nn.functional as F

import vidattn
from tests.kernels.attention_cases import random_blocks, random_inputs, relative_rms
from vidattn.attention import attend
from vidattn.grid import Grid

GRID = Grid(2, 7, 5, text=6)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_engines_agree(backend):
    q, k, v = random_inputs(GRID, key_heads=2)[:3]
    plan = random_blocks(GRID)
    out, lse = attend(q, k, v, plan, backend=backend, return_lse=True, scale=0.3)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    mask = plan.mask()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    scores = (q @ k.mT * 0.3).masked_fill(~mask, float("-inf"))
    assert relative_rms(out, expected) < 1e-5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32


def test_a_dense_plan_is_pytorchs_own_attention():
    q, k, v = random_inputs(GRID, key_heads=2)[:3]
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    key_mask[0, -3:] = False
    plan = vidattn.plan("dense", GRID)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=key_mask[:, None, None], enable_gqa=True
    )
    assert torch.equal(attend(q, k, v, plan, key_mask=key_mask), expected)


def other(x, **change):
    """The inputs with one of them replaced."""
    return {**x, **change}


WRONG = {
    "three axes": (lambda x: other(x, q=x["q"][0]), r"must be \(batch, heads, tokens, head dim\)"),
    "another batch": (lambda x: other(x, k=x["k"][:1], v=x["v"][:1]), "must agree in batch"),
    "heads no multiple": (lambda x: other(x, k=x["k"][:, :3], v=x["v"][:, :3]), "multiple"),
    "values of another size": (lambda x: other(x, v=x["v"][..., :3]), "got q"),
    "another length": (
        lambda x: other(x, **{name: x[name][:, :, :9] for name in "qkv"}),
        "q has 9 tokens but the plan is for 76",
    ),
    "mixed dtypes": (lambda x: other(x, k=x["k"].double()), "share one dtype"),
    "a plan for other heads": (
        lambda x: other(x, plan=random_blocks(GRID, heads=3)),
        "the plan is for 2 samples and 3 heads",
    ),
    "a plan for other samples": (
        lambda x: other(x, plan=random_blocks(GRID, batch=5)),
        "the plan is for 5 samples",
    ),
    "a float mask": (lambda x: other(x, key_mask=torch.ones(2, 76)), "key_mask must be bool"),
    "a mask of another shape": (
        lambda x: other(x, key_mask=torch.ones(76, dtype=torch.bool)),
        r"key_mask must be bool of shape \(batch, tokens\)",
    ),
    "an unknown backend": (lambda x: other(x, backend="torhc"), "did you mean 'torch'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    change, message = WRONG[case]
    q, k, v = random_inputs(GRID)[:3]
    arguments = change({"q": q, "k": k, "v": v, "plan": random_blocks(GRID)})
    with pytest.raises(ValueError, match=message):
        attend(**arguments)
