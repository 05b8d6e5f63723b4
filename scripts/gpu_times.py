"""What scripts/bench_gpu.py times: whole calls at the sizes of video models, and what peers take.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.kernels import flash
from vidattn.kernels.timing import interleaved_ms
from vidattn.methods import plan as plan_of
from vidattn.neighborhood import neighborhood_attention

DENSE = {"dense flash": SDPBackend.FLASH_ATTENTION, "dense cudnn": SDPBackend.CUDNN_ATTENTION}
DENSITIES = (0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Case:
    """One method at one size; everything that runs it is timed in turns."""

    model: str
    grid: Grid
    heads: int
    method: str
    options: dict = field(default_factory=dict)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Of the row."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.model}, {self.method}:{options}".rstrip(":")


# Wan 2.1 14B and HunyuanVideo at 720p
WAN = ("wan2.1-14b", Grid(21, 45, 80), 40)
HUNYUAN = ("hunyuan-video", Grid(33, 45, 80), 24)
# The windows of generalized neighborhood attention (Hassani et al., 2504.16922) for HunyuanVideo
# and FLUX.1-dev at 4K, with the strides that make them block-sparse, as docs/profiler.md of NATTEN
# 0.21.7 gives them; and the local windows of the sparse Cosmos-Predict2 14B at 720p and 16 frames a
# second, all frames by 12x24 and by 20x40, from cosmos_predict2/configs/base/config_natten.py
WINDOWS = (
    ("gna hunyuan-video", Grid(30, 48, 80), 24, (18, 24, 24), (16, 8, 8)),
    ("gna flux", Grid(1, 256, 256), 24, (1, 80, 80), (1, 16, 16)),
    ("cosmos-predict2-14b", Grid(24, 44, 80), 40, (24, 12, 24), (1, 4, 8)),
    ("cosmos-predict2-14b", Grid(24, 44, 80), 40, (24, 20, 40), (1, 4, 8)),
)


def cases(device: str, *, quick: bool) -> list[Case]:
    """The rows of the table; on a CPU one tiny row, to try the program."""
    if device == "cpu":
        small = {"heads": 2, "head_dim": 32, "dtype": torch.float32}
        window = {"window": (3, 5, 5), "stride": (1, 1, 1)}
        return [Case("tiny", Grid(3, 8, 8), method="neighborhood", options=window, **small)]
    if quick:
        return [Case("wan2.1 480p", Grid(21, 30, 52), 12, "radial", {"density": 0.2})]
    rows = [Case(*WAN, "dense")]
    rows += [Case(*m, "radial", {"density": x}) for m in (WAN, HUNYUAN) for x in DENSITIES]
    for model, grid, heads, window, stride in WINDOWS:
        rows.append(Case(model, grid, heads, "neighborhood", {"window": window, "stride": stride}))
    return rows


def measure(case: Case, device: str, rounds: int) -> dict:
    """One row: densities, times in ms, ratios, and why what is missing does not run."""
    plan = plan_of(case.method, case.grid, **case.options).to(device)
    shape = (1, case.heads, case.grid.num_tokens, case.head_dim)
    given = [torch.randn(shape, device=device).to(case.dtype) for _ in range(4)]
    calls = _dense_calls(given, device) | _sparse_calls(plan, given, device)
    if case.method == "neighborhood":
        calls |= _window_calls(case, given)
    calls, failures = _working(calls)
    times = interleaved_ms(calls, rounds=rounds)
    row = {"density": plan.density, "visited": plan.visited_density, "block": plan.layout.block}
    return row | {"ms": times, "ratios": _ratios(times, plan.visited_density), "left out": failures}


def _dense_calls(given: list[Tensor], device: str) -> dict[str, Callable]:
    """Attention of PyTorch, forward, and forward and backward."""
    calls = {}
    for name, kernel in ({"dense": None} if device == "cpu" else DENSE).items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel=kernel) -> Tensor:
            if kernel is None:
                return F.scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        calls[name] = _forward(attention, given)
        calls[f"train {name}"] = _train(attention, given)
    return calls


def _sparse_calls(plan, given: list[Tensor], device: str) -> dict[str, Callable]:
    """The engines on one plan."""
    own = "triton" if device == "cuda" else "torch"
    engines = [own, "flex"] if device == "cuda" else [own]
    if flash.obstacle(device) is None:
        engines.append("flash")
    calls = {}
    for engine in engines:

        def attention(q: Tensor, k: Tensor, v: Tensor, engine=engine) -> Tensor:
            return attend(q, k, v, plan, backend=engine)

        calls[engine] = _forward(attention, given)
        if device == "cuda":
            calls[f"train {engine}"] = _train(attention, given)
    for precision in ("int8_qk", "int8"):
        rounded = plan.with_precision(precision)

        def attention(q: Tensor, k: Tensor, v: Tensor, rounded=rounded) -> Tensor:
            return attend(q, k, v, rounded, backend=own)

        calls[precision] = _forward(attention, given)
    return calls


def _window_calls(case: Case, given: list[Tensor]) -> dict[str, Callable]:
    """The window without a plan of the caller's, and NATTEN's."""
    kept = [axis for axis, extent in enumerate(case.grid.size) if extent > 1]
    size = [case.grid.size[axis] for axis in kept]
    window, stride = (
        tuple(case.options[name][axis] for axis in kept) for name in ("window", "stride")
    )
    places = [x.unflatten(2, size) for x in given]
    calls = {
        "neighborhood": _forward(
            lambda q, k, v: neighborhood_attention(q, k, v, window, stride), places
        )
    }
    if importlib.util.find_spec("natten") is not None:
        natten = importlib.import_module("natten")

        attention = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(size)]
        # heads stand last there
        last = [x.movedim(1, -2).contiguous() for x in places]
        calls["natten"] = _forward(
            lambda q, k, v: attention(q, k, v, kernel_size=window, stride=stride), last
        )
    return calls


def _forward(attention: Callable, given: list[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return attention(*given[:3])

    return call


def _train(attention: Callable, given: list[Tensor]) -> Callable[[], object]:
    def call() -> object:
        leaves = [x.detach().requires_grad_() for x in given[:3]]
        return torch.autograd.grad(attention(*leaves), leaves, given[3])

    return call


def _working(calls: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
    """The calls that run, and what the others say."""
    running, failures = {}, {}
    for name, call in calls.items():
        # whatever a peer, a compiler or the memory of this GPU objects to: the rest is timed
        try:
            call()
            running[name] = call
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return running, failures


def _ratios(times: dict[str, float], visited: float) -> dict[str, dict[str, float]]:
    """Of each call to the fastest dense attention: speed-up, and share of what is possible."""
    ratios = {}
    for name, ms in times.items():
        pass_ = "train " if name.startswith("train ") else ""
        dense = [other for key, other in times.items() if key.startswith(f"{pass_}dense")]
        if dense and "dense" not in name:
            speedup = min(dense) / ms
            ratios[name] = {"speedup": speedup, "share": speedup * visited}
    return ratios
