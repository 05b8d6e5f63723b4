"""Schedules in a pipeline: the method of each layer, head and step, and the report about it."""

import pytest
import torch

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.sparse import WAN, call_at
from tests.pipelines.test_site import Nearest, Rarely
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_pipes import run_wan
from vidattn.methods import create_method
from vidattn.pipelines import site
from vidattn.planning.reading import Reading
from vidattn.schedule import DenseGuard, Model, Rule, Schedule

NEAR, RADIAL = create_method("neighborhood", window=3), create_method("radial", near=0, sink=False)
NO_GUARD = DenseGuard(0, 0)


@torch.no_grad()
def run(schedule, times=(500.0,), key=WAN):
    """What every call attended by, and the report."""
    seen, attend = [], site.attend

    def spy(q, k, v, plan, **options):
        seen.append((q, k, plan))
        return attend(q, k, v, plan, **options)

    model = build(key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "attend", spy)
        with vidattn.patch(model, schedule=schedule) as handle:
            call_at(handle, key, model, times)
            return seen, handle.report()


def test_layers_heads_and_steps_follow_their_rules():
    rules = (
        Rule(RADIAL, layers=(1,), heads=(1,), steps=(1, None)),
        Rule(NEAR, layers=(0,), steps=(0, 2)),
        Rule(NEAR, layers=(1,)),
    )
    seen, report = run(Schedule(rules, NO_GUARD), times=(900.0, 600.0, 300.0))
    grid = vidattn.Grid(3, 5, 7)
    near, radial = NEAR.plan(grid).mask()[0, 0], RADIAL.plan(grid).mask()[0, 0]
    assert not torch.equal(near, radial)
    # layer 0 is not sparse at the third step
    masks = [plan.mask().expand(-1, 2, -1, -1)[0] for _, _, plan in seen]
    expected = [(near, near), (near, near), (near, near), (near, radial), (near, radial)]
    assert len(masks) == 5
    for mask, heads in zip(masks, expected):
        assert torch.equal(mask, torch.stack(heads))
    first, second = report.layers
    assert first.methods == {"neighborhood:window=3": 2} and first.num_dense == {"dense method": 1}
    mixed = "radial:near=0,sink=false on head 1; neighborhood:window=3 on head 0"
    assert second.methods == {"neighborhood:window=3": 1, mixed: 2}
    densities = [plan.density for _, _, plan in seen[1::2]][:1] + [seen[3][2].density] * 2
    assert second.density == pytest.approx(sum(densities) / 3)
    # the table breaks it where it is too long for the line
    assert "on head 0" in str(report) and mixed in report._repr_html_()


def test_content_is_read_of_the_heads_that_follow():
    schedule = Schedule((Rule(Rarely(), heads=(1,)), Rule(NEAR)), NO_GUARD)
    Rarely.searches.clear()
    seen, _ = run(schedule, times=(900.0, 600.0))
    # two layers search in each of two samples at the first step, and keep their plan at the second
    assert Rarely.searches == [(0, 1), (0, 1), (1, 1), (1, 1)]
    q, k, plan = seen[0]
    grid = plan.grid
    assert torch.equal(plan.mask()[:, 1:], Nearest().plan(grid, Reading(q[:, 1:], k[:, 1:])).mask())
    assert torch.equal(plan.mask()[0, 0], NEAR.plan(grid).mask()[0, 0])


@pytest.mark.parametrize(
    "key", [WAN, "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel"]
)
def test_a_schedule_of_one_method_is_the_method(key):
    model, case = build(key), TINY[key]
    with torch.no_grad():
        with vidattn.patch(model, NEAR, dense_layers=1):
            expected = case.call(model)
        with vidattn.patch(model, schedule=Schedule((Rule(NEAR),), DenseGuard(1, 0))):
            assert torch.equal(case.call(model), expected)
        halves = Schedule((Rule(NEAR, heads=(0,)), Rule(NEAR, heads=(1,))), DenseGuard(1, 0))
        with vidattn.patch(model, schedule=halves):
            assert torch.equal(case.call(model), expected)


def test_fractions_of_steps_and_experts(tmp_path):
    path = tmp_path / "experts.yaml"
    path.write_text(
        "dense_layers: 0\n"
        "rules:\n"
        "- {method: neighborhood, options: {window: 3}, transformer: transformer_2}\n"
        "- {method: radial, steps: [0.25, 1.0], layers: 1}\n"
    )
    pipe = tiny_pipes.wan(two_experts=True)
    before = run_wan(pipe)
    with vidattn.patch(pipe, schedule=path) as handle:
        assert not torch.equal(run_wan(pipe), before)
        calls = {layer.name: layer for layer in handle.report().layers}
    # four steps, two passes each, two of the steps with each expert
    assert calls["transformer.blocks.0.attn1"].num_dense == {"dense method": 4}
    assert calls["transformer.blocks.1.attn1"].methods == {"radial": 2}
    assert calls["transformer_2.blocks.1.attn1"].methods == {"neighborhood:window=3": 4}
    assert torch.equal(run_wan(pipe), before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "a method or a schedule, got neither"),
        (
            {"method": "radial", "schedule": "wan2.1-14b"},
            "a method or a schedule, got method='radial'",
        ),
        ({"schedule": "wan2.1-14b", "density": 0.3}, r"the options \['density'\] belong"),
        ({"schedule": "wan2.1-15b"}, "did you mean 'wan2.1-14b'"),
        ({"schedule": Schedule((Rule(NEAR, layers=(2,)),))}, "names layer 2, the model has 2"),
        ({"schedule": Schedule((Rule(NEAR, heads=(2,)),))}, "names head 2, the model has 2"),
        ({"schedule": Schedule((Rule(NEAR),), model=Model("Other"))}, "for another model"),
    ],
)
def test_bad_schedules_change_nothing(given, words):
    model = build(WAN)
    with torch.no_grad():
        before = TINY[WAN].call(model)
        with pytest.raises(ValueError, match=words):
            vidattn.patch(model, **given)
        assert torch.equal(TINY[WAN].call(model), before)
    vidattn.patch(model, NEAR).remove()
