"""The worlds a model can be trained on: captioned clips, and a witness of what clips show."""

import importlib
from types import ModuleType

# The first module has Clips, fetch_items, held_out_prompts, tuning_prompts, unseen_clips,
# vary_caption, WORDS and SPELLINGS; the second ASPECTS, look, right, load_classifier and
# train_classifier.
WORLDS = {"clothes": ("t2v.data", "t2v.measure"), "emoji": ("t2v.world", "t2v.witness")}


def _module(name: str, place: int) -> ModuleType:
    if name not in WORLDS:
        raise ValueError(f"no world {name!r}; there are {', '.join(WORLDS)}")
    return importlib.import_module(WORLDS[name][place])


def load_world(name: str) -> ModuleType:
    """The clips of the world called `name`.

    Raises:
        ValueError: for an unknown name.
    """
    return _module(name, 0)


def load_witness(name: str) -> ModuleType:
    """What tells what clips of the world called `name` show.

    Raises:
        ValueError: for an unknown name.
    """
    return _module(name, 1)
