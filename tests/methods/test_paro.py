"""PARO against loops over blocks, its calibration file, and its life in a pipeline."""

import itertools

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import relative_rms
from tests.pipelines.sparse import WAN
from tests.pipelines.tiny import TINY, build
from tests.planning.content_cases import coherent, dense_weights, tokens_of
from vidattn.attention import attend
from vidattn.grid import Grid, raster_layout
from vidattn.methods import create_method
from vidattn.planning.calibration import Calibrator, load_calibration
from vidattn.planning.reading import Reading
from vidattn.planning.reorder import ORDERS, SPARSE, order_mass, order_scores

GRID, PADDED = Grid(3, 5, 7), Grid(3, 4, 5, text=6, text_first=True)
BLOCK = 16


def inputs(grid, heads=3):
    q, k, _ = coherent(grid, heads=heads)
    key_mask = None
    if grid.text:
        key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
        key_mask[1, :2] = False
    return q, k, key_mask


def blocks_of(grid, axes):
    """The tokens of every block of the video, by a loop over positions."""
    places = itertools.product(*(range(grid.size[axis]) for axis in axes))
    tokens = []
    for place in places:
        t, h, w = (place[axes.index(axis)] for axis in range(3))
        tokens.append(grid.video_start + (t * grid.h + h) * grid.w + w)
    return [tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK)]


@pytest.mark.parametrize("axes", ORDERS, ids=str)
@pytest.mark.parametrize("grid", [GRID, PADDED], ids=str)
def test_blocks_follow_the_order_of_the_axes(grid, axes):
    layout = raster_layout(grid, BLOCK, axes)
    expected = blocks_of(grid, axes)
    assert layout.num_video_blocks == len(expected)
    assert [tokens_of(layout, i) for i in range(len(expected))] == expected


@pytest.mark.parametrize("grid", [GRID, PADDED], ids=str)
def test_orders_are_scored_by_sparse_blocks_and_even_ones(grid):
    q, k, key_mask = inputs(grid)
    weights = dense_weights(q, k, 0.3, key_mask)
    sparse, even = torch.zeros(2, 6, 3, dtype=torch.float64)
    for number, axes in enumerate(ORDERS):
        blocks = blocks_of(grid, axes)
        for head in range(3):
            ratios = []
            for sample, rows, columns in itertools.product(range(2), blocks, blocks):
                block = weights[sample, head][rows][:, columns]
                share = block.numel() / grid.num_tokens
                sparse[number, head] += (block.sum() < SPARSE * share) / (2 * len(blocks) ** 2)
                ratios.append(block.max() / block.mean())
            even[number, head] = 1 / torch.stack(ratios).mean()
    expected = sparse / sparse.sum(0) / 2 + even / even.sum(0) / 2
    found = order_scores(grid, q, k, BLOCK, scale=0.3, key_mask=key_mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert (found.max(0).values - found.min(0).values > 0.01).all(), "the orders do not differ"


def kept(plan, orders, head, sample):
    """(nv, nv) bool of a head, read off the mask at the first token of every block."""
    blocks = blocks_of(plan.grid, ORDERS[orders[head]])
    first = torch.tensor([tokens[0] for tokens in blocks])
    return plan.mask()[sample, head][first][:, first]


@pytest.mark.parametrize("grid", [GRID, PADDED], ids=str)
def test_the_blocks_with_the_most_attention_are_kept(grid):
    q, k, key_mask = inputs(grid)
    method = create_method("paro", density=0.4, block=BLOCK)
    plan, memory = method.plan_with_memory(grid, Reading(q, k, scale=0.3, key_mask=key_mask))
    orders = torch.stack(memory)
    for sample in range(2):
        mask = None if key_mask is None else key_mask[sample, None]
        alone = q[sample, None], k[sample, None]
        scores = order_scores(grid, *alone, BLOCK, scale=0.3, key_mask=mask)
        assert torch.equal(orders[sample], scores.argmax(0))
    weights = dense_weights(q, k, 0.3, key_mask)
    for head, sample in itertools.product(range(3), range(2)):
        blocks = blocks_of(grid, ORDERS[orders[sample, head]])
        mass = torch.stack(
            [
                torch.stack([weights[sample, head][rows][:, columns].sum() for columns in blocks])
                for rows in blocks
            ]
        )
        found = kept(plan, orders[sample], head, sample)
        own = torch.eye(len(mass), dtype=torch.bool)
        assert found[own].all()
        # one threshold parts what is kept from what is not
        assert mass[found & ~own].min() > mass[~found].max() - 1e-6
    assert plan.density == pytest.approx(0.4, abs=0.06)


def test_an_order_gathers_attention():
    """Heads that look along one axis keep more of it in the order that has this axis last."""
    grid = Grid(4, 8, 4)
    coords = grid.coords().float()
    keys = []
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        row = coords[:, others[0]] * 10 + coords[:, others[1]]
        keys.append(torch.nn.functional.one_hot(row.long(), 80).float())
    q = k = torch.stack(keys)[None] * 4
    orders = order_scores(grid, q, k, 8, scale=1.0).argmax(0)
    assert [ORDERS[i][-1] for i in orders] == [0, 1, 2]
    plan = create_method("paro", density=0.07, block=8).plan(grid, Reading(q, k, scale=1.0))
    raster = Calibrator("x", 1, 0.07, 1, 8)
    raster._orders[0] = torch.zeros(3, dtype=torch.long)
    raster.add(0, 0, grid, q, k, scale=1.0)
    weights = dense_weights(q, k, 1.0)
    blocks = raster.finish().masks[0, 0]
    layout = raster_layout(grid, 8)
    in_raster = vidattn.plan("dense", grid).from_blocks(grid, layout, blocks[None])
    share = [(weights * made.mask()).sum(-1).mean((0, 2)) for made in (plan, in_raster)]
    assert (share[0] > 0.9).all() and share[1][0] < 0.5


def test_a_full_density_reads_all():
    q, k, _ = inputs(GRID)
    assert create_method("paro", density=1.0, block=BLOCK).plan(GRID, Reading(q, k)).is_dense


def test_steps_share_orders_and_late_ones_the_mask():
    method = create_method("paro", early=2, block=BLOCK)
    q, k, _ = inputs(GRID)
    first, memory = method.plan_with_memory(GRID, Reading(q, k))
    second, later = method.plan_with_memory(GRID, Reading(k.flip(2), q, last=memory))
    assert len(memory) == 2 and all(map(torch.equal, memory, later))
    assert not torch.equal(first.mask(), second.mask())
    assert [method.keeps(0, 1, 9), method.keeps(1, 2, 9), method.keeps(1, 7, 9)] == [
        False,
        True,
        True,
    ]


@torch.no_grad()
def test_products_are_rounded_block_by_block():
    q, k, v = coherent(GRID)
    exact, orders = create_method("paro", block=BLOCK).plan_with_memory(GRID, Reading(q, k))
    expected, errors = attend(q, k, v, exact), []
    for precision in ("int8", "int8_qk_int4_pv"):
        method = create_method("paro", block=BLOCK, precision=precision)
        plan, same = method.plan_with_memory(GRID, Reading(q, k))
        assert torch.equal(plan.mask(), exact.mask()) and all(map(torch.equal, same, orders))
        errors.append(relative_rms(attend(q, k, v, plan), expected))
    # 8 and 4 bits
    assert 1e-4 < errors[0] < 0.03 < errors[1] < 0.3


@torch.no_grad()
def calibration(path, transformer=WAN, steps=2):
    """The file of a small Wan transformer with two layers of two heads, from random content."""
    made = Calibrator(transformer, 2, 0.4, steps, BLOCK)
    for layer, step in itertools.product(range(2), range(steps)):
        q, k, _ = inputs(GRID, heads=2)
        made.add(layer, step, GRID, q, k, scale=0.3)
        made.add(layer, step, GRID, k, q, scale=0.3)
    made = made.finish()
    made.save(path)
    return made


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "wan.safetensors"
    made, found = calibration(path), load_calibration(path)
    assert torch.equal(found.orders, made.orders) and torch.equal(found.masks, made.masks)
    assert (found.size, found.block, found.density) == ((3, 5, 7), BLOCK, 0.4)
    assert found.masks.dtype == torch.bool and found.masks.shape == (2, 2, 2, 7, 7)


def test_calibration_adds_up_calls():
    made = Calibrator("x", 1, 0.3, 1, BLOCK)
    calls = [inputs(GRID)[:2] for _ in range(2)]
    for q, k in calls:
        made.add(0, 0, GRID, q, k, scale=0.3)
    found = made.finish()
    orders = order_scores(GRID, *calls[0], BLOCK, scale=0.3).argmax(0)
    assert torch.equal(found.orders[0], orders)
    mass = sum(order_mass(GRID, *call, BLOCK, orders, scale=0.3).sum(0) for call in calls)
    for head in range(3):
        mask = found.masks[0, 0, head]
        own = torch.eye(len(mask), dtype=torch.bool)
        assert mask[own].all()
        assert mass[head][mask & ~own].min() >= mass[head][~mask].max()


@torch.no_grad()
def test_a_patched_model_follows_the_file(tmp_path):
    path = tmp_path / "wan.safetensors"
    made = calibration(path)
    method = create_method("paro", calibration=str(path))
    assert not method.reads_content
    model, case = build(WAN), TINY[WAN]
    with vidattn.patch(model, method, dense_layers=0) as handle:
        for time in (900.0, 600.0, 300.0):
            case.call(model, timestep=torch.full((2,), time))
        layers = handle.report().layers
    for index, layer in enumerate(layers):
        plans = [method.at(index).in_step(step).plan(GRID) for step in range(3)]
        assert torch.equal(plans[1].mask(), plans[2].mask())
        for step in range(2):
            for head in range(2):
                expected = made.masks[step, index, head]
                assert torch.equal(kept(plans[step], made.orders[index], head, 0), expected)
        assert layer.density == pytest.approx(sum(plan.density for plan in plans) / 3)


@torch.no_grad()
def test_without_a_file_a_generation_calibrates_itself():
    model, case = build(WAN), TINY[WAN]
    with vidattn.patch(model, "paro", block=BLOCK, density=0.4, dense_layers=0) as handle:
        case.call(model)
    assert handle.report().num_sparse == 2 and 0.3 < handle.report().density < 0.55


def test_files_for_something_else_are_named(tmp_path):
    path = tmp_path / "wan.safetensors"
    calibration(path, steps=1)
    method = create_method("paro", calibration=str(path))
    with pytest.raises(ValueError, match=r"for a video of \(3, 5, 7\) .* has \(3, 5, 8\)"):
        method.plan(Grid(3, 5, 8))
    with pytest.raises(ValueError, match="has 2 layers, asked for layer 2"):
        method.at(2).plan(GRID)
    with pytest.raises(ValueError, match="it has transformer Wan.*, the model .*Mochi"):
        vidattn.patch(build("MochiTransformer3DModel"), method)
    assert "it has layers 2, the model here has 3" in method.misfit(WAN, 3, 2)
    assert "it has heads 2, the model here has 4" in method.misfit(WAN, 2, 4)
    assert method.misfit(WAN, 2, None) is None
    with pytest.raises(ValueError, match="cannot be read .*vidattn calibrate"):
        create_method("paro", calibration=str(tmp_path / "none"))
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="is no calibration file"):
        create_method("paro", calibration=str(tmp_path / "text"))


def test_calibration_runs_must_be_whole():
    made = Calibrator("x", 1, 0.3, 2, BLOCK)
    q, k, _ = inputs(GRID)
    made.add(0, 0, GRID, q, k, scale=0.3)
    with pytest.raises(ValueError, match="layer 0 never attended at step 1"):
        made.finish()
    with pytest.raises(ValueError, match="must share one grid"):
        made.add(0, 1, Grid(1, 1, 105), q, k, scale=0.3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0}, "density must be above 0"),
        ({"early": 0}, "early must be an integer of"),
        ({"precision": "int9"}, "did you mean 'int8'"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        create_method("paro", **options)
