"""Is it run right: ``attend`` and ``neighborhood_attention`` against float64 attention.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

import itertools
from random import Random

import torch
from fuzzing.cases import DTYPES, Case, Wrong
from fuzzing.definitions import triple, window_axis
from fuzzing.inputs import Inputs, make_inputs, score_scale
from fuzzing.oracle import TOLERANCE, Answer, Truth, attention, off_by, read_plan
from fuzzing.plans import make_plan
from fuzzing.quantised import ROUGHNESS, rounded_attention
from fuzzing.second import check_second, is_for
from fuzzing.states import WITHOUT_GRADIENT, within
from torch import Tensor

import vidattn
from vidattn.plan import AnyPlan


def check_attend(case: Case) -> None:
    """The plan says what its mask says, and the engine computes it."""
    inputs = make_inputs(case)
    with within(case.states):
        plan = make_plan(case, inputs)
    truth = read_plan(plan, case.batch, case.heads)
    check_mask(plan, truth)
    check_heads(case, plan, truth)
    if case.precision:
        plan = plan.with_precision(case.precision)
    check_results(case, inputs, plan, truth)


def check_mask(plan: AnyPlan, truth: Truth) -> None:
    """Raise Wrong unless ``plan.mask()`` and its densities are those of its lists."""
    mask, grid = plan.mask(), plan.grid
    if not torch.equal(mask.expand_as(truth.mask), truth.mask):
        raise Wrong("mask() is not what the lists say")
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    text = slice(grid.text_start, grid.text_start + grid.text)
    if not (mask[:, :, text].all() and mask[..., text].all()):
        raise Wrong("text does not read, and is not read by, everything")
    between = truth.mask[..., video, video].double()
    if between.numel() and abs(plan.density - between.mean().item()) > 1e-9:
        raise Wrong("density is not that of the mask", f"{plan.density}, {between.mean()}")
    if not plan.density - 1e-9 <= plan.visited_density <= 1 + 1e-9:
        raise Wrong("visited density is below density", plan.visited_density)


def check_heads(case: Case, plan: AnyPlan, truth: Truth) -> None:
    """Raise Wrong unless the plan of some heads is theirs."""
    heads = sorted(Random(case.seed).sample(range(case.heads), (case.heads + 1) // 2))
    mask = truth.mask.expand(-1, case.heads, -1, -1)[:, heads]
    some = read_plan(plan.select_heads(heads), len(mask), len(heads)).mask
    if not torch.equal(some.expand_as(mask), mask):
        raise Wrong("the plan of some heads is not theirs", heads)


def check_results(case: Case, inputs: Inputs, plan: AnyPlan, truth: Truth) -> None:
    """Raise Wrong unless output, log-sum-exp and gradients are right."""
    options = {"scale": case.scale, "key_mask": inputs.key_mask, "backend": case.engine}
    leaves = [x.detach().requires_grad_(case.gradients) for x in (inputs.q, inputs.k, inputs.v)]
    with within(_for_attention(case)):
        found = vidattn.attend(*leaves, plan, **options, return_lse=case.lse)
    found = dict(zip(("out", "lse"), found)) if case.lse else {"out": found}
    _check_form(case, found)
    inputs, pulls = inputs.cast(DTYPES[case.attended]), None
    if case.gradients:
        pulls = inputs.d_out, inputs.d_lse if case.lse else torch.zeros_like(inputs.d_lse)
        pulled = (found["out"].double() * pulls[0].double()).sum()
        if case.lse:
            lse = found["lse"]
            pulled = pulled + (lse.masked_fill(lse == -torch.inf, 0) * pulls[1]).sum()
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(pulled, leaves)))
    given = (inputs.q, inputs.k, inputs.v, truth, score_scale(case), inputs.key_mask)
    if case.precision:
        answer = rounded_attention(*given, plan, case.precision)
        compare(answer, found, ROUGHNESS[case.precision] + _tolerance(case))
    else:
        compare(attention(*given, pulls), found, _tolerance(case))
        if is_for(case, truth):
            check_second(case, inputs, plan, truth)


def _tolerance(case: Case) -> float:
    """That of the dtype that is computed in, or of the one that gradients are given in."""
    return max(TOLERANCE[DTYPES[case.attended]], TOLERANCE[case.torch_dtype])


def _for_attention(case: Case) -> tuple[str, ...]:
    """The states that attention is computed in; where a gradient is wanted, none without it."""
    if not case.gradients:
        return case.states
    return tuple(x for x in case.states if x not in WITHOUT_GRADIENT)


def compare(answer: Answer, found: dict[str, Tensor], tolerance: float) -> None:
    """Raise Wrong for the first result that is off."""
    for name, actual in found.items():
        if complaint := off_by(name, actual.detach(), answer, tolerance):
            raise Wrong(f"{name} is off", complaint)


def _check_form(case: Case, found: dict[str, Tensor]) -> None:
    if found["out"].dtype != DTYPES[case.attended]:
        raise Wrong("the output has another dtype than q, or autocast", found["out"].dtype)
    if case.lse and found["lse"].dtype != torch.float32:
        raise Wrong("the log-sum-exp is not float32", found["lse"].dtype)


def check_neighborhood(case: Case) -> None:
    """``neighborhood_attention`` on one to three axes, with biases and extra tokens."""
    inputs, axes, grid = make_inputs(case), case.options["axes"], case.grid
    options = {name: x for name, x in case.options.items() if name not in ("axes", "bias")}
    size = case.size[3 - axes :]
    split = slice(grid.num_video_tokens), slice(grid.num_video_tokens, None)
    leaves = [x.detach().requires_grad_(case.gradients) for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (x[:, :, split[0]].unflatten(2, size) for x in leaves)
    beside = {}
    if grid.text:
        beside = {"extra_k": leaves[1][:, :, split[1]], "extra_v": leaves[2][:, :, split[1]]}
    if case.options.get("layout") == "heads_last":
        q, k, v = (x.movedim(1, -2) for x in (q, k, v))
        beside = {name: x.transpose(1, 2) for name, x in beside.items()}
    table = None
    if case.options.get("bias"):
        widths = [2 * x - 1 for x in _per_axis(options["window"], axes)]
        table = torch.randn(case.heads, *widths, generator=torch.Generator().manual_seed(case.seed))
        table = table.to(case.torch_dtype).requires_grad_(case.gradients)
    with within(_for_attention(case)):
        out = vidattn.neighborhood_attention(
            q, k, v, **options, **beside, scale=case.scale, rel_bias=table, backend=case.engine
        )
    if out.shape != q.shape or out.dtype != DTYPES[case.attended]:
        raise Wrong("the output is not of the form of q", f"{out.dtype} {tuple(out.shape)}")
    if case.options.get("layout") == "heads_last":
        out = out.movedim(-2, 1)
    video = {"out": out.flatten(2, -2)}
    _compare_neighborhood(case, inputs, leaves, table, video)


def _compare_neighborhood(case, inputs, leaves, table, found) -> None:
    """Output and gradients of the video's queries; the bias enters the scores of the answer."""
    inputs = inputs.cast(DTYPES[case.attended])
    axes, n = case.options["axes"], case.grid.num_video_tokens
    rule = {name: _per_axis(case.options.get(name, plain), axes) for name, plain in
            (("window", 1), ("stride", 1), ("dilation", 1), ("causal", False))}  # fmt: skip
    tables = [window_axis(*x) for x in zip(case.size[3 - axes :], *rule.values())]
    places = torch.tensor(list(itertools.product(*map(range, case.size[3 - axes :]))))
    mask = torch.ones(n, case.grid.num_tokens, dtype=torch.bool)
    for axis, seen in enumerate(tables):
        mask[:, :n] &= seen[places[:, axis]][:, places[:, axis]]
    bias = exact = None
    if table is not None:
        exact = table.detach().double().requires_grad_()
        away = (places - places[:, None]) // torch.tensor(rule["dilation"])
        index = (away + torch.tensor(rule["window"]) - 1).clamp_min(0)
        index = torch.minimum(index, torch.tensor(exact.shape[1:]) - 1)
        bias = torch.nn.functional.pad(exact[(slice(None), *index.unbind(-1))], (0, case.grid.text))
    truth = Truth(mask[None, None], None, None, None, 1.0)
    q = inputs.q[:, :, :n]
    pulls = None
    if case.gradients:
        pulls = inputs.d_out[:, :, :n], torch.zeros_like(inputs.d_lse[:, :, :n])
        wanted = [*leaves] if table is None else [*leaves, table]
        pulled = (found["out"].double() * pulls[0].double()).sum()
        grads = torch.autograd.grad(pulled, wanted)
        found |= dict(zip(("dq", "dk", "dv", "dbias"), grads))
        found["dq"] = found["dq"][:, :, :n]
    answer = attention(
        q, inputs.k, inputs.v, truth, score_scale(case), None, pulls, bias=bias, table=exact
    )
    compare(answer, found, _tolerance(case))


def _per_axis(value, axes: int) -> tuple:
    return triple(value)[:axes] if not isinstance(value, tuple | list) else tuple(value)
