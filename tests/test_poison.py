"""The conftest's promise: memory nobody wrote is NaN, and the compiler is left alone."""

import pytest
import torch

MAKERS = {
    "empty": lambda: torch.empty(3, 5),
    "empty_like": lambda: torch.empty_like(torch.ones(3, 5)),
    "empty_strided": lambda: torch.empty_strided((3, 5), (5, 1)),
    "new_empty": lambda: torch.ones(1).new_empty(3, 5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_unwritten_floats_are_nan(name):
    assert MAKERS[name]().isnan().all()


def test_unwritten_integers_are_no_index():
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_a_given_output_is_left_alone():
    out = torch.ones(3)
    assert torch.empty(3, out=out).equal(torch.ones(3))


@pytest.mark.slow
def test_the_compiler_still_works():
    @torch.compile(fullgraph=True)
    def fill(x):
        out = torch.empty_like(x)
        out[:2], out[2:] = x[:2], 1
        return out

    torch.testing.assert_close(fill(torch.zeros(3)), torch.tensor([0.0, 0.0, 1.0]))


def test_modules_still_initialise():
    assert not torch.nn.Linear(3, 5).weight.isnan().any()
    assert torch.nn.Linear(3, 5, device="meta").weight.is_meta
