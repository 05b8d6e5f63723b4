"""The worlds a model can be trained on, each a module of captioned clips."""

import importlib
from types import ModuleType

# Each has Clips, fetch_items, held_out_prompts, vary_caption, WORDS and SPELLINGS.
WORLDS = {"clothes": "t2v.data", "emoji": "t2v.world"}


def load_world(name: str) -> ModuleType:
    """The module of the world called `name`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in WORLDS:
        raise ValueError(f"no world {name!r}; there are {', '.join(WORLDS)}")
    return importlib.import_module(WORLDS[name])
