"""One patched transformer: its passes, steps, guards, plans and masks."""

import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vidattn
from tests.pipelines.sparse import COGVIDEOX, WAN, call_at, outputs, patch
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents
from vidattn.grid import raster_layout
from vidattn.methods.neighborhood import Neighborhood
from vidattn.pipelines.site import Site
from vidattn.planning.content_method import ContentMethod
from vidattn.quality.fidelity import fidelity


@pytest.fixture
def wan():
    return build(WAN)


@torch.no_grad()
def test_bfloat16():
    model = build(WAN).to(torch.bfloat16)
    inputs = {
        name: value.bfloat16() if torch.is_tensor(value) else value
        for name, value in TINY[WAN].inputs().items()
    }
    dense = model(**inputs, return_dict=False)[0]
    with patch(model):
        sparse = model(**inputs, return_dict=False)[0]
    assert sparse.dtype == torch.bfloat16 and not torch.equal(sparse, dense)
    assert torch.equal(model(**inputs, return_dict=False)[0], dense)


@torch.no_grad()
def test_three_threads():
    # one transformer at two resolutions, and another beside it
    shared, own = build(WAN), build("MochiTransformer3DModel")
    small = {"hidden_states": latents(4, 5, 9, 8)}
    expected = [
        outputs(WAN, shared)[1],
        outputs(WAN, shared, **small)[1],
        outputs("MochiTransformer3DModel", own)[1],
    ]
    patch(shared)
    patch(own)
    got = [[], [], []]
    # the random inputs of the cases come from one generator for the process
    inputs = [TINY[WAN].inputs(), TINY[WAN].inputs() | small]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inputs = [TINY[WAN].inputs()] * 2
        torch.manual_seed(1)
        inputs.append(TINY["MochiTransformer3DModel"].inputs())
    inputs[1] = inputs[1] | small

    def work(i, model):
        with torch.no_grad():
            for _ in range(5):
                got[i].append(model(**inputs[i], return_dict=False)[0])

    threads = [
        threading.Thread(target=work, args=(i, model))
        for i, model in enumerate([shared, shared, own])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert len(got[i]) == 5
        for out in got[i]:
            torch.testing.assert_close(out, expected[i], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_steps_of_a_bare_transformer(wan):
    with patch(wan, dense_steps=2) as handle:
        for _ in range(2):
            for step in (900.0, 900.0, 600.0, 600.0, 300.0, 300.0):
                TINY[WAN].call(wan, timestep=torch.full((2,), step))
        report = handle.report()
    assert report.num_steps == 6 and report.num_passes == 12
    assert [layer.num_sparse for layer in report.layers] == [4, 4]
    assert [layer.num_dense for layer in report.layers] == [{"step guard": 8}] * 2


@torch.no_grad()
def test_pairs_of_masks_are_not_written_out(monkeypatch):
    model, seen = build("HunyuanVideo15Transformer3DModel"), []
    attend = Site.attend

    def spy(site, layer, q, k, v, mask, scale):
        seen.append(mask)
        return attend(site, layer, q, k, v, mask, scale)

    monkeypatch.setattr(Site, "attend", spy)
    with patch(model):
        TINY["HunyuanVideo15Transformer3DModel"].call(model)
    assert len(seen) == 2
    assert all(mask.untyped_storage().nbytes() == mask.shape[0] * mask.shape[-1] for mask in seen)


@dataclass(frozen=True)
class Nearest(ContentMethod):
    """Every block of queries reads the half of the blocks whose keys are most like it."""

    calls: ClassVar[list] = []

    def search(self, content):
        self.calls.append(content.grid)
        content = content.on(raster_layout(content.grid, 8))
        scores = content.scores
        return content.plan(scores >= scores.median(-1, keepdim=True).values), None


@pytest.mark.parametrize("key", [WAN, COGVIDEOX, "HunyuanVideoFramepackTransformer3DModel"])
@torch.no_grad()
def test_a_method_that_reads_content(key):
    model, case = build(key), TINY[key]
    dense = case.call(model)
    with vidattn.patch(model, Nearest(), dense_layers=0) as handle:
        for _ in range(2):
            Nearest.calls.clear()
            case.call(model)
            # sample by sample
            assert len(Nearest.calls) == 2 * len(handle.report().layers)
        report = handle.report()
    assert 0.4 < report.density < 0.7 and report.num_dense == 0
    assert torch.equal(case.call(model), dense)


@dataclass(frozen=True)
class Rarely(Nearest):
    """Looks again at every second step; the second layer looks for ever fewer keys.

    Args:
        layer: which one it is for.
    """

    layer: int = -1
    searches: ClassVar[list] = []

    def at(self, layer):
        return Rarely(layer=layer)

    def keeps(self, made, now, num_steps):
        return now < made + 2

    def search(self, content):
        self.searches.append((self.layer, len(content.q)))
        return super().search(content)


@torch.no_grad()
def test_plans_are_kept_as_long_as_the_method_says():
    model = build(WAN)
    Rarely.searches.clear()
    with vidattn.patch(model, Rarely(), dense_layers=0) as handle:
        call_at(handle, WAN, model, (900.0, 600.0, 300.0), passes=2)
    # two passes at the first step and two at the third, each with plans of its own, by sample
    assert Rarely.searches == [(0, 1), (0, 1), (1, 1), (1, 1)] * 4


@torch.no_grad()
def test_the_report_says_how_much_the_last_searches_kept(monkeypatch):
    monkeypatch.setattr("vidattn.pipelines.plans.NUM_SAMPLES", 10**5)
    model, case, seen = build(WAN), TINY[WAN], []
    plan = Rarely.plan_with_memory

    def spy(self, grid, reading):
        made, memory = plan(self, grid, reading)
        seen.append((self.layer, fidelity(reading.q, reading.k, reading.k, made).recall.mean()))
        return made, memory

    monkeypatch.setattr(Rarely, "plan_with_memory", spy)
    with vidattn.patch(model, Rarely(), dense_layers=0) as handle:
        call_at(handle, WAN, model, (900.0, 600.0, 300.0), passes=2)
    for number, layer in enumerate(handle.report().layers):
        assert (layer.num_sparse, layer.num_searches) == (6, 4)
        # both passes of the third step
        recalls = [float(recall) for i, recall in seen[-4:] if i == number]
        assert layer.recall == pytest.approx(sum(recalls) / 2, abs=1e-5) and layer.recall < 0.99
        assert f" 4   {layer.recall:.3f} " in str(handle.report())
    with patch(model) as handle:
        case.call(model)
    report = handle.report()
    assert report.layers[0].num_searches == 0 and report.layers[0].recall is None
    assert "recall" not in str(report)


@torch.no_grad()
def test_kept_plans_are_those_of_the_same_pass():
    model, case = build(WAN), TINY[WAN]
    videos = [torch.randn_like(case.inputs()["hidden_states"]) for _ in range(2)]

    def run(order, method):
        outs = []
        with (
            vidattn.patch(model, method, dense_layers=0) as handle,
            handle.generation() as generation,
        ):
            for step in range(2):
                generation.at(step)
                outs += [case.call(model, hidden_states=videos[i]) for i in order]
        return outs

    first, second = run((0, 1), Rarely()), run((1, 0), Rarely())
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(first[i], second[j])


@dataclass(frozen=True)
class Told(Nearest):
    """Notes what it is told, and remembers the number of the search."""

    told: ClassVar[list] = []

    def search(self, content):
        self.told.append(content)
        number = 1 + (0 if content.memory is None else int(content.memory))
        blocks = torch.ones(1, 1, content.num_blocks, content.num_blocks, dtype=torch.bool)
        return content.plan(blocks), torch.tensor(number)


# text of 6 with 3 of padding, behind 2 tokens of an image in the second
@pytest.mark.parametrize(("name", "first"), [("HunyuanVideo", 3), ("HunyuanVideoFramepack", 5)])
@torch.no_grad()
def test_a_method_is_told_the_padding_and_what_it_planned_before(name, first):
    key = f"{name}Transformer3DModel"
    model = build(key)
    Told.told.clear()
    with vidattn.patch(model, Told(), dense_layers=0) as handle:
        call_at(handle, key, model, (900.0, 600.0, 300.0))
    numbers = [0 if x.memory is None else int(x.memory) for x in Told.told]
    # both samples of every layer
    calls = len(numbers) // 3
    assert numbers == [0] * calls + [1] * calls + [2] * calls
    assert all(content.key_mask.all() for content in Told.told[::2])
    for content in Told.told[1::2]:
        # behind the video, also where the model has more frames behind its text
        padded = content.key_mask[:, content.grid.num_video_tokens :].logical_not().nonzero()
        assert padded.tolist() == [[0, first + i] for i in range(3)]


@torch.no_grad()
def test_dense_runs_where_it_is_faster(monkeypatch):
    model, case = build(WAN), TINY[WAN]
    dense = case.call(model)
    monkeypatch.setattr("vidattn.pipelines.site.break_even", lambda q, k, v: 0.1)
    with vidattn.patch(model, Nearest(), dense_layers=0) as handle:
        assert torch.equal(case.call(model), dense)
    (why,) = {why for layer in handle.report().layers for why in layer.num_dense}
    assert why == "dense is faster above density 0.10 here"


@torch.no_grad()
def test_plans_are_made_once(monkeypatch):
    model, made, plan = build(WAN), [], Neighborhood.plan
    monkeypatch.setattr(Neighborhood, "plan", lambda *given: made.append(given) or plan(*given))
    with patch(model) as handle:
        for _ in range(3):
            TINY[WAN].call(model)
    assert handle.report().num_sparse == 6 and len(made) == 1


@torch.no_grad()
def test_layer_guards():
    model = build("WanVACETransformer3DModel")
    with patch(model, dense_layers=0.5) as handle:
        TINY["WanVACETransformer3DModel"].call(model)
    dense = {layer.name: layer.num_dense for layer in handle.report().layers}
    assert dense == {
        "transformer.blocks.0.attn1": {"layer guard": 1},
        "transformer.blocks.1.attn1": {"layer guard": 1},
        "transformer.blocks.2.attn1": {"layer guard": 1},
        "transformer.vace_blocks.0.attn1": {},
        "transformer.vace_blocks.1.attn1": {},
    }
