"""The schedules for published models: planned on the true grids, run on small transformers."""

import dataclasses

import pytest
import torch

import vidattn
from tests.pipelines.tiny import TINY, build
from vidattn.methods.radial import Radial
from vidattn.schedule_file import PRESETS, list_presets, load_schedule
from vidattn.simulation.video_models import find_video_model, list_video_models
from vidattn.support.resources import resource

PUBLISHED = {
    "wan2.1-1.3b",
    "wan2.1-14b",
    "wan2.2-a14b",
    "wan2.2-5b",
    "hunyuanvideo",
    "hunyuanvideo-1.5",
    "cogvideox-5b",
    "ltx-video",
    "ltx-2",
    "mochi-1",
}


def test_every_published_model_has_one():
    assert PUBLISHED <= set(list_presets()) and PUBLISHED <= set(list_video_models())


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_names_its_source(name):
    text = resource(f"{PRESETS}/{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ") and "settings" in text or " at " in text


@pytest.mark.parametrize("name", list_presets())
def test_it_serves_the_true_grid(name):
    schedule, model = load_schedule(name), find_video_model(name)
    grid = model.grid(*model.size)
    for rule in schedule.rules:
        # what reads content is planned on the small model
        if not rule.method.reads_content:
            plan = rule.method.plan(grid)
            assert 0.15 < plan.density < 0.55 and plan.visited_density < 0.6
            assert plan.layout.tokens_per_block.sum() == grid.num_tokens


@pytest.mark.parametrize("name", list_presets())
@torch.no_grad()
def test_it_runs_on_the_architecture(name):
    schedule = load_schedule(name)
    key = schedule.model.transformer
    model, case = build(key), TINY[key]
    dense = case.call(model)
    # a small model needs small tiles, and has no number of steps
    rules = (
        dataclasses.replace(rule, method=dataclasses.replace(rule.method, tile=(1, 2, 2)))
        for rule in schedule.rules
    )
    schedule = dataclasses.replace(schedule, rules=tuple(rules)).with_guard(None, 0)
    with vidattn.patch(model, schedule=schedule) as handle:
        sparse = case.call(model)
        layers = handle.report().layers
    guarded = schedule.guard.num_layers(len(layers))
    assert [layer.num_sparse > 0 for layer in layers] == [i >= guarded for i in range(len(layers))]
    assert torch.isfinite(sparse).all()
    assert torch.equal(sparse, dense) == (guarded == len(layers))
    assert torch.equal(case.call(model), dense)


def test_published_densities_are_met():
    """Radial Attention counts 0.287 and 0.278 on the grids its scripts run."""
    wan, hunyuan = (load_schedule(name).rules[0].method for name in ("wan2.1-14b", "hunyuanvideo"))
    assert isinstance(wan, Radial) and isinstance(hunyuan, Radial)
    assert wan.plan(vidattn.Grid(18, 48, 80)).density == pytest.approx(0.287, rel=0.1)
    assert hunyuan.plan(vidattn.Grid(30, 48, 80)).density == pytest.approx(0.278, rel=0.1)
