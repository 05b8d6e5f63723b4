"""What the clips of moving emoji show, and the words for it."""

import hashlib
from dataclasses import dataclass

import numpy as np

# The file of each thing: its code point. Outlines and colours differ clearly.
THINGS = {
    "rocket": "1f680",
    "car": "1f697",
    "bus": "1f68c",
    "airplane": "2708-fe0f",
    "balloon": "1f388",
    "apple": "1f34e",
    "strawberry": "1f353",
    "pizza": "1f355",
    "dog": "1f436",
    "cat": "1f431",
    "fox": "1f98a",
    "panda": "1f43c",
    "frog": "1f438",
    "butterfly": "1f98b",
    "turtle": "1f422",
    "penguin": "1f427",
    "ghost": "1f47b",
    "robot": "1f916",
    "star": "2b50",
    "heart": "2764-fe0f",
    "cactus": "1f335",
    "mushroom": "1f344",
    "whale": "1f433",
    "duck": "1f986",
    "fish": "1f420",
    "ufo": "1f6f8",
    "gift": "1f381",
    "pig": "1f437",
    "rabbit": "1f430",
    "unicorn": "1f984",
    "owl": "1f989",
    "crab": "1f980",
    "dinosaur": "1f995",
    "banana": "1f34c",
    "donut": "1f369",
    "cupcake": "1f9c1",
    "snowman": "26c4",
    "crown": "1f451",
    "pumpkin": "1f383",
    "alien": "1f47d",
}
# Drawn looking left; they look right when they move right.
LOOKING_LEFT = {"car", "bus", "turtle", "whale", "duck", "fish", "unicorn", "dinosaur"}
# Drawn flying up and right; they turn to where they fly.
FLYING = {"rocket", "airplane"}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
MOTIONS = (*STEPS, "bouncing", "circling")
PLACES = {
    "night sky": "in the night sky",
    "meadow": "over a meadow",
    "sea": "over the sea",
    "desert": "in the desert",
    "sunset": "at sunset",
    "city": "over a city at night",
    "snow": "in the snow",
    "checkered floor": "on a checkered floor",
}
WORDS = dict.fromkeys(
    f"a and slowly moving moves to {' '.join((*THINGS, *MOTIONS, *PLACES.values()))}".split()
)
# Spellings read as words the captions have.
SPELLINGS = {
    "an": "a",
    "plane": "airplane",
    "doughnut": "donut",
    "present": "gift",
    "bunny": "rabbit",
    "kitten": "cat",
    "puppy": "dog",
    "flying saucer": "ufo",
    "checkerboard": "checkered floor",
    "chequered": "checkered",
    "ocean": "sea",
    "bounces": "bouncing",
    "jumping": "bouncing",
    "jumps": "bouncing",
    "circles": "circling",
    "flying|driving|swimming|walking|running|going|gliding": "moving",
    "flies|drives|swims|walks|runs|goes|glides": "moves",
}

SHARE_OF_PAIRS = 0.2
SHARE_SLOW = 0.3
NUM_HELD_OUT = 300
NUM_PROMPTS = 40


@dataclass(frozen=True)
class Actor:
    """One thing with its motion."""

    thing: str
    motion: str
    slow: bool = False

    @property
    def noun(self) -> str:
        """The thing with its article."""
        return f"{'an' if self.thing[0] in 'aeio' else 'a'} {self.thing}"

    @property
    def action(self) -> str:
        """How it moves."""
        verb = f"moving {self.motion}" if self.motion in STEPS else self.motion
        return f"slowly {verb}" if self.slow else verb


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two actors in front of a background."""

    actors: tuple[Actor, ...]
    background: str

    @property
    def caption(self) -> str:
        """The full caption."""
        who = " and ".join(f"{actor.noun} {actor.action}" for actor in self.actors)
        return f"{who} {PLACES[self.background]}"

    @property
    def thing(self) -> str:
        """The name of the first thing."""
        return self.actors[0].thing

    @property
    def motion(self) -> str:
        """The motion of the first thing."""
        return self.actors[0].motion


def _key(scene: Scene) -> str:
    """A hash that orders scenes the same way everywhere."""
    return hashlib.sha256(scene.caption.encode()).hexdigest()


def all_scenes() -> list[Scene]:
    """Every scene of one thing at full speed, in an order fixed by a hash."""
    scenes = [
        Scene((Actor(thing, motion),), place)
        for thing in THINGS
        for motion in MOTIONS
        for place in PLACES
    ]
    return sorted(scenes, key=_key)


def held_out_scenes() -> list[Scene]:
    """The combinations training never sees, at any speed or beside another thing."""
    return all_scenes()[:NUM_HELD_OUT]


def held_out_prompts(count: int = NUM_PROMPTS) -> list[Scene]:
    """The judged scenes: held out, each thing once, motions and backgrounds in even shares.

    Raises:
        ValueError: for a count below 1 or above NUM_PROMPTS.
    """
    if not 1 <= count <= NUM_PROMPTS:
        raise ValueError(f"prompts is {count}; give 1 to {NUM_PROMPTS}")
    chosen, share = [], {}
    most = {"thing": 1, "motion": 8, "background": 6}
    for scene in held_out_scenes():
        kinds = {(kind, getattr(scene, kind)): limit for kind, limit in most.items()}
        if all(share.get(kind, 0) < limit for kind, limit in kinds.items()):
            share |= {kind: share.get(kind, 0) + 1 for kind in kinds}
            chosen.append(scene)
    return chosen[:count]


def tuning_prompts(count: int = NUM_PROMPTS) -> list[Scene]:
    """Held-out scenes that are not judged, to settle guidance and the like on."""
    judged = set(held_out_prompts())
    return [scene for scene in held_out_scenes() if scene not in judged][:count]


def vary_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A training caption: mostly the full one, at times shorter or in other words."""
    draw, place = rng.random(), PLACES[scene.background]
    who = scene.caption.removesuffix(place).strip()
    if draw < 0.76:
        return scene.caption
    if draw < 0.82:
        return who
    if draw < 0.88:
        return f"{place}, {who}"
    nouns = " and ".join(actor.noun for actor in scene.actors)
    if draw < 0.92:
        return f"{nouns} {place}"
    for name in ("left", "right"):
        who = who.replace(f"moving {name}", f"moving to the {name}")
    for name in ("up", "down"):
        who = who.replace(f"moving {name}", f"moves {name}")
    return f"{who} {place}"
