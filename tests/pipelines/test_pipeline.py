"""Whole pipelines: generations, steps, experts, times, and coming off again."""

import copy
import json
import threading

import pytest
import torch

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.tiny_pipes import run_joint, run_wan
from vidattn.grid import Grid
from vidattn.methods.neighborhood import Neighborhood
from vidattn.pipelines.patch import find_handle

OPTIONS = {"window": 3, "dense_layers": 0}
PIPES = {"wan": run_wan, "cogvideox": run_joint, "mochi": run_joint}


@pytest.fixture
def wan():
    return tiny_pipes.wan()


@pytest.mark.parametrize("name", PIPES)
def test_on_and_off(name):
    pipe, run = getattr(tiny_pipes, name)(), PIPES[name]
    kind = type(pipe)
    before = run(pipe)
    with vidattn.patch(pipe, "dense") as handle:
        assert torch.equal(run(pipe), before)
    assert handle.report().num_sparse == 0
    with vidattn.patch(pipe, "neighborhood", dense_steps=1, **OPTIONS) as handle:
        first = run(pipe)
        report = handle.report()
        assert torch.equal(run(pipe), first)
        # a new generation starts anew
        assert handle.report().layers[0].num_dense == report.layers[0].num_dense
    assert not torch.equal(first, before)
    calls = {"wan": 2, "cogvideox": 1, "mochi": 2}[name]
    assert report.num_steps == 4 and report.num_passes == (8 if name == "wan" else 4)
    for layer in report.layers:
        assert layer.num_sparse == 3 * calls and layer.num_dense == {"step guard": calls}
    assert torch.equal(run(pipe), before)
    assert type(pipe) is kind and "_vidattn" not in vars(pipe)


def test_text_is_told_from_video():
    pipe = tiny_pipes.mochi()
    with vidattn.patch(pipe, "neighborhood", **OPTIONS) as handle:
        run_joint(pipe)
    assert handle.report().grids == (
        Grid(3, 5, 7, text=2),
        Grid(3, 5, 7, text=6),
    )


def test_both_experts():
    pipe = tiny_pipes.wan(two_experts=True)
    before = run_wan(pipe)
    with vidattn.patch(pipe, "neighborhood", dense_steps=0.25, **OPTIONS) as handle:
        assert not torch.equal(run_wan(pipe), before)
        report = handle.report()
    calls = {layer.name: (layer.num_sparse, layer.num_dense) for layer in report.layers}
    # two steps for the expert of high noise, one of them guarded, and two for the other
    assert calls["transformer.blocks.1.attn1"] == (2, {"step guard": 2})
    assert calls["transformer_2.blocks.1.attn1"] == (4, {})
    assert torch.equal(run_wan(pipe), before)


def test_one_transformer_under_two_names(wan):
    wan.register_modules(transformer_2=wan.transformer)
    with vidattn.patch(wan, "radial") as handle:
        run_wan(wan)
    assert len(handle.report().layers) == 2


def test_steps_of_two_generations(wan):
    with vidattn.patch(wan, "neighborhood", dense_steps=1, **OPTIONS) as handle:
        for num_steps in (4, 7):
            run_wan(wan, num_inference_steps=num_steps)
            report = handle.report()
            assert report.num_steps == num_steps
            assert report.layers[0].num_dense == {"step guard": 2}


def test_default_guards(wan):
    with vidattn.patch(wan, "neighborhood", window=3) as handle:
        run_wan(wan, num_inference_steps=11)
    first, second = handle.report().layers
    assert first.num_dense == {"layer guard": 22} and first.num_sparse == 0
    assert second.num_dense == {"step guard": 4} and second.num_sparse == 18


def test_a_method_instance(wan):
    with vidattn.patch(wan, Neighborhood(window=3), dense_steps=0) as handle:
        run_wan(wan)
    assert "window=3" in handle.report().method


def test_a_method_in_the_words_of_the_command_line(wan):
    with vidattn.patch(wan, "neighborhood:window=3,5,5", stride=1) as handle:
        (rule,) = handle.schedule.rules
        assert rule.method == Neighborhood(window=(3, 5, 5), stride=1)
    with pytest.raises(ValueError, match="has the options .'window'. already: give them once"):
        vidattn.patch(wan, "neighborhood:window=3", window=5)
    with pytest.raises(ValueError, match="unknown option of method 'radial' 'densty'"):
        vidattn.patch(wan, "radial:densty=0.3")


def test_report(wan):
    handle = vidattn.patch(wan, "neighborhood", dense_layers=1, dense_steps=0, window=3)
    run_wan(wan, output_type="np")
    report = handle.report()
    density = vidattn.plan("neighborhood", vidattn.Grid(5, 5, 7), window=3).density
    first, second = report.layers
    assert first.name == "transformer.blocks.0.attn1" and first.density is None
    assert second.density == pytest.approx(density)
    assert report.density == pytest.approx((1 + density) / 2)
    assert report.grids == (Grid(5, 5, 7),)
    parts = [report.transformer_ms, report.vae_ms, report.text_encoder_ms, report.rest_ms]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(report.total_ms)
    assert 0 < report.attention_ms < report.transformer_ms
    assert json.loads(json.dumps(report.to_dict()))["num_steps"] == 4
    table = str(report)
    for words in ("layer guard", "blocks.1.attn1", f"{density:.3f}", "VAE", "text encoder"):
        assert words in table
    vidattn.unpatch(wan)
    assert str(handle.report()) == table


def test_what_handles_and_reports_look_like(wan):
    with vidattn.patch(wan, "neighborhood", window=3) as handle:
        assert repr(handle) == (
            "<Handle: neighborhood:window=3 in 2 layers of transformer; dense_layers=1, "
            "dense_steps=0.1>"
        )
        empty = handle.report()
        assert str(empty) == "neighborhood:window=3: nothing has run yet"
        assert empty._repr_html_() == "<p>neighborhood:window=3: nothing has run yet</p>"
        run_wan(wan)
    assert repr(handle).endswith("dense_steps=0.1, removed>")
    report = handle.report()
    # what reads little runs on an engine of ours
    (engine,) = report.engines
    assert engine in ("cpp", "torch") and report.engines[engine] == 6
    assert report.to_dict()["engines"] == {engine: 6}
    assert [layer.engines for layer in report.layers] == [{}, {engine: 6}]
    assert f", sparse on {engine}" in str(report)
    page = report._repr_html_()
    assert page.count("<tr>") == 3 and "<td>2 (step guard)</td>" in page


def test_components_are_restored(wan):
    parts = [wan.vae, wan.text_encoder, wan.transformer]
    before = [(type(part), dict(vars(part))) for part in parts]
    with vidattn.patch(wan, "radial"):
        assert isinstance(wan.vae, before[0][0]) and type(wan.vae) is not before[0][0]
    assert [(type(part), dict(vars(part))) for part in parts] == before


def test_two_pipelines(wan):
    other = tiny_pipes.wan()
    before = run_wan(wan)
    with vidattn.patch(other, "neighborhood", **OPTIONS) as handle:
        assert torch.equal(run_wan(wan), before)
        assert handle.report().num_passes == 0
        with vidattn.patch(wan, "radial", dense_layers=1) as second:
            run_wan(other)
            assert handle.report().num_passes == 8 and second.report().num_passes == 0


def test_threads(wan):
    pipes = [wan, tiny_pipes.wan(), tiny_pipes.cogvideox()]
    runs = [run_wan, run_wan, run_joint]
    methods = ["neighborhood", "dense", "neighborhood"]
    expected, got = [], [None] * 3
    for pipe, run, method in zip(pipes, runs, methods):
        options = {"window": 3} if method != "dense" else {}
        vidattn.patch(pipe, method, dense_steps=1, **options)
        expected.append(run(pipe))

    def work(i):
        got[i] = runs[i](pipes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_copy_and_a_saved_pipeline_are_not_patched(tmp_path):
    pipe = tiny_pipes.cogvideox()
    before = run_joint(pipe)
    with vidattn.patch(pipe, "neighborhood", **OPTIONS):
        twin = copy.deepcopy(pipe)
        assert type(twin) is type(pipe).__mro__[1] and find_handle(twin.transformer) is None
        assert torch.equal(run_joint(twin), before)
        pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == (
        "CogVideoXPipeline"
    )


def test_compiled_transformer_in_a_pipeline(wan):
    sparse_options = {"window": 3, "dense_layers": 0, "dense_steps": 1}
    with vidattn.patch(wan, "neighborhood", **sparse_options):
        expected = run_wan(wan)
    wan.transformer.compile_repeated_blocks(backend="eager")
    with vidattn.patch(wan, "neighborhood", **sparse_options) as handle:
        torch.testing.assert_close(run_wan(wan), expected)
    assert [layer.num_sparse for layer in handle.report().layers] == [6, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [None, "model", "group"])
def test_on_a_gpu(wan, offload):
    with vidattn.patch(wan, "neighborhood", **OPTIONS):
        expected = run_wan(wan)
    if offload == "model":
        wan.enable_model_cpu_offload()
    elif offload == "group":
        wan.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    else:
        wan.to("cuda")
    before = run_wan(wan)
    with vidattn.patch(wan, "dense"):
        assert torch.equal(run_wan(wan), before)
    with vidattn.patch(wan, "neighborhood", **OPTIONS) as handle:
        torch.testing.assert_close(run_wan(wan).cpu(), expected, atol=1e-2, rtol=1e-2)
        report = handle.report()
    assert 0 < report.attention_ms < report.transformer_ms < report.total_ms
    assert torch.equal(run_wan(wan), before)
