"""The shipped Triton kernels, compiled without a GPU, keep to the limits of every architecture."""

import os
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest

from vidattn.kernels.triton.configs import ARCHITECTURES, KERNELS, Tile, architecture, tile

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted", allow_module_level=True)

import triton_resources as resources  # noqa: E402
from benchmarks.triton_loops import turns_ahead  # noqa: E402
from benchmarks.triton_machine_code import Case, Resources, complaints, measure  # noqa: E402

FORWARD_90 = Case("forward", 90, 128)
QUICK = [
    Case("forward", 80, 128),
    FORWARD_90,
    Case("forward", 100, 128),
    Case("query_gradient", 90, 128),
    Case("key_gradient", 80, 128),
    Case("key_gradient", 90, 128),
    Case("forward", 90, 128, block=64),
    Case("int8", 80, 128),
    Case("int8_qk", 90, 128),
    Case("int8", 100, 128),
    Case("quantise_keys", 90, 128),
]
SHIPPED = resources.shipped_cases()
# slots beyond what is recorded that a change may cost unnoticed
SLACK = 1.1


@lru_cache(maxsize=8)
def measured(case: Case, launch: Tile | None = None):
    return measure(case, launch)


def recorded() -> dict[str, dict[Case, Resources]]:
    """The table in the repository, by version of Triton, whatever the kernels are now."""
    versions: dict = {}
    for _, case, found in resources.recorded():
        versions.setdefault(found.triton, {})[case] = found
    return versions


def assert_fits(case: Case) -> None:
    found = measured(case)
    assert not complaints(case, found), found
    known = recorded().get(triton.__version__, {}).get(case)
    if known is not None:
        assert all(a <= SLACK * b for a, b in zip(found.slots, known.slots, strict=True)), known


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_most_used_kernels_fit(case):
    assert_fits(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHIPPED, ids=str)
def test_every_kernel_fits(case):
    assert_fits(case)


def test_a_spill_is_noticed():
    case = Case("forward", 80, 128)
    found = measured(case, Tile(128, 128, 4, 2))
    assert any("spills" in wrong for wrong in complaints(case, found))


def test_what_another_architecture_has_not_is_noticed():
    wrong = complaints(replace(FORWARD_90, arch=89), measured(FORWARD_90))
    assert any("bytes of shared memory, 101376 fit" in text for text in wrong)
    assert "no HMMA" in wrong
    slow = replace(measured(FORWARD_90), opcodes={"HGMMA": 1, "HMMA": 1})
    assert any("older architecture" in text for text in complaints(FORWARD_90, slow))


def test_a_loop_that_is_not_pipelined_is_noticed():
    found = measure(FORWARD_90, Tile(128, 128, 8, 1))
    assert 0 in found.ahead
    assert any("wait for their own copies" in wrong for wrong in complaints(FORWARD_90, found))
    serial = replace(measured(FORWARD_90), is_serial=True)
    assert complaints(FORWARD_90, serial) == ["products of warp groups that wait for one another"]


def test_a_multiprocessor_with_too_few_warps_is_noticed():
    case = replace(FORWARD_90, block=64)
    found = replace(measured(FORWARD_90), tile=case.tile, registers=187)
    # what two programs leave for each other: 8 bytes more are one program
    assert not complaints(case, replace(found, shared_bytes=115_712))
    (wrong,) = complaints(case, replace(found, shared_bytes=115_720))
    assert wrong == "4 warps fit a multiprocessor, 8 keep it busy"


LOOP = """
  %r:2 = scf.for %i = %a to %b step %c iter_args({carried}) -> (i32)  : i32 {{
    %x = ttg.async_copy_global_to_local %p, %q mask %m : tensor<64x32x!tt.ptr<bf16>, #b> -> <64x32>
    %x_1 = ttg.async_commit_group tokens %x
    %w = ttg.async_wait {waited} {{num = 0 : i32}}
    %d = ttng.warp_group_dot %e, %f, %g {{isAsync = true}} : !ttg.memdesc<64x32xbf16>
    scf.yield {passed_on} : tensor<64x32xf32>
  }} loc(#loc)
"""


@pytest.mark.parametrize(
    ("carried", "waited", "passed_on", "ahead"),
    [
        ("%acc = %z", "%x_1", "%d", 0),
        ("%acc = %z, %k = %t", "%k", "%d, %x_1", 1),
        ("%acc = %z, %j = %t, %k = %u", "%k", "%d, %x_1, %j", 2),
    ],
)
def test_how_far_ahead_a_loop_copies_is_read_off(carried, waited, passed_on, ahead):
    loop = LOOP.format(carried=carried, waited=waited, passed_on=passed_on)
    assert turns_ahead(loop) == [ahead]
    assert turns_ahead(loop.replace("ttng.warp_group_dot ", "arith.addf ")) == []


def test_the_table_in_the_repository_is_of_what_ships():
    versions = recorded()
    assert {version[:3] for version in versions} >= {"3.5", "3.6"}
    for version, kernels in versions.items():
        assert set(QUICK) <= set(kernels) <= set(SHIPPED), version
        for case, found in kernels.items():
            assert found.tile == case.tile, case
            if case.dtype != "fp32":
                assert not complaints(case, found), (version, case)


@pytest.mark.slow
def test_the_table_in_the_repository_is_whole():
    newest = next(iter(recorded().values()))
    assert list(newest) == SHIPPED


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 89), ((8, 7), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100)]
    + [((10, 3), 100), ((12, 0), 120), ((12, 1), 120)],
)
def test_every_gpu_has_tiles(capability, arch):
    assert architecture(capability) == arch and arch in ARCHITECTURES


def test_an_old_gpu_is_told_what_runs():
    with pytest.raises(ValueError, match='compute capability 8.0 on, this one has 7.5.*"flex"'):
        architecture((7, 5))


@pytest.mark.parametrize("block", [16, 32, 48, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", [1, 24, 64, 100, 256])
def test_tiles_divide_blocks(kernel, head_dim, block):
    flags = (False, True)
    for arch, itemsize, has_masks, has_bias in product(ARCHITECTURES, (2, 4), flags, flags):
        size = (itemsize, head_dim, block)
        found = tile(kernel, arch, *size, has_masks=has_masks, has_bias=has_bias)
        assert block % found.rows == 0 and block % found.columns == 0
        assert min(found.rows, found.columns) >= 16 and found.warps >= 1
