"""The clips of moving emoji: what they show, that they repeat, and what is held out."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from fetching import packages
from t2v import backgrounds, flow, motion, worlds

from tests.scripts import world_cases as cases

scenes, world = cases.scenes, cases.world

Actor, Scene = scenes.Actor, scenes.Scene


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return world.Clips(cases.write_sprites(tmp_path_factory.mktemp("sprites")), 3)


def alone(thing: str, move: str, background: str = "desert", slow: bool = False) -> Scene:
    return Scene((Actor(thing, move, slow),), background)


def test_clip_repeats(clips):
    first, scene = clips.sample(5, (5, 48, 56))
    again, same = clips.sample(5, (5, 48, 56))
    other, _ = clips.sample(6, (5, 48, 56))
    assert first.shape == (3, 5, 48, 56) and scene == same == clips.scene(5, (5, 48, 56))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1
    assert -1 <= first.min() and first.max() <= 1 + 1e-5


def way(actor, num_frames, box, seed):
    rng = np.random.default_rng(seed)
    return motion.path_of(actor, motion.cycle_of(actor, num_frames, rng), box, rng)


@pytest.mark.parametrize("move", scenes.MOTIONS)
@pytest.mark.parametrize("slow", [False, True])
def test_things_look_alike_from_cell_to_cell(move, slow):
    """Ways start at whole cells, and what repeats at whole latent frames: few looks of a thing."""
    looks, actor = set(), Actor("car", move, slow)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        cycle = motion.cycle_of(actor, 33, rng)
        places = motion.path_of(actor, cycle, (0, 0, 128, 128), rng)[4] % motion.CELL_PX
        turn = motion.turns_of(actor, cycle)[4]
        looks.add(tuple(round(x, 2) for x in [*places.tolist(), turn.item()]))
    assert len(looks) <= 24


@pytest.mark.parametrize("move", scenes.STEPS)
@pytest.mark.parametrize("slow", [False, True])
def test_straight_way_goes_on_at_the_other_side(move, slow):
    path = way(Actor("car", move, slow), 300, (0, 0, 96, 112), 1).numpy()
    axis = 0 if move in ("up", "down") else 1
    extent = (96, 112)[axis]
    steps = np.diff(path, axis=0)
    speed = motion.SPEED_PX[slow] * np.array(scenes.STEPS[move])
    onward = np.abs(steps).max(1) < extent / 2
    np.testing.assert_allclose(steps[onward], np.tile(speed, (onward.sum(), 1)), atol=1e-4)
    # Some part of the thing is in view in every frame, and its way back is one step.
    half = motion.ITEM_PX / 2
    assert path[:, axis].min() >= -half and path[:, axis].max() <= extent + half
    back = np.abs(steps[~onward][:, axis])
    assert len(back) >= 1
    np.testing.assert_allclose(back, extent + motion.ITEM_PX - np.abs(speed).max(), atol=1e-4)


@pytest.mark.parametrize("move", scenes.MOTIONS)
def test_thing_stays_in_view_where_there_is_room(move):
    for seed in range(20):
        path = way(Actor("car", move), 33, (0, 0, 128, 128), seed)
        assert path.min() >= motion.ITEM_PX / 2 - 1e-3
        assert path.max() <= 128 - motion.ITEM_PX / 2 + 1e-3


def test_bouncing_and_circling_repeat():
    for move, frames in (("bouncing", motion.BOUNCE_FRAMES), ("circling", motion.CIRCLE_FRAMES)):
        for slow, period in frames.items():
            path = way(Actor("car", move, slow), 3 * period, (0, 0, 128, 128), 0)
            torch.testing.assert_close(path[period:], path[:-period], rtol=0, atol=1e-3)
            assert (path.amax(0) - path.amin(0)).max() > 25


def test_circling_is_clockwise():
    path = way(Actor("car", "circling"), 48, (0, 0, 128, 128), 0)
    y, x = (path - path.mean(0)).T.double()
    turned = torch.atan2(y.roll(-1), x.roll(-1)) - torch.atan2(y, x)
    # Rows grow downwards, so that a growing angle turns clockwise.
    assert ((turned % (2 * math.pi)) < math.pi).all()


def test_two_things_keep_apart(clips):
    pairs = 0
    for index in range(400):
        scene = clips.scene(index, (33, 128, 128))
        if len(scene.actors) == 1:
            continue
        pairs += 1
        boxes = motion.boxes_of(scene, 128, 128)
        paths = [way(actor, 65, box, index) for actor, box in zip(scene.actors, boxes)]
        apart = (paths[0] - paths[1]).abs().amax(1)
        assert apart.min() >= motion.ITEM_PX
        assert scene.actors[0].thing != scene.actors[1].thing and " and " in scene.caption
    assert 30 < pairs < 120
    assert all(len(clips.scene(i, (33, 96, 96)).actors) == 1 for i in range(400))


@pytest.mark.parametrize("move", scenes.STEPS)
def test_a_rocket_flies_nose_first(clips, move):
    """The stand-in is white up and right, where the rocket has its nose."""
    actor = Actor("rocket", move)
    drawn = world.draw_actor(
        clips.sprites["rocket"],
        torch.tensor([[40.0, 40.0]]),
        motion.turns_of(actor, torch.zeros(1)),
        80,
        80,
    )[0]
    white = (drawn[:3].amin(0) > 0.8).nonzero().double().mean(0) + 0.5 - 40
    assert white @ torch.tensor(scenes.STEPS[move]).double() > 0.95 * white.norm() > 5


def test_things_look_where_they_go(clips):
    scene = {move: alone("car", move, "night sky") for move in ("left", "right")}
    rng = [np.random.default_rng(4) for _ in scene]
    left, right = (clips.render(s, (1, 64, 64), r) for s, r in zip(scene.values(), rng))
    bright = [(x[:, 0].amin(0) > 0.6).nonzero()[:, 1].double().mean() for x in (left, right)]
    assert bright[0] > bright[1] + 10


@pytest.mark.parametrize("name", backgrounds.PAINTERS)
@pytest.mark.parametrize("size", [(37, 53), (128, 128)])
def test_backgrounds(name, size):
    picture = backgrounds.paint_background(name, *size)
    assert picture.shape == (3, *size) and 0 <= picture.min() and picture.max() <= 1
    lighter = backgrounds.paint_background(name, *size, 0.03)
    torch.testing.assert_close(lighter, (picture + 0.03).clamp(max=1))
    # Nothing is so fine that a blur of three pixels takes it away.
    soft = torch.nn.functional.avg_pool2d(picture[None], 3, 1, 1, count_include_pad=False)[0]
    assert (soft - picture).abs().max() < 0.35


def test_every_background_has_words():
    assert list(backgrounds.PAINTERS) == list(scenes.PLACES)


def test_held_out_scenes_are_never_trained(clips):
    held_out, everything = set(scenes.held_out_scenes()), scenes.all_scenes()
    assert len(everything) == 40 * 6 * 8 and len(held_out) >= 0.15 * len(everything)
    for index in range(2000):
        scene = clips.scene(index, (33, 128, 128))
        for actor in scene.actors:
            assert alone(actor.thing, actor.motion, scene.background) not in held_out


def test_prompts_are_held_out_in_even_shares():
    prompts = scenes.held_out_prompts()
    assert set(prompts) <= set(scenes.held_out_scenes())
    assert {s.thing for s in prompts} == set(scenes.THINGS) and len(prompts) == 40
    assert min(Counter(s.motion for s in prompts).values()) >= 4
    assert min(Counter(s.background for s in prompts).values()) >= 4
    with pytest.raises(ValueError, match="give 1 to 40"):
        scenes.held_out_prompts(41)
    tuning = scenes.tuning_prompts()
    assert len(set(tuning) | set(prompts)) == 80
    assert set(tuning) <= set(scenes.held_out_scenes())


def test_captions_vary_but_stay_true(clips):
    scene = Scene((Actor("owl", "left"), Actor("car", "right")), "sea")
    rng = np.random.default_rng(0)
    captions = Counter(scenes.vary_caption(scene, rng) for _ in range(300))
    full = "an owl moving left and a car moving right over the sea"
    assert captions.most_common(1)[0][0] == full == scene.caption
    assert set(captions) == {
        full,
        "an owl moving left and a car moving right",
        "over the sea, an owl moving left and a car moving right",
        "an owl and a car over the sea",
        "an owl moving to the left and a car moving to the right over the sea",
    }
    assert alone("ufo", "up", slow=True).caption == "a ufo slowly moving up in the desert"


def test_every_caption_is_of_known_words(clips):
    tokenizer, rng = flow.build_tokenizer(scenes.WORDS, scenes.SPELLINGS), np.random.default_rng(0)
    for index in range(500):
        caption = scenes.vary_caption(clips.scene(index, (33, 128, 128)), rng)
        assert tokenizer.unk_token_id not in tokenizer(caption).input_ids, caption
    said = [
        ("A bunny jumping over the ocean!", "a rabbit bouncing over the sea"),
        ("an aeroplane flying left", "a <unk> moving left"),
        ("a plane flies to the left", "an airplane moves to the left"),
        ("a kitten circles at sunset", "a cat circling at sunset"),
    ]
    for other, plain in said:
        assert tokenizer(other).input_ids == tokenizer(plain).input_ids


def test_wrong_archive_is_refused(tmp_path):
    (tmp_path / packages.FLUENT_EMOJI.file).write_bytes(b"not the package")
    with pytest.raises(ValueError, match="SHA-256"):
        world.fetch_items(tmp_path)


def test_a_machine_without_npm_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no npm here; install it .*Node.* by hand"):
        world.fetch_items(tmp_path)


def test_unknown_world_is_refused():
    with pytest.raises(ValueError, match="no world 'moon'; there are clothes, emoji"):
        worlds.load_world("moon")
