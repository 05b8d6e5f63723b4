"""The fuzzer finds nothing in a fixed run, and finds what is broken on purpose."""

import importlib
import math
import re
import sys
from dataclasses import replace

import fuzz as program
import pytest
import torch
from fuzzing import cases, drawing
from fuzzing import run as runs

from vidattn.engines import ENGINES
from vidattn.grid import Grid
from vidattn.kernels import library
from vidattn.methods import list_methods, neighborhood, topk
from vidattn.planning.content import Content

# all of them before anything is broken: some take functions from others
METHODS = {name: importlib.import_module(f"vidattn.methods.{name}") for name in list_methods()}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def find(*only: str, cases: int = 60, engines=drawing.ENGINES) -> str:
    """The first complaint of a short run; nothing where it has none."""
    run = runs.Run(3, only, engines, say=lambda text: None, shrink_seconds=0.0)
    run.go(cases=cases, failures=1)
    assert run.failures or run.tally.tried.total() == cases
    return "".join(failure.complaint for failure in run.failures)


def test_a_fixed_run_finds_nothing():
    # but for what loads the compiler
    kinds = [kind for kind in drawing.KINDS if kind != "compile"]
    assert find(*kinds, cases=120) == ""


def test_a_case_is_the_same_every_time_and_can_be_written_down():
    for number in range(200):
        case = drawing.draw(4, number)
        assert case == drawing.draw(4, number)
        assert str(cases.parse(str(case))) == str(case)
    assert drawing.draw(5, 0) != drawing.draw(4, 0)


def engine(monkeypatch, name: str, change):
    """An engine that is given something else than it should be."""
    right = ENGINES[name].attention

    def wrong(*call, **options):
        call, options = change(*call, **options)
        return right(*call, **options)

    monkeypatch.setattr(ENGINES[name], "attention", wrong)


def without_a_block(q, k, v, lists, **options):
    """The lists without their last block."""
    start = lists.row_start.clamp(max=lists.key_block.numel() - 1)
    num_full = torch.minimum(lists.num_full, start.diff().int())
    ids = None if lists.mask_id is None else lists.mask_id[:-1]
    keys = lists.key_block[:-1]
    short = replace(lists, row_start=start, num_full=num_full, key_block=keys, mask_id=ids)
    return (q, k, v, short), options


def with_another_scale(*call, scale, **options):
    return call, options | {"scale": 1.02 * scale}


def without_the_mask(*call, **options):
    return call, options | {"key_mask": None}


def with_other_heads(q, k, v, lists, **options):
    """Grouped heads in the wrong order."""
    return (q, k.flip(1), v, lists), options


@pytest.mark.parametrize(
    "change", [without_a_block, with_another_scale, without_the_mask, with_other_heads]
)
@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_a_wrong_engine_is_found(name, change, monkeypatch):
    engine(monkeypatch, name, change)
    # few cases hide keys that matter
    found = find("attend", engines=(name,), cases=240)
    assert re.match(r"(out|lse|d[qkv]) is off", found)


def test_a_lost_gradient_is_found(monkeypatch):
    right = ENGINES["torch"].attention

    def wrong(*call, **options):
        out, lse = right(*call, **options)
        return out, lse.detach()

    monkeypatch.setattr(ENGINES["torch"], "attention", wrong)
    assert find("attend", engines=("torch",)).startswith("dq is off")


@pytest.mark.parametrize("engine_name", ["cpp", "torch"])
def test_a_gradient_of_a_gradient_that_is_lost_is_found(engine_name, monkeypatch):
    """As if nothing said that gradients are constants to the next derivative."""
    monkeypatch.setattr(library, "once", lambda grads, inputs: grads)
    found = find("attend", engines=(engine_name,), cases=120)
    assert found.startswith("a gradient of a gradient is off")


def test_a_window_off_by_one_is_found(monkeypatch):
    right = neighborhood.axis_window

    def wrong(extent, *rule):
        first, last = right(extent, *rule)
        return (first - 1).clamp(min=0), last

    monkeypatch.setattr(neighborhood, "axis_window", wrong)
    assert find("neighborhood", cases=20).startswith("a pattern differs from its definition")


def narrower(right):
    """Windows that end a place early."""

    def wrong(*given):
        first, last = right(*given)
        return first, torch.maximum(first, last - 1)

    return wrong


@pytest.mark.parametrize(
    ("method", "name", "change"),
    [
        ("freeswim", "axis_window", narrower),
        ("power", "is_power", lambda right: lambda gap: gap > 1),
        ("radial", "_reach", lambda right: lambda *given: (2 * right(*given)[0], right(*given)[1])),
        ("sliding_tile", "axis_window", narrower),
        ("strided", "share_of_tile", lambda right: lambda counts, n: right(counts, n) // 2),
    ],
)
def test_a_wrong_pattern_is_found(method, name, change, monkeypatch):
    module = METHODS[method]
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    assert find(method, cases=30)


# what each method makes its choice with
CHOICES = {
    "adaspa": "select_share",
    "anchor": "best_scores",
    "paro": "select_blocks",
    "rectified": "select_share",
    "sla": "select_count",
    "svg": "nearest",
    "topk": "select_share",
    "vmoba": "select_until",
    "vsa": "select_count",
}


@pytest.mark.parametrize("method", CHOICES)
def test_a_worse_choice_is_found(method, monkeypatch):
    module, name = METHODS[method], CHOICES[method]
    right = getattr(module, name)

    def wrong(*given, **options):
        # the worst first, or in the wrong order
        scores = next(
            i for i, x in enumerate(given) if torch.is_tensor(x) and x.is_floating_point()
        )
        return right(*given[:scores], -given[scores], *given[scores + 1 :], **options)

    monkeypatch.setattr(module, name, wrong)
    assert find(method, cases=40)


def test_samples_that_share_a_plan_are_found(monkeypatch):
    """As if the first sample's plan were good enough for all."""
    right = Content.by_sample

    def shared(self, search):
        first = search(next(self.samples()))
        return right(self, lambda sample: first)

    monkeypatch.setattr(Content, "by_sample", shared)
    assert find("topk", cases=40).startswith("a sample is planned otherwise alone")


def test_planning_that_depends_on_the_state_is_found(monkeypatch):
    right = topk.select_share

    def wrong(scores, *rest):
        return right(scores * (1 if torch.get_num_threads() == 1 else -1), *rest)

    monkeypatch.setattr(topk, "select_share", wrong)
    assert "state" in find("topk", cases=150)


def test_a_bad_value_that_is_let_through_is_found(monkeypatch):
    monkeypatch.setattr(Grid, "__post_init__", lambda self: None)
    assert find("refusal", cases=200).startswith(("a bad value is accepted", "refused with"))


def test_a_failure_is_made_small_and_told(monkeypatch):
    monkeypatch.setattr(neighborhood, "axis_window", narrower(neighborhood.axis_window))
    told = []
    run = runs.Run(3, ("neighborhood",), say=told.append)
    run.go(cases=30, failures=1)
    (failure,) = run.failures
    smallest = failure.smallest
    assert math.prod(smallest.size) <= 3 and smallest.text == 0 and not smallest.states
    assert runs.replay(str(smallest), 0, drawing.ENGINES).startswith("a pattern differs")
    assert f"--seed 3 --case {failure.number}" in told[-1] and str(smallest) in told[-1]


def test_the_page_keeps_one_section_of_each_command(tmp_path, monkeypatch, capsys):
    page = tmp_path / "fuzz.md"
    for seed, sections in (("3", 1), ("3", 1), ("4", 2)):
        words = ["--cases", "7", "--only", "pattern", "--seed", seed, "--report", str(page)]
        monkeypatch.setattr(sys, "argv", ["fuzz.py", *words])
        with pytest.raises(SystemExit) as done:
            program.main()
        assert done.value.code == 0 and "| pattern | 7 |" in capsys.readouterr().out
        text = page.read_text()
        assert text.count("## 7 cases, 0 wrong") == sections
    assert "`python scripts/fuzz.py --seed 4 --cases 7 --only pattern`" in text


def test_failures_end_with_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(neighborhood, "axis_window", narrower(neighborhood.axis_window))
    words = ["--case", '{"kind": "pattern", "size": [1, 1, 3], "method": "neighborhood"}']
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *words])
    with pytest.raises(SystemExit) as done:
        program.main()
    assert done.value.code == 1 and "a pattern differs" in capsys.readouterr().out
