"""Long video sparse attention against a loop over frames, written from the definition."""

import pytest

from tests.grids import AWKWARD
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.methods.lvsa import _frames, _share


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize(("near", "anchors"), [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("grid", [g for g in AWKWARD if g.num_video_tokens < 150], ids=str)
def test_mask_is_that_of_near_frames_and_anchors(grid, near, anchors, step):
    method = create_method("lvsa", near=near, anchors=anchors, tile=(1, 2, 2)).in_step(step)
    mask = method.plan(grid).mask()[0, 0]
    frame = {grid.video_start + i: i // (grid.h * grid.w) for i in range(grid.num_video_tokens)}
    interval = -(-grid.t // anchors)
    for i, row in enumerate(mask.tolist()):
        for j, seen in enumerate(row):
            is_text = i not in frame or j not in frame
            is_near = is_text or abs(frame[i] - frame[j]) <= near
            assert seen == (is_near or frame[j] % interval == step % interval)


def test_every_frame_is_an_anchor_in_some_step():
    method = create_method("lvsa", near=0, anchors=3)
    masks = [method.in_step(step).plan(Grid(8, 2, 2)).mask()[0, 0] for step in range(4)]
    assert not masks[0].all() and masks[0].tolist() != masks[1].tolist()
    assert masks[0].tolist() == masks[3].tolist()  # 8 frames, an anchor in every third
    assert (masks[0] | masks[1] | masks[2]).all()


def test_anchors_begin_again_after_eight_turns():
    method = create_method("lvsa", near=0, anchors=1)
    assert len({method.in_step(step) for step in range(50)}) == 8
    assert [int(_frames(80, 0, 40, step)[0, 1:].nonzero()[0]) + 1 for step in range(1, 8)] == [
        *range(5, 40, 5)
    ]


def test_a_video_of_trained_length_is_read_whole():
    assert create_method("lvsa").plan(Grid(20, 3, 3)).is_dense
    assert not create_method("lvsa").plan(Grid(21, 3, 3)).is_dense


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.6, 1.0])
def test_density_is_met(density, step):
    method = create_method("lvsa", density=density).in_step(step)
    plan = method.plan(Grid(81, 4, 6))
    assert plan.density == pytest.approx(density, rel=0.12)


def test_the_share_is_what_the_frames_keep():
    for choice in [(7, 0, 7, 3), (9, 2, 4, 11), (1, 0, 1, 0), (12, 1, 5, 4)]:
        assert _share(*choice) == pytest.approx(_frames(*choice).double().mean().item())


def test_bad_options_are_refused():
    for name, value in (("near", -1), ("anchors", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            create_method("lvsa", **{name: value})
    with pytest.raises(ValueError, match="out of reach on 20 frames.* have 0.0975"):
        create_method("lvsa", density=0.02).plan(Grid(20, 3, 3))
