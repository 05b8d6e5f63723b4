"""A sequence or heads that are spread over processes, as diffusers' parallelism does it."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import vidattn
from tests.pipelines.sparse import WAN
from tests.pipelines.test_families import relative_rms
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents, padding, text
from vidattn.methods import create_method
from vidattn.pipelines.heads import Heads, are_spread, heads_here
from vidattn.pipelines.hooks import ring
from vidattn.pipelines.hooks.parallel import Shards, attend
from vidattn.pipelines.hooks.ring import owners
from vidattn.schedule import DenseGuard, Part, Rule, Schedule

NEAR, NEARER = (create_method("neighborhood", window=(1, n, n)) for n in (3, 1))
TOPK = create_method("topk", density=0.4, tile=(1, 2, 2))
CLUSTER = create_method("cluster", density=0.4, tile=(1, 2, 2), block=2)
SCHEDULES = {
    "by head": Schedule((Rule(NEARER, heads=(0,)), Rule(NEAR)), DenseGuard(0, 0)),
    "content": Schedule((Rule(TOPK),), DenseGuard(0, 0)),
    "own layouts": Schedule((Rule(CLUSTER),), DenseGuard(0, 0)),
    "half dense": Schedule((Rule(NEAR),), DenseGuard(1, 0)),
}
SPLIT = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
JOINT = {
    "transformer_blocks.0": {"hidden_states": SPLIT, "encoder_hidden_states": SPLIT},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
ANGLES = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
# transformers with the plan by which diffusers spreads them, where they bring none, and what they
# are called with: 2x4x4 tokens of video, 8 of text
MODELS = {
    WAN: (None, lambda: {"hidden_states": latents(frames=2, height=8, width=8)}),
    "CogVideoXTransformer3DModel": (
        JOINT,
        lambda: {"hidden_states": torch.randn(2, 2, 4, 8, 8), "encoder_hidden_states": text(8)},
    ),
    "HunyuanVideoTransformer3DModel": (
        JOINT | {"rope": {0: ANGLES, 1: ANGLES}},
        lambda: {
            "hidden_states": latents(frames=2, height=8, width=8),
            "encoder_hidden_states": text(8),
            "encoder_attention_mask": padding(8, 3, length=8),
        },
    ),
}


def uneven() -> dict[str, torch.Tensor]:
    """45 tokens."""
    return {"hidden_states": latents(frames=3, height=6, width=10)}


def gather_padded(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """What diffusers asks of its backend, which Gloo does for equal sizes only."""
    sizes = [torch.tensor(0) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor(x.shape[dim]), group)
    x = x.movedim(dim, 0)
    padded = x.new_zeros(max(sizes).item(), *x.shape[1:])
    padded[: len(x)] = x
    every = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(every, padded, group)
    return torch.cat([part[:size] for part, size in zip(every, sizes)]).movedim(0, dim)


@pytest.mark.parametrize("num", [2, 4])
def test_several_processes_are_one(tmp_path, num):
    """Outputs and gradients, and what heads are called, all in one go: processes start slowly."""
    mp.spawn(_process, args=(num, f"file://{tmp_path}/store"), nprocs=num)


def _process(rank: int, num: int, store: str) -> None:
    """What each of the processes checks."""
    torch.set_num_threads(1)
    # stands in for GPUs
    torch.accelerator.device_count = lambda: 1
    context_parallel._all_gather_anything = gather_padded
    dist.init_process_group("cpu:gloo", init_method=store, rank=rank, world_size=num)
    if num == 2:
        for key in MODELS:
            _check(key, "by head", ulysses_degree=2)
        _check(WAN, "content", ulysses_degree=2)
        _check(WAN, "half dense", ring_degree=2)
        _check(WAN, "own layouts", ring_degree=2)
        with mock.patch.object(ring, "owners", lambda plan, num: owners(plan, num) + rank):
            _check(WAN, "by head", ring_degree=2)
        _check(WAN, "by head", uneven, ulysses_degree=2, ulysses_anything=True)
        _check(WAN, "by head", uneven, ring_degree=2, ring_anything=True)
        _check_refusals()
        _check_tensor_parallel(rank)
    else:
        _check(WAN, "content", ring_degree=2, ulysses_degree=2)
        for key in MODELS:
            _check(key, "by head", ring_degree=4)
    dist.destroy_process_group()


def _check(key: str, kind: str, make_inputs=None, **degrees: object) -> None:
    """One process and several give the same video and the same gradients."""
    plan, usual_inputs = MODELS[key]
    torch.manual_seed(0)
    inputs = (make_inputs or usual_inputs)()
    model = build(key)
    if key.startswith("CogVideoX"):
        model.patch_embed.max_text_seq_length = 8
    expected = _run(key, model, SCHEDULES[kind], inputs)
    dense = _run(key, model, SCHEDULES[kind], inputs, patched=False)
    model.enable_parallelism(config=ContextParallelConfig(**degrees), cp_plan=plan)
    actual = _run(key, model, SCHEDULES[kind], inputs)
    for ours, theirs, without in zip(actual, expected, dense):
        assert relative_rms(ours, theirs) < 1e-5
        assert relative_rms(without, theirs) > 1e-3


def _run(key, model, schedule, inputs, patched=True) -> tuple[torch.Tensor, torch.Tensor]:
    """The video, and the gradient of the latents and the first projection of queries."""
    inputs = dict(inputs, hidden_states=inputs["hidden_states"].clone().requires_grad_())
    handle = vidattn.patch(model, schedule=schedule) if patched else None
    out = TINY[key].call(model, **inputs)
    model.zero_grad()
    out.square().mean().backward()
    if handle is not None:
        assert handle.report().num_sparse
        handle.remove()
    weight = next(p for name, p in model.named_parameters() if name.endswith("to_q.weight"))
    if dist.is_initialized() and getattr(model, "_parallel_config", None) is not None:
        # each process has the part of the gradient that its tokens have
        dist.all_reduce(weight.grad)
        dist.all_reduce(inputs["hidden_states"].grad)
    return out.detach(), inputs["hidden_states"].grad, weight.grad


def _check_refusals() -> None:
    """What plans heads together, as early as it is known."""
    why = "plans all heads of a layer together, and processes share them"
    spread, inputs = ContextParallelConfig(ulysses_degree=2), MODELS[WAN][1]()
    for method in ("strided", "adaspa"):
        model = build(WAN)
        with torch.no_grad(), vidattn.patch(model, method, dense_layers=0):
            model.enable_parallelism(config=spread)
            _check_raises(why, partial(TINY[WAN].call, model, **inputs))
        _check_raises(why, partial(vidattn.patch, model, method))
        vidattn.patch(model, method, strict=False).remove()
    why = "to_gate_compress is not spread over processes"
    _check_raises(why, partial(vidattn.patch, model, "vsa"))
    model = build(WAN)
    with torch.no_grad(), vidattn.patch(model, "vsa", dense_layers=0):
        model.enable_parallelism(config=spread)
        why = "learned parameters are not spread over processes"
        _check_raises(why, partial(TINY[WAN].call, model, **inputs))


@pytest.mark.parametrize(
    ("heads", "keys", "words"),
    [(4, (2, 5), "4 heads share 2 heads of keys, and 4 processes"), (4, (4, 6), "5 queries and 6")],
)
def test_keys_of_others_are_refused(heads, keys, words):
    config, q = SimpleNamespace(ulysses_degree=4), torch.zeros(1, heads, 5, 8)
    k = torch.zeros(1, *keys, 8)
    with pytest.raises(ValueError, match=words):
        attend(config, Shards((5,) * 4, (0,) * 4, True), None, q, k, k, None)


def test_order_of_shards():
    shards = Shards((5, 4), (2, 1), text_first=True)
    # text 0 1, video 2 3 4, text 5, video 6 7 8
    assert shards.order.tolist() == [0, 1, 5, 2, 3, 4, 6, 7, 8]
    shards = Shards((5, 4), (2, 1), text_first=False)
    assert shards.order.tolist() == [0, 1, 2, 5, 6, 7, 3, 4, 8]
    assert Shards((5, 4), (0, 0), text_first=True).order is None


def _check_raises(words: str, run: Callable[[], object]) -> None:
    try:
        run()
    except (RuntimeError, ValueError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing says that it {words}")


def _check_tensor_parallel(rank: int) -> None:
    """The projections of six heads, cut by heads."""
    mesh, layer = init_device_mesh("cpu", (2,)), nn.Module()
    layer.processor, layer.heads, layer.to_q = object(), 6, nn.Linear(24, 24)
    q = torch.zeros(1, 3, 5, 4)
    weight = distribute_tensor(layer.to_q.weight.detach(), mesh, [Shard(0)])
    layer.to_q.weight = nn.Parameter(weight)
    assert heads_here(layer, q) == Heads(3 * rank, 3, 6) and are_spread(layer, layer)
    layer.to_q.weight = nn.Parameter(distribute_tensor(torch.zeros(24, 24), mesh, [Replicate()]))
    assert heads_here(layer, q.repeat(1, 2, 1, 1)) == Heads(0, 6, 6)
    assert not are_spread(layer, layer)
    words = "it attends with 3 heads where 6 of the 6 of its layer are expected"
    _check_raises(words, partial(heads_here, layer, q))


def test_parts_of_some_heads():
    heads = Heads(2, 3, 6)
    parts = (Part(NEARER, (0, 3)), Part(NEAR, (1, 2, 4, 5)))
    assert heads.parts(parts) == (Part(NEARER, (3,)), Part(NEAR, (2, 4)))
    assert heads.here((2, 4)) == (0, 2) and not heads.are_all
    assert heads.parts((Part(NEAR),)) == (Part(NEAR),)
    assert heads.parts((Part(NEARER, (0, 1)), Part(NEAR, (2, 3, 4, 5)))) == (Part(NEAR),)
    assert Heads(0, 6, 6).parts(parts) == parts
