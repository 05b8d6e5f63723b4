"""Heads that are spread over processes, as diffusers' context parallelism does it."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import vidattn
from tests.pipelines.sparse import WAN
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents
from vidattn.methods import create_method
from vidattn.pipelines.heads import Heads, heads_here
from vidattn.schedule import DenseGuard, Part, Rule, Schedule

NEAR, NEARER = (create_method("neighborhood", window=(1, n, n)) for n in (3, 1))
SCHEDULE = Schedule((Rule(NEARER, heads=(0,)), Rule(NEAR)), DenseGuard(0, 0))


def test_heads_keep_their_numbers(tmp_path):
    """Ulysses and tensor parallelism on two processes, in one go: they take long to start."""
    mp.spawn(_process, args=(f"file://{tmp_path}/store",), nprocs=2)


def _process(rank: int, store: str) -> None:
    """What each of the two processes checks."""
    torch.set_num_threads(1)
    # stands in for GPUs
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    inputs = {"hidden_states": latents(frames=2, height=8, width=8)}
    model = build(WAN)
    one, method = _run(model, SCHEDULE, inputs)
    assert method == "neighborhood:window=1,1,1 on head 0; neighborhood:window=1,3,3 on head 1"
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    two, method = _run(model, SCHEDULE, inputs)
    assert method == f"neighborhood:window={('1,1,1', '1,3,3')[rank]}"
    torch.testing.assert_close(one, two)
    _check_refusals(model, inputs)
    _check_tensor_parallel(rank)
    dist.destroy_process_group()


@torch.no_grad()
def _run(model: nn.Module, schedule: Schedule, inputs: dict) -> tuple[torch.Tensor, str]:
    with vidattn.patch(model, schedule=schedule) as handle:
        out = TINY[WAN].call(model, **inputs)
        (method,) = handle.report().layers[0].methods
    return out, method


def _check_refusals(model: nn.Module, inputs: dict) -> None:
    """What plans heads together, and gradients that would be those of dense attention."""
    for method in ("strided", "adaspa"):
        with torch.no_grad(), vidattn.patch(model, method, dense_layers=0):
            _check_raises("plans all 2 heads of a layer together, and only 1 are", model, inputs)
    with vidattn.patch(model, NEAR, dense_layers=0):
        _check_raises("blocks.0.attn1 has no gradient of sparse attention", model, inputs)
    with vidattn.patch(model, NEAR, dense_layers=2):
        TINY[WAN].call(model, **inputs).sum().backward()


def _check_raises(words: str, model: nn.Module, inputs: dict) -> None:
    try:
        TINY[WAN].call(model, **inputs)
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
    assert heads_here(layer, q) == Heads(3 * rank, 3, 6)
    layer.to_q.weight = nn.Parameter(distribute_tensor(torch.zeros(24, 24), mesh, [Replicate()]))
    assert heads_here(layer, q.repeat(1, 2, 1, 1)) == Heads(0, 6, 6)
    try:
        heads_here(layer, q)
    except ValueError as error:
        assert "it attends with 3 heads where 6 of the 6 of its layer are expected" in str(error)
    else:
        raise AssertionError("nothing says that heads are missing")


def test_parts_of_some_heads():
    heads = Heads(2, 3, 6)
    parts = (Part(NEARER, (0, 3)), Part(NEAR, (1, 2, 4, 5)))
    assert heads.parts(parts) == (Part(NEARER, (3,)), Part(NEAR, (2, 4)))
    assert heads.here((2, 4)) == (0, 2) and not heads.are_all
    assert heads.parts((Part(NEAR),)) == (Part(NEAR),)
    assert heads.parts((Part(NEARER, (0, 1)), Part(NEAR, (2, 3, 4, 5)))) == (Part(NEAR),)
    assert Heads(0, 6, 6).parts(parts) == parts
