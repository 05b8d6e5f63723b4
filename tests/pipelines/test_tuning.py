"""What candidates lose, against dense masked attention, and the schedule that mixes them."""

import pytest
import torch

import vidattn
from tests.pipelines.sparse import WAN
from tests.pipelines.test_site import Nearest
from tests.pipelines.tiny import TINY, build
from vidattn.grid import Grid
from vidattn.kernels.engines import reference
from vidattn.methods import create_method
from vidattn.methods.dense import Dense
from vidattn.pipelines import site
from vidattn.pipelines.tuning import Probe, candidates_at
from vidattn.planning.reading import Reading
from vidattn.schedule import DenseGuard, Model

NEAR, FAR = create_method("neighborhood", window=3), create_method("neighborhood", window=(1, 5, 7))
FIXED = {NEAR: ["window"], FAR: ["window"], Nearest(): []}
NO_GUARD = DenseGuard(0, 0)


@torch.no_grad()
def run(probe, key=WAN, times=(500.0,)):
    """What the layers attended to, and what the probe says about it."""
    seen, attend = [], site.Site.attend

    def spy(self, layer, q, k, v, *rest):
        seen.append((layer.index, q, k, v))
        return attend(self, layer, q, k, v, *rest)

    model, case = build(key), TINY[key]
    before = case.call(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.Site, "attend", spy)
        with probe.watching(model):
            outs = [case.call(model, timestep=torch.full((2,), time)) for time in times]
    if times == (500.0,):
        assert torch.equal(outs[0], before), "looking on changed the output"
    assert torch.equal(case.call(model), before)
    return seen, probe.finish()


def test_losses_are_those_of_masked_attention():
    seen, losses = run(Probe(FIXED, (), NO_GUARD, {0}))
    assert losses.candidates == (NEAR, FAR, Nearest(), Dense())
    assert losses.layers == (("transformer", 0), ("transformer", 1))
    assert losses.models == {"transformer": Model(WAN, 2, 2)} and not losses.refusals
    grid = Grid(3, 5, 7)
    for layer, q, k, v in seen:
        exact = [x.double() for x in (q, k, v)]
        scale = q.shape[-1] ** -0.5
        dense, _ = reference.masked_attention(*exact, torch.ones(1, 1, 105, 105).bool(), scale)
        weights = (scale * exact[0] @ exact[1].mT).softmax(-1)
        for number, method in enumerate(losses.candidates):
            plan = method.plan(grid, Reading(q, k))
            out, _ = reference.masked_attention(*exact, plan.mask().expand(2, 2, -1, -1), scale)
            error = (out - dense).square().sum((0, 2, 3)) / dense.square().sum()
            recall = (weights * plan.mask()).sum(-1).mean((0, 2))
            torch.testing.assert_close(
                losses.errors[number, layer], error, rtol=1e-3, atol=1e-9, check_dtype=False
            )
            torch.testing.assert_close(
                losses.recalls[number, layer], recall, rtol=1e-4, atol=1e-6, check_dtype=False
            )
            densities = [plan.select_heads((head,)).density for head in range(2)]
            assert losses.densities[number, layer].tolist() == pytest.approx(densities)


def test_heads_are_tried_on_their_own_unless_that_is_asked_for():
    shared = create_method("adaspa", recall=0.5)
    alone = [create_method("adaspa", recall=None, density=x) for x in (0.2, 0.4)]
    grid = Grid(3, 5, 7)
    assert candidates_at({shared: []}, (0.2, 0.4), grid) == alone
    kept = candidates_at({shared: ["recall"]}, (0.2, 0.4), grid)
    assert [(x.recall, x.density) for x in kept] == [(0.5, 0.2), (0.5, 0.4)]


def test_guards_and_steps_are_left_out():
    _, losses = run(Probe({NEAR: []}, (), DenseGuard(1, 0), {1}), times=(900.0, 600.0))
    assert losses.layers == (("transformer", 1),)
    with pytest.raises(ValueError, match="no layer attended .* leave nothing sparse"):
        run(Probe({NEAR: []}, (), DenseGuard(2, 0), {0}))


def test_a_mix_is_written_as_a_schedule():
    _, losses = run(Probe(FIXED, (), NO_GUARD, {0}))
    choice = torch.tensor([[0, 1], [3, 0]])
    schedule = losses.schedule(choice, DenseGuard(0, 3))
    found = {
        (layer, head): part.method
        for layer in range(2)
        for part in schedule.parts("transformer", layer, num_heads=2)
        for head in (part.heads or range(2))
    }
    assert found == {(0, 0): NEAR, (0, 1): FAR, (1, 0): Dense(), (1, 1): NEAR}
    assert schedule.guard == DenseGuard(0, 3) and schedule.model == Model(WAN, 2, 2)
    same = losses.schedule(torch.full((2, 2), 1), NO_GUARD)
    assert len(same.rules) == 1 and same.rules[0].heads is None and same.rules[0].layers == (0, 1)


@torch.no_grad()
def test_a_mix_errs_less_than_any_one_method_of_its_density():
    densities = (0.2, 0.3, 0.5, 0.7)
    methods = {create_method("topk"): [], create_method("neighborhood"): [], Nearest(): []}
    _, losses = run(Probe(methods, densities, NO_GUARD, {0}))
    for budget in (0.3, 0.5):
        choice = losses.choose(budget)
        assert losses.mean(losses.densities, choice) <= budget + 1e-6
        mixed = losses.mean(losses.errors, choice)
        for number in range(len(losses.candidates)):
            if losses.densities[number].mean() <= budget:
                assert mixed <= losses.errors[number].mean() + 1e-12
    # and the model that follows it gives what the choice says
    model, case = build(WAN), TINY[WAN]
    with vidattn.patch(model, schedule=losses.schedule(choice, NO_GUARD)) as handle:
        case.call(model)
    mean = sum(layer.density or 1.0 for layer in handle.report().layers) / 2
    assert mean == pytest.approx(losses.mean(losses.densities, choice), abs=0.05)


def test_methods_that_cannot_plan_are_left_out_with_their_reason():
    radial = create_method("radial", density=0.01, near=0)
    _, losses = run(Probe({radial: ["density"], NEAR: []}, (), NO_GUARD, {0}))
    assert losses.candidates == (NEAR, Dense())
    assert "cannot go down to density 0.01" in losses.refusals["radial:density=0.01,near=0"]


def test_text_and_padding_are_as_in_the_model():
    probe = Probe({NEAR: []}, (), NO_GUARD, {0})
    _, losses = run(probe, "HunyuanVideo15Transformer3DModel")
    dense = losses.candidates.index(Dense())
    assert losses.errors[dense].abs().max() < 1e-9
    torch.testing.assert_close(losses.recalls[dense], torch.ones_like(losses.recalls[dense]))


def test_densities_are_those_asked_for():
    grid = Grid(9, 16, 16)
    topk, near = create_method("topk"), create_method("neighborhood", stride=2)
    found = candidates_at({topk: [], near: [], Dense(): []}, (0.2, 0.4), grid)
    assert found[:2] == [create_method("topk", density=x) for x in (0.2, 0.4)]
    assert [x.plan(grid).density for x in found[2:4]] == pytest.approx([0.2, 0.4], rel=0.25)
    assert found[4:] == [Dense()]
    fixed = create_method("topk", density=0.3)
    assert candidates_at({fixed: ["density"]}, (0.2, 0.4), grid) == [fixed]
