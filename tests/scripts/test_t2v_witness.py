"""What the judge sees in clips of moving emoji whose truth is known."""

import numpy as np
import pytest
from scipy import ndimage
from t2v import blobs, naming, witness

from tests.scripts import world_cases as cases

Actor, Scene = cases.scenes.Actor, cases.scenes.Scene


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return cases.world.Clips(cases.write_sprites(tmp_path_factory.mktemp("sprites")), 3)


def video(clips, move="right", background="desert", slow=False, frames=33) -> np.ndarray:
    scene = Scene((Actor("duck", move, slow),), background)
    return cases.video_of(clips.sample(11, (frames, 128, 128), scene)[0])


def seen_blobs(shown: np.ndarray) -> list:
    picture = blobs.background_of(shown)[1]
    return [blobs.blobs_of(frame, picture) for frame in shown]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("move", cases.scenes.MOTIONS)
def test_motion(clips, move, slow):
    found = seen_blobs(video(clips, move, slow=slow))
    assert witness.motion_of(found) == move and witness.whole(found) == "yes"


@pytest.mark.parametrize("move", ["left", "up", "bouncing"])
def test_a_way_that_goes_on_at_the_other_side(clips, move):
    found = seen_blobs(video(clips, move, frames=97))
    assert witness.motion_of(found) == move and witness.whole(found) == "yes"


@pytest.mark.parametrize("background", cases.scenes.PLACES)
def test_background(clips, background):
    shown = video(clips, background=background, frames=9)
    name, picture = blobs.background_of(shown)
    assert name == background
    assert np.median(np.abs(shown[0] - picture)) < 0.02


def test_a_still_thing_and_none_at_all_do_not_move(clips):
    shown = video(clips)
    still = seen_blobs(np.repeat(shown[:1], 33, 0))
    assert witness.motion_of(still) == "none"
    nothing = np.repeat(blobs.background_of(shown)[1][None], 33, 0)
    assert witness.motion_of(seen_blobs(nothing)) == "none"
    assert naming.Classifier().name(nothing, seen_blobs(nothing)) == "none"


def test_splits_jumps_and_fades_are_seen(clips):
    scene = Scene((Actor("duck", "up"),), "sea")
    shown = cases.video_of(clips.sample(11, (25, 128, 192), scene)[0])
    picture = blobs.background_of(shown)[1]
    where = (np.abs(shown - picture).max(-1) > 0.05)[..., None]
    place = seen_blobs(shown)[0].centre[1]
    shift = int((30 if place > 96 else 162) - place)
    moved, thing = np.roll(where, shift, 2), np.roll(shown, shift, 2)
    twice = np.where(moved, thing, shown)
    assert witness.whole(seen_blobs(twice)) == "split"
    # Half way it goes on elsewhere, within a frame or for good.
    jumps = np.where(moved, thing, picture)
    jumps[:12] = shown[:12]
    assert witness.whole(seen_blobs(jumps)) == "jumps"
    # For a while no more than its middle is left.
    fades = shown.copy()
    for t, blob in enumerate(seen_blobs(shown)):
        if 10 <= t < 14:
            middle = ndimage.binary_erosion(blob.mask, iterations=9)
            fades[t] = np.where(middle[..., None], shown[t], picture)
    assert witness.whole(seen_blobs(fades)) == "fades"


def test_classifier_learns_to_name_things(clips, tmp_path):
    naming.train_classifier(clips, tmp_path / "judge.safetensors", count=240, epochs=12)
    classifier = naming.load_classifier(tmp_path / "judge.safetensors")
    right = 0
    for index, thing in enumerate(list(cases.scenes.THINGS)[::5]):
        scene = Scene((Actor(thing, "left"),), "night sky")
        shown = cases.video_of(clips.sample(index, (5, 64, 64), scene)[0])
        seen = witness.look(shown, classifier)
        assert list(seen) == list(witness.ASPECTS)
        right += witness.right(scene, "thing", seen["thing"])
    # One of 40 by chance.
    assert right >= 4


def test_view_is_square_and_grey_outside():
    frame = np.full((60, 90, 3), 0.2, np.float32)
    mask = np.zeros((60, 90), bool)
    mask[20:32, 10:58] = True
    frame[mask] = 0.9
    view = naming.view_of(frame, blobs.Blobs(mask, 1))
    assert view.shape == (3, 32, 32)
    lit = view[0] > 0.8
    assert lit.any(0).sum() >= 30 and 6 <= lit.any(1).sum() <= 9
    assert (view[0][0] == 0.5).all()
