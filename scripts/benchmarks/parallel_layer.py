"""One layer of Wan whose sequence several processes on this machine share."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.parallel_counts import visited_pairs
from torch import Tensor

import vidattn
from vidattn.attention import engines_of
from vidattn.pipelines import site
from vidattn.pipelines.hooks import exchange


class Case(NamedTuple):
    """What is measured: methods as a command line writes them, (t, h, w) tokens, heads."""

    methods: tuple[str, ...]
    size: tuple[int, int, int]
    num_heads: int
    head_dim: int


class Spread(NamedTuple):
    """Processes that exchange heads for tokens, and groups of them that form a ring."""

    ulysses: int = 1
    ring: int = 1

    def __str__(self) -> str:
        degrees = [f"{name} {n}" for name, n in self._asdict().items() if n > 1]
        return " x ".join(degrees) or "one process"


SPREADS = {
    1: (Spread(),),
    2: (Spread(2), Spread(1, 2)),
    4: (Spread(4), Spread(2, 2), Spread(1, 4)),
}


def measure(case: Case, counts: Sequence[int]) -> dict:
    """The counts, times and errors of so many processes each; the first is 1."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num in counts:
            if num == 1:
                _process(0, num, folder, case)
            else:
                mp.spawn(_process, args=(num, folder, case), nprocs=num)
            ranks = [json.loads(Path(folder, f"{num}-{i}.json").read_text()) for i in range(num)]
            for found in zip(*ranks):
                row = {name: found[0][name] for name in ("method", "ulysses", "ring", "engines")}
                for name in ("sent", "pairs", "seconds", "cpu_seconds", "error"):
                    row[name] = [x[name] for x in found]
                print(row)
                rows.append(row)
    return case._asdict() | {"rows": rows}


def _process(rank: int, num: int, folder: str, case: Case) -> None:
    """One of the processes, which writes what it found."""
    torch.set_num_threads(1)
    if num > 1:
        # diffusers counts GPUs, and there may be none
        torch.accelerator.device_count = lambda: 1
        store = f"file://{folder}/store{num}"
        dist.init_process_group("cpu:gloo", init_method=store, rank=rank, world_size=num)
    rows = []
    for label in case.methods:
        for spread in SPREADS[num]:
            out, row = run_layer(case, label, spread)
            file = Path(folder, f"{case.methods.index(label)}.pt")
            if num == 1:
                torch.save(out, file)
            expected = torch.load(file)
            error = (out - expected).norm() / expected.norm()
            rows.append(row | {"method": label, "error": error.item()} | spread._asdict())
    Path(folder, f"{num}-{rank}.json").write_text(json.dumps(rows))
    if num > 1:
        dist.destroy_process_group()


def run_layer(case: Case, label: str, spread: Spread) -> tuple[Tensor, dict]:
    """The video that a transformer of one layer predicts, and this process's counts and times."""
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=case.num_heads,
        attention_head_dim=case.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
    )
    t, h, w = case.size
    given = {
        "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    if spread != Spread():
        degrees = {"ulysses_degree": spread.ulysses, "ring_degree": spread.ring}
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    with torch.no_grad(), vidattn.patch(model, label, dense_layers=0, dense_steps=0):
        # plans, and compiles what has to be compiled
        model(**given, return_dict=False)
        if dist.is_initialized():
            dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        model(**given, return_dict=False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        with counting() as counts:
            (out,) = model(**given, return_dict=False)
    return out, counts | {"seconds": seconds, "cpu_seconds": cpu_seconds}


@contextmanager
def counting() -> Iterator[dict]:
    """Count the bytes that attention sends to other processes, and the pairs that it visits."""
    counts: dict[str, Any] = {"sent": 0, "pairs": 0, "engines": ()}
    swap, attend = exchange.collectives.all_to_all_single_autograd, site.attend

    def counted_exchange(flat, taken, sent, group):
        to_others = sum(sent) - sent[dist.get_rank(group)]
        counts["sent"] += to_others * flat.element_size()
        return swap(flat, taken, sent, group)

    def counted_attend(q, k, v, plan, **options):
        counts["pairs"] += visited_pairs(plan, *q.shape[:2])
        counts["engines"] = engines_of(q, k, v, plan, **options)
        return attend(q, k, v, plan, **options)

    with (
        mock.patch.object(exchange.collectives, "all_to_all_single_autograd", counted_exchange),
        mock.patch.object(site, "attend", counted_attend),
    ):
        yield counts
