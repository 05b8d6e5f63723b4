"""Which method serves which heads, against a loop over the rules."""

import random

import pytest

from vidattn.methods import create_method
from vidattn.methods.dense import Dense
from vidattn.schedule import DenseGuard, Model, Rule, Schedule, show_numbers

RADIAL, NEAR = create_method("radial"), create_method("neighborhood", window=3)


def methods(schedule, *at, num_heads=4):
    """The method of every head."""
    found = {}
    for part in schedule.parts(*at, num_heads=num_heads):
        heads = range(num_heads) if part.heads is None else part.heads
        assert not found.keys() & set(heads)
        found |= {head: part.method for head in heads}
    return [found[head] for head in range(num_heads)]


def oracle(rules, transformer, layer, step, num_steps, head):
    """The method of one head, by reading the rules from the top."""
    for rule in rules:
        first, end = rule.steps or (0, None)
        first = first if isinstance(first, int) else -int(-first * num_steps // 1)
        end = end if end is None or isinstance(end, int) else -int(-end * num_steps // 1)
        if (
            (rule.transformer in (None, transformer))
            and (rule.layers is None or layer in rule.layers)
            and (rule.heads is None or head in rule.heads)
            and first <= step
            and (end is None or step < end)
        ):
            return rule.method
    return Dense()


def test_the_first_rule_that_covers_a_head_holds():
    pick = random.Random(0)
    methods_of_rules = [RADIAL, NEAR, Dense(), create_method("radial", density=0.5)]
    sparse = mixed = 0
    for _ in range(200):
        rules = tuple(
            Rule(
                pick.choice(methods_of_rules),
                layers=pick.choice([None, (0, 2), (1,)]),
                heads=pick.choice([None, (0, 3), (1, 2), (2,)]),
                steps=pick.choice([None, (2, None), (0, 0.25), (0.5, 1.0)]),
                transformer=pick.choice([None, None, "transformer_2"]),
            )
            for _ in range(4)
        )
        schedule = Schedule(rules)
        for at in (("transformer", 0, 0, 8), ("transformer_2", 1, 3, 8), ("transformer", 2, 4, 8)):
            expected = [oracle(rules, *at, head) for head in range(4)]
            assert methods(schedule, *at) == expected
            assert len(schedule.parts(*at, num_heads=4)) == len(set(expected))
            is_sparse = any(method != Dense() for method in expected)
            assert schedule.is_sparse_at(*at) or not is_sparse
            sparse, mixed = sparse + is_sparse, mixed + (len(set(expected)) > 1)
    assert sparse > 100 and mixed > 100


def test_methods_are_asked_for_their_layer():
    class ByLayer(type(NEAR)):
        def at(self, layer):
            return create_method("neighborhood", window=layer + 1)

    assert methods(Schedule((Rule(ByLayer()),)), "transformer", 4)[0].window == 5


def test_what_needs_the_number_of_steps():
    assert not Schedule((Rule(NEAR, steps=(0, 5)),)).needs_num_steps
    assert not Schedule((Rule(NEAR, steps=(0.0, None)),), DenseGuard(steps=0.0)).needs_num_steps
    assert Schedule((Rule(NEAR, steps=(0, 0.5)),)).needs_num_steps
    assert Schedule((Rule(NEAR),), DenseGuard(steps=1.0)).needs_num_steps


def test_guards_given_beside_a_schedule_win():
    schedule = Schedule((Rule(NEAR),), DenseGuard(2, 0.3))
    assert schedule.with_guard(None, None) == schedule
    assert schedule.with_guard(0, None).guard == DenseGuard(0, 0.3)
    assert schedule.with_guard(None, 5).guard == DenseGuard(2, 5)


def test_labels():
    parts = Schedule((Rule(NEAR, heads=(0, 1, 3)), Rule(RADIAL))).parts("x", 0, num_heads=4)
    assert [part.label for part in parts] == [
        "neighborhood:window=3 on heads 0-1, 3",
        "radial on head 2",
    ]
    assert show_numbers([9, 0, 1, 2, 4, 5]) == "0-2, 4-5, 9"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"layers": ()}, "layers must be numbers from 0 on"),
        ({"heads": (-1,)}, "heads must be numbers from 0 on"),
        ({"steps": (3, 3)}, "steps must end after they begin"),
        ({"steps": (0.5, 0.2)}, "steps must end after they begin"),
        ({"steps": (0, 1.5)}, "the end of steps must be a count"),
    ],
)
def test_rules_that_cover_nothing(rule, words):
    with pytest.raises(ValueError, match=words):
        Rule(NEAR, **rule)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            Schedule((Rule(NEAR, layers=(0, 3)),)),
            "rule 1 of schedule names layer 3, the model has 3",
        ),
        (Schedule((Rule(RADIAL), Rule(NEAR, heads=(2,)))), "rule 2 of schedule names head 2"),
        (Schedule((Rule(NEAR, transformer="transformer_3"),)), "did you mean 'transformer"),
        (
            Schedule((Rule(NEAR),), model=Model("Mochi")),
            "made for transformer Mochi, and the .*Wan",
        ),
        (
            Schedule((Rule(NEAR),), model=Model("Wan", 5)),
            "made for layers 5, and the transformer here",
        ),
        (Schedule((Rule(NEAR),), model=Model("Wan", 3, 4)), "made for heads 4"),
    ],
)
def test_schedules_of_another_model(schedule, words):
    with pytest.raises(ValueError, match=words):
        schedule.check({"transformer": Model("Wan", 3, 2), "transformer_2": Model("Wan", 3, 2)})


def test_schedules_that_fit():
    models = {"transformer": Model("Wan", 3, None)}
    Schedule((Rule(NEAR, layers=(2,), heads=(99,)),), model=Model("Wan", 3)).check(models)
    Schedule((Rule(NEAR, transformer="transformer"),)).check(models)
