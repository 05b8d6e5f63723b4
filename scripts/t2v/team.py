"""Data-parallel workers of one thread each: no barrier inside a step, so load hardly slows them."""

import datetime
import os
import signal
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from tqdm import tqdm

# One heap that keeps what is freed: large tensors come and go without page faults.
HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Team:
    """This process's place among `size` workers that train one model together."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.log = []

    def total(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sum over the workers of every tensor of a list."""
        if self.size == 1:
            return tensors
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]

    def average_gradients(self, module: torch.nn.Module) -> None:
        """Replace every gradient by its mean over the workers."""
        params = list(module.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for p, grad in zip(params, self.total(grads), strict=True):
            p.grad = grad / self.size

    def wait(self) -> None:
        """Return once every worker has come here."""
        if self.size > 1:
            dist.barrier()

    def bar(self, start: int, total: int, name: str) -> tqdm:
        """A progress bar, shown by the first worker only."""
        return tqdm(
            initial=start, total=total, desc=name, disable=self.rank > 0, mininterval=10, ncols=100
        )

    def report(self, bar: tqdm, step: int, values: dict[str, torch.Tensor]) -> None:
        """Advance the bar, and every 50 steps show the means since the last time."""
        self.log.append([v.detach() for v in values.values()])
        bar.update()
        if (step + 1) % 50 == 0 and self.rank == 0:
            means = torch.tensor(self.log).mean(0).tolist()
            shown = "  ".join(f"{k} {v:.4f}" for k, v in zip(values, means, strict=True))
            tqdm.write(f"{datetime.datetime.now():%H:%M:%S}  {bar.desc} {step + 1}  {shown}")
        if (step + 1) % 50 == 0:
            self.log.clear()


def _work(rank: int, size: int, port: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if size > 1:
        # sent by the system when the first process dies; a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        timeout = datetime.timedelta(hours=3)
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    function(Team(rank, size), *arguments)
    if size > 1:
        dist.destroy_process_group()


def run_team(size: int, function: Callable, *arguments) -> None:
    """Call `function(team, *arguments)` in `size` processes, or here when it is one.

    Raises:
        ValueError: a process raised one; it is said again.
    """
    os.environ |= HEAP
    if size == 1:
        _work(0, 1, 0, function, arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        torch.multiprocessing.spawn(_work, (size, port, function, arguments), nprocs=size)
    except torch.multiprocessing.ProcessRaisedException as error:
        last = str(error).rstrip().splitlines()[-1]
        if not last.startswith("ValueError: "):
            raise
        raise ValueError(last.removeprefix("ValueError: ")) from error
