"""Schedules as YAML files."""

import pytest

from vidattn.methods import create_method
from vidattn.schedule import DenseGuard, Model, Rule, Schedule
from vidattn.schedule_file import load_schedule, save_schedule

TEXT = """
model: {transformer: WanTransformer3DModel, layers: 30}
dense_layers: 2
dense_steps: 0.25
rules:
- layers: 4-7, 9
  heads: [0, 2-3]
  steps: [0.25, null]
  method: neighborhood
  options: {window: [5, 9, 9], causal: false}
- {method: radial, options: {density: 0.25}, transformer: transformer_2}
"""


def write(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path):
    path = write(tmp_path, TEXT)
    assert load_schedule(path) == Schedule(
        (
            Rule(
                create_method("neighborhood", window=(5, 9, 9)),
                layers=(4, 5, 6, 7, 9),
                heads=(0, 2, 3),
                steps=(0.25, None),
            ),
            Rule(create_method("radial", density=0.25), transformer="transformer_2"),
        ),
        DenseGuard(2, 0.25),
        Model("WanTransformer3DModel", 30),
        f"schedule '{path}'",
    )


def test_what_is_saved_is_read_back(tmp_path):
    schedule = load_schedule(write(tmp_path, TEXT))
    path = tmp_path / "b.yml"
    save_schedule(schedule, path, "Made by hand.\nTwice.")
    assert path.read_text().startswith("# Made by hand.\n# Twice.\nmodel:")
    assert load_schedule(path) == Schedule(
        schedule.rules, schedule.guard, schedule.model, f"schedule '{path}'"
    )
    assert "layers: 4-7, 9" in path.read_text().replace("'", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rule: []", "unknown key of schedule .* 'rule': did you mean 'rules'"),
        ("dense_layers: 1", "lacks 'rules'"),
        ("rules: []", "has no rules"),
        ("rules: [{methd: radial}]", "key of rule 1 of schedule .* 'methd': did you mean 'method'"),
        ("rules: [{method: radail}]", "unknown method 'radail': did you mean 'radial'"),
        (
            "rules: [{method: dense}, {method: radial, options: {densty: 1}}]",
            "key of method 'radial' in rule 2 of schedule .* 'densty': did you mean 'density'",
        ),
        ("rules: [{method: radial, options: {density: 3}}]", "density must be above 0"),
        ("rules: [{method: radial, options: {density: lots}}]", "must be a number or none"),
        ("rules: [{method: radial, layers: 7-4}]", "layers of rule 1 .* got '7-4'"),
        ("rules: [{method: radial, heads: [first]}]", "heads of rule 1 .* must be numbers"),
        ("rules: [{method: radial, steps: [5, 2]}]", "rule 1 .*: steps must end after"),
        ("rules: [{method: radial}]\ndense_steps: 1.5", "dense_steps must be a count"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        load_schedule(write(tmp_path, text))


def test_unknown_presets_list_near_ones(tmp_path):
    with pytest.raises(
        ValueError, match="preset or .yaml file 'wan2.1-14': did you mean 'wan2.1-14b'"
    ):
        load_schedule("wan2.1-14")
    with pytest.raises(ValueError, match="none.yaml' cannot be read"):
        load_schedule(tmp_path / "none.yaml")
