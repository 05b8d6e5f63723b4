"""The simulator: exact counts, the published tables of the model, and GPUs by name."""

import dataclasses

import pytest
import torch

from tests.grids import AWKWARD
from vidattn.grid import Grid
from vidattn.head_plan import HeadPlan
from vidattn.methods import create_method
from vidattn.simulation.gpus import break_even, find_gpu, list_gpus
from vidattn.simulation.simulate import (
    Counts,
    Work,
    best_first,
    candidate_tiles,
    count,
    count_tiles,
    estimate,
)
from vidattn.simulation.video_models import find_video_model, list_video_models

WAN, HUNYUAN = find_video_model("wan2.1-14b"), find_video_model("hunyuanvideo")
DENSITIES = (1, 0.7, 0.5, 0.3, 0.2, 0.1)


def whole_blocks(density: float) -> Counts:
    """A plan of whole blocks of 128 without padding, at any density."""
    return Counts(
        tile=None,
        block=128,
        needed_pairs=0,
        visited_pairs=0,
        density=density,
        visited_density=density,
        visited_share=density,
        computed_share=density,
        partial_share=0.0,
        num_blocks=0.0,
        padding=1.0,
        is_dense=False,
    )


def estimates(model, gpu, densities=DENSITIES, **change):
    """The model at several densities, for a method that reads content."""
    grid, work = model.grid(*model.size), Work(model.heads, model.head_dim, model)
    return [
        estimate(
            dataclasses.replace(whole_blocks(density), **change),
            grid,
            find_gpu(gpu),
            work,
            reads_content=True,
        )
        for density in densities
    ]


@pytest.mark.parametrize(
    ("model", "gpu", "expected"),
    [
        (WAN, "A100", (1.00, 1.27, 1.56, 2.00, 2.33, 2.80)),
        (WAN, "H100", (1.00, 1.26, 1.52, 1.92, 2.20, 2.59)),
        (WAN, "B200", (1.00, 1.26, 1.51, 1.90, 2.19, 2.57)),
        (HUNYUAN, "H200", (1.00, 1.34, 1.74, 2.47, 3.13, 4.27)),
        (HUNYUAN, "RTX 4090", (1.00, 1.34, 1.72, 2.43, 3.05, 4.11)),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_bound_end_to_end(model, gpu, expected):
    found = [x.ideal_end_to_end for x in estimates(model, gpu)]
    assert found == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("model", "gpu", "attention", "end_to_end"),
    [
        (WAN, "A100", (0.88, 1.25, 1.74, 2.87, 4.25, 8.19), (0.91, 1.17, 1.44, 1.87, 2.20, 2.68)),
        (WAN, "4090", (0.93, 1.32, 1.83, 3.00, 4.41, 8.32), (0.95, 1.20, 1.45, 1.84, 2.12, 2.50)),
        (WAN, "H100", (0.69, 0.99, 1.37, 2.25, 3.32, 6.30), (0.77, 0.99, 1.23, 1.61, 1.91, 2.35)),
        (WAN, "B200", (0.37, 0.53, 0.73, 1.21, 1.80, 3.49), (0.46, 0.62, 0.80, 1.13, 1.43, 1.94)),
        (
            HUNYUAN,
            "H200",
            (0.70, 1.00, 1.39, 2.30, 3.42, 6.68),
            (0.73, 1.00, 1.31, 1.93, 2.51, 3.62),
        ),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_modelled_kernel(model, gpu, attention, end_to_end):
    found = estimates(model, gpu)
    assert [x.speedup for x in found] == pytest.approx(attention, abs=0.0051)
    assert [x.end_to_end for x in found] == pytest.approx(end_to_end, abs=0.0051)


@pytest.mark.parametrize(
    ("gpu", "expected"), [("A100", 0.88), ("RTX 4090", 0.94), ("H100", 0.70), ("B200", 0.37)]
)
def test_break_even(gpu, expected):
    assert break_even(gpu) == pytest.approx(expected, abs=0.005)
    below, above = estimates(WAN, gpu, (0.9 * break_even(gpu), break_even(gpu)))
    assert not below.runs_dense and above.runs_dense


@pytest.mark.parametrize(
    ("window", "density", "computed", "partial"),
    [
        ((16, 34, 60), 0.43, 0.69, 0.57),
        ((10, 22, 40), 0.116, 0.27, 0.82),
        ((7, 16, 28), 0.041, 0.114, 0.91),
    ],
)
def test_windows_compute_more_than_they_need(window, density, computed, partial):
    plan = create_method("neighborhood", window=window, tile=(2, 8, 8)).plan(Grid(21, 45, 80))
    found = count(plan)
    assert found.density == pytest.approx(density, rel=0.02)
    assert found.computed_share == pytest.approx(computed, rel=0.02)
    # the prototype these figures come from took every block at a ragged edge for partial
    assert partial - 0.07 < found.partial_share <= partial
    assert found.padding == pytest.approx(1.117, abs=0.001)


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("name", ["dense", "neighborhood", "radial"])
def test_counts_are_those_of_the_mask(name, grid):
    options = {"window": (2, 3, 3)} if name == "neighborhood" else {}
    plan = create_method(name, **options).plan(grid)
    found, pairs = count(plan), grid.num_tokens**2
    assert found.needed_pairs == plan.mask().sum()
    assert found.needed_pairs <= found.visited_pairs == round(found.visited_share * pairs)
    assert found.visited_share <= found.computed_share
    assert found.computed_share == found.num_blocks * found.block**2 / pairs
    assert found.num_blocks == plan.lists.key_block.numel()


def test_counts_of_many_heads_are_a_mean():
    grid = Grid(2, 8, 8)
    one, many = (create_method("radial").plan(grid) for _ in range(2))
    layout = one.layout
    blocks = layout.num_video_blocks
    from_heads = type(one).from_blocks(
        grid, layout, one.mask().new_ones(3, 5, blocks, blocks).tril()
    )
    assert count(from_heads).num_blocks == blocks * (blocks + 1) / 2
    assert count(many) == count(one)


def test_counts_of_heads_with_plans_of_their_own():
    grid = Grid(3, 9, 8, text=5)
    plans = [create_method("radial", tile=(1, 4, 8)).plan(grid)]
    plans += [create_method("neighborhood", window=3, tile=(1, 4, 8)).plan(grid)]
    found = count(HeadPlan(tuple(plans), torch.tensor([0, 1, 1, 0, 1])))
    parts = [count(plan) for plan in plans]
    for name in ("density", "visited_share", "computed_share", "num_blocks", "padding"):
        radial, window = (getattr(x, name) for x in parts)
        assert getattr(found, name) == pytest.approx((2 * radial + 3 * window) / 5)
    partial = sum(w * x.partial_share * x.num_blocks for w, x in zip((2, 3), parts)) / 5
    assert found.partial_share == pytest.approx(partial / found.num_blocks)
    assert found.block == 32 and not found.is_dense


def test_tiles_leave_a_window_alone():
    method, grid = create_method("neighborhood", window=(3, 5, 5)), Grid(6, 17, 12, text=3)
    found = list(count_tiles(method, grid))
    for x in found[::9]:
        set_by_hand = create_method("neighborhood", window=(3, 5, 5), tile=x.tile)
        assert x == count(set_by_hand.plan(grid), x.tile)
    assert len({x.density for x in found}) == 1 and len({x.tile for x in found}) > 10
    assert found[-1].tile is None
    gpu, work = find_gpu("H100"), Work(4, 64)
    ranked = best_first(estimate(x, grid, gpu, work) for x in found)
    assert ranked[0].sparse_ms == min(x.sparse_ms for x in ranked)


def test_only_a_free_tile_is_searched():
    grid = Grid(5, 20, 30)
    assert candidate_tiles(create_method("dense"), grid) == []
    assert candidate_tiles(create_method("neighborhood", tile=(1, 8, 8)), grid) == []
    assert {t for t, _, _ in candidate_tiles(create_method("radial"), grid)} == {1}
    assert (4, 4, 4) in candidate_tiles(create_method("neighborhood"), grid)
    assert (64, 1, 1) not in candidate_tiles(create_method("neighborhood"), Grid(64, 64, 64))


def test_short_blocks_wait_for_the_cache():
    (short,), (tall,) = (estimates(WAN, "H100", (0.5,), block=block) for block in (64, 128))
    # 64 query rows: 64 operations to a byte of the cache
    flops = 4 * 75600**2 * 40 * 128 * 0.5
    assert short.kernel_ms == pytest.approx(1e3 * flops / 64 / 5.5e12)
    assert tall.kernel_ms == pytest.approx(1e3 * flops / 455e12)


def test_a_predicate_costs():
    whole, half = (
        estimates(WAN, "A100", (0.5,), partial_share=share)[0].kernel_ms for share in (0, 0.5)
    )
    assert half / whole == pytest.approx(0.5 + 0.5 / 0.88)


def test_a_dense_plan_gains_nothing():
    grid = Grid(3, 8, 8)
    found = estimate(
        count(create_method("dense").plan(grid)), grid, find_gpu("H100"), Work(2, 64, WAN)
    )
    rates = (found.ideal_speedup, found.speedup, found.ideal_end_to_end, found.end_to_end)
    assert rates == (1, 1, 1, 1) and found.runs_dense and not found.overhead_ms


def test_guards_take_their_share():
    grid, gpu = WAN.grid(*WAN.size), find_gpu("H100")
    free, guarded, all_dense = (
        estimate(whole_blocks(0.2), grid, gpu, Work(40, 128, WAN, dense_share=share))
        for share in (0, 0.5, 1)
    )
    assert 1 == all_dense.end_to_end < guarded.end_to_end < free.end_to_end
    assert 1 / guarded.end_to_end == pytest.approx((1 + 1 / free.end_to_end) / 2)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("b200", "B200"),
    ],
)
def test_gpu_by_any_of_its_names(said, name):
    assert find_gpu(said).name == name


@pytest.mark.parametrize("said", ["H10", "", "NVIDIA GeForce RTX 4080", "Tesla T4"])
def test_an_unknown_gpu_is_named(said):
    with pytest.raises(ValueError, match="unknown GPU .*Known: A100, B200, H100, H200, RTX 4090"):
        find_gpu(said)


def test_every_figure_has_a_basis_and_a_source():
    assert list_gpus() == ["A100", "H100", "H200", "RTX 4090", "B200"]
    for gpu in map(find_gpu, list_gpus()):
        assert len(gpu.figures) == 7
        for figure in gpu.figures.values():
            assert figure.basis in ("datasheet", "published", "static", "assumed")
            assert figure.value > 0 and figure.source
        assert gpu.triton_tflops.value < gpu.dense_tflops.value < gpu.peak_tflops.value


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("wan2.1-14b", (21, 45, 80), 75_600),
        ("wan2.1-1.3b", (21, 30, 52), 32_760),
        ("wan2.2-5b", (31, 22, 40), 27_280),
        ("hunyuanvideo", (33, 45, 80), 119_056),
        ("cogvideox-5b", (13, 30, 45), 17_776),
        ("mochi-1", (15, 30, 53), 24_106),
        ("ltx-video", (21, 16, 22), 7_392),
        ("flux.1", (1, 64, 64), 4_608),
        ("sd3.5-large", (1, 64, 64), 4_429),
        ("qwen-image", (1, 83, 83), 7_017),
    ],
)
def test_model_sizes(name, size, tokens):
    model = find_video_model(name)
    grid = model.grid(*model.size)
    assert grid.size == size and grid.num_tokens == tokens
    assert model.source and model.name in list_video_models()


def test_work_beside_attention():
    grid = WAN.grid(*WAN.size)
    # 45 TFLOP to a layer of Wan 14B, 27 to one of HunyuanVideo
    assert WAN.linear_flops(grid) == pytest.approx(4.5e13, rel=0.01)
    assert HUNYUAN.linear_flops(HUNYUAN.grid(*HUNYUAN.size)) == pytest.approx(2.7e13, rel=0.01)
    assert WAN.cross_flops(grid) == 4 * 75_600 * 512 * 5120


@pytest.mark.parametrize("size", [(80, 720, 1280), (81, 721, 1280), (0, 720, 1280)])
def test_a_size_the_model_cannot_cut_is_named(size):
    with pytest.raises(ValueError, match=r"takes 4n \+ 1 frames and multiples of 16 x 16 pixels"):
        WAN.grid(*size)


def test_a_picture_has_one_frame():
    model = find_video_model("flux.1")
    assert model.grid(1, 2048, 4096).size == (1, 128, 256)
    with pytest.raises(ValueError, match="flux.1 makes pictures, of 1 frame, got 5 frames"):
        model.grid(5, 1024, 1024)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="did you mean 'wan2.1-14b'"):
        find_video_model("wan2.1-14")
