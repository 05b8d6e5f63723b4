"""A compiled transformer streams as it is, and its code serves every chunk."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import vidattn
from tests.pipelines.stream_cases import causal_pipe
from tests.pipelines.test_compile import compile_how
from tests.pipelines.test_stream import PROMPT, latents_of


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "how", ["blocks", "wrapped", pytest.param("in place", marks=pytest.mark.slow)]
)
def test_compiled_is_eager(how):
    pipe, policy = causal_pipe(), "tempcache:window=8,sink=1"
    expected = latents_of(vidattn.stream(pipe, policy, prompt=PROMPT), 4)
    counter = CompileCounter()
    pipe.transformer = compile_how(how, pipe.transformer, counter)
    for _ in range(2):
        found = latents_of(vidattn.stream(pipe, policy, prompt=PROMPT), 4)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
