"""Which attention a model is trained with at a noise level and at a step of the run."""

import pytest
import torch
from video_training import attention as attentions

from tests.pipelines.tiny import TINY, build
from tests.scripts import video_cases as cases
from vidattn.methods import create_method
from vidattn.pipelines.patch import find_handle
from vidattn.schedule_file import load_schedule

Attention, Ramp, Sparse = cases.settings.Attention, cases.settings.Ramp, attentions.Sparse
ALL = {"transformer": (0.0, 1.0)}
RADIAL = {"method": "radial", "options": {"density": 0.25}}


def shown(spans):
    """Ranges of noise with the first methods of their rules."""
    return [
        (round(s.low, 4), round(s.high, 4), s.expert, s.schedule and s.schedule.rules[0].method)
        for s in spans
    ]


def test_the_first_steps_of_a_sampler_are_the_noisiest_levels():
    radial = create_method("radial", density=0.25)
    spans = Sparse(Attention(**RADIAL, dense_steps=0.2)).spans(ALL, 0)
    assert shown(spans) == [(0, 0.8, "transformer", radial), (0.8, 1, "transformer", None)]
    assert spans[0].schedule.guard == attentions.DenseGuard(1, 0)
    counted = Sparse(Attention(**RADIAL, dense_steps=10, sampler_steps=50)).spans(ALL, 0)
    assert counted == spans
    # as a pipeline is patched
    assert [s.low for s in Sparse(Attention(**RADIAL)).spans(ALL, 0)] == [0, 0.9]
    none = Sparse(Attention(**RADIAL, dense_steps=0, dense_layers=3)).spans(ALL, 0)
    assert shown(none) == [(0, 1, "transformer", radial)]
    assert none[0].schedule.guard.layers == 3


def test_rules_hold_where_a_sampler_would_follow_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "dense_layers: 0\n"
        "rules:\n"
        "- {method: radial, steps: [0.5, null], transformer: transformer_2}\n"
        "- {method: neighborhood, steps: [10, 0.8]}\n"
    )
    sparse = Sparse(Attention(schedule=str(path), sampler_steps=100))
    experts = {"transformer": (0.6, 1.0), "transformer_2": (0.0, 0.6)}
    near, radial = (create_method(x) for x in ("neighborhood", "radial"))
    # a share of the steps behind it is 1 minus the level
    assert shown(sparse.spans(experts, 0)) == [
        (0.6, 0.9, "transformer", near),
        (0.9, 1.0, "transformer", None),
        (0.0, 0.2, "transformer_2", radial),
        (0.2, 0.5, "transformer_2", radial),
        (0.5, 0.6, "transformer_2", near),
    ]
    # the rules agree with those of the schedule itself, at every step of such a sampler
    schedule = load_schedule(path)
    for step in range(100):
        level = 1 - (step + 0.5) / 100
        spans = sparse.spans(experts, 0)
        (span,) = [s for s in spans if s.low <= level < s.high]
        wanted = schedule.parts(span.expert, 4, step, 100, num_heads=2)
        found = span.schedule and span.schedule.parts("transformer", 4, num_heads=2)
        dense = (attentions.Dense(),)
        assert [p.method for p in found or ()] == [
            p.method for p in wanted if (p.method,) != dense
        ], step


def test_the_density_falls_in_even_stages():
    ramp = Ramp(start=1.0, steps=100, every=25)
    sparse = Sparse(Attention(**RADIAL, dense_steps=0, ramp=ramp))
    found = []
    for step in (0, 24, 25, 50, 75, 99, 100, 5000):
        schedule = sparse.spans(ALL, step)[0].schedule
        found.append(schedule.rules[0].method.density if schedule else 1.0)
    assert found == [1.0, 1.0, 0.8125, 0.625, 0.4375, 0.4375, 0.25, 0.25]


def test_a_ramp_needs_a_density():
    near = Attention(method="neighborhood", ramp=Ramp())
    with pytest.raises(ValueError, match="attention.ramp needs methods with a density, neighbor"):
        Sparse(near)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "takes a method or a schedule, got method=None and schedule=None"),
        ({"method": "radial", "schedule": "wan2.1-1.3b"}, "takes a method or a schedule"),
        ({"schedule": "wan2.1-1.3b", "options": {"density": 1}}, "options belong to a method"),
        ({"method": "radial", "options": {"densty": 1}}, "densty"),
        ({"method": "radiall"}, "did you mean 'radial'"),
        ({"method": "radial", "dense_steps": 1.5}, "dense_steps must be a count"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=message):
        Sparse(Attention(**given))


def test_a_model_is_patched_when_the_attention_changes_and_only_then(monkeypatch):
    model, case = build("WanTransformer3DModel"), TINY["WanTransformer3DModel"]
    before = case.call(model)
    sparse = Sparse(Attention(method="neighborhood", options={"window": 3}, dense_steps=0.5))
    dense, held = (span.schedule for span in reversed(sparse.spans(ALL, 0)))
    sparse.apply(model, held)
    handle = find_handle(model)
    assert not torch.equal(case.call(model), before)
    sparse.apply(model, held)
    assert find_handle(model) is handle
    sparse.apply(model, dense)
    assert find_handle(model) is None and torch.equal(case.call(model), before)
    sparse.apply(model, held)
    sparse.remove()
    assert find_handle(model) is None
    sparse.remove()


def test_sizes_that_a_method_cannot_serve_are_found_before_training():
    sparse = Sparse(Attention(method="radial", options={"density": 0.25, "near": 1}))
    sparse.check({"pictures": (1, 8, 8), "long clips": (21, 30, 52)})
    with pytest.raises(ValueError, match="short clips: radial cannot go down to density 0.25"):
        sparse.check({"long clips": (21, 30, 52), "short clips": (3, 8, 8)})


def test_the_text_of_a_schedule_is_its_file(tmp_path):
    schedule = load_schedule("wan2.2-a14b")
    path = tmp_path / "again.yaml"
    path.write_text(attentions.schedule_text(schedule))
    again = load_schedule(path)
    assert (again.rules, again.guard, again.model) == (
        schedule.rules,
        schedule.guard,
        schedule.model,
    )
