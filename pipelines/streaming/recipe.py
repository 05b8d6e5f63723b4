"""How a causal model makes a chunk: its length, its noise levels, and what each step does.

A transformer of diffusers says so in its own configuration, under a key that diffusers keeps and
saves and asks nothing about, so that a folder of weights is all there is to a causal model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from torch import nn

from vidattn.support.config import build, convert
from vidattn.support.registry import unknown

# in the config.json of a causal transformer
KEY = "_vidattn_stream"
Sampler = Literal["renoise", "euler", "scheduler"]


@dataclass(frozen=True)
class Recipe:
    """How a causal model is run.

    Args:
        chunk: latent frames that are made together.
        first: latent frames of the first chunk, where that is another number.
        times: noise levels of the steps of a chunk, falling, of 1000.
        shift: warps the times: a share s of noise becomes shift s / (1 + (shift - 1) s).
        sampler: "renoise" estimates the clean chunk at each step and adds new noise down to the
            next level, as models distilled to a few steps do; "euler" goes straight to the next
            level; "scheduler" follows the scheduler of the pipeline in as many steps as there are
            times, whose values it does not use.
        clean_time: noise level of the pass that writes a finished chunk into the cache.
        guidance: weight of the prompt over the negative one; 1 for models that need none.
        negative_prompt: used where guidance is above 1.
        fps: frames of the decoded video to a second.
        size: height and width in pixels that the model was made for.
        policy: what is kept of the past where nobody says.

    Raises:
        ValueError: a value out of range.
    """

    chunk: int = 3
    first: int | None = None
    times: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    sampler: Sampler = "renoise"
    clean_time: float = 0.0
    guidance: float = 1.0
    negative_prompt: str = ""
    fps: int = 16
    size: tuple[int, int] = (480, 832)
    policy: str = "rolling"

    def __post_init__(self):
        for name, hint in get_type_hints(Recipe).items():
            object.__setattr__(self, name, convert(getattr(self, name), hint, name))
        for name in ("chunk", "first", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        times = self.times
        falls = all(a > b for a, b in zip(times, times[1:]))
        if not times or not falls or not (0 < times[-1] and times[0] <= 1000):
            raise ValueError(f"times must fall, from at most 1000 to above 0, got {self.times}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be above 0, got {self.shift!r}")
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be at least 1, which is none, got {self.guidance!r}")
        if not 0 <= self.clean_time < 1000:
            raise ValueError(f"clean_time must be from 0 to below 1000, got {self.clean_time!r}")

    @property
    def levels(self) -> tuple[float, ...]:
        """Shares of noise of the steps, warped."""
        shares = [time / 1000 for time in self.times]
        return tuple(self.shift * s / (1 + (self.shift - 1) * s) for s in shares)

    def chunk_at(self, frame: int) -> range:
        """Latent frames of the chunk that begins at a frame."""
        return range(frame, frame + (self.first or self.chunk if frame == 0 else self.chunk))

    @property
    def passes(self) -> tuple[str, ...]:
        """The forward passes of a step, by the names of diffusers."""
        return ("cond", "uncond") if self.guidance > 1 else ("cond",)

    @property
    def longest(self) -> int:
        """The most latent frames in a chunk."""
        return max(self.chunk, self.first or 0)

    def to_config(self) -> dict[str, Any]:
        """The recipe in the configuration of a transformer."""
        return {KEY: dataclasses.asdict(self)}


# how released models are run, from their code
RECIPES = {
    "self-forcing": Recipe(policy="rolling:window=21,sink=0"),
    "causal-forcing": Recipe(policy="rolling:window=21,sink=0"),
    "causal-forcing-framewise": Recipe(chunk=1, policy="rolling:window=21,sink=0"),
    "longlive": Recipe(policy="rolling:window=12,sink=3,sink_at=absolute"),
    "reward-forcing": Recipe(policy="ema_sink:window=9,sink=3"),
    "causvid": Recipe(times=(1000.0, 757.0, 522.0), shift=1.0, policy="rolling:window=21,sink=0"),
    "krea": Recipe(
        times=(1000.0, 937.0, 833.0, 625.0), shift=1.0, policy="rolling:window=6,sink=0"
    ),
    # diffusion forcing with ar_step as large as the number of steps
    "skyreels-v2-df": Recipe(
        chunk=5,
        times=tuple(1000 - 1000 * step / 30 for step in range(30)),
        sampler="scheduler",
        guidance=6.0,
        fps=24,
        size=(544, 960),
        policy="rolling:window=25,sink=0",
    ),
    "anyflow-far": Recipe(first=1, sampler="scheduler", policy="rolling:window=21,sink=0"),
}


def find_recipe(transformer: nn.Module, given: Recipe | str | None) -> Recipe:
    """The recipe that is given or named, or the one in the configuration of a transformer.

    Raises:
        ValueError: an unknown name, or neither: the model is bidirectional as far as it says.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        if given not in RECIPES:
            raise unknown("recipe", given, RECIPES)
        return RECIPES[given]
    if given is not None:
        raise ValueError(f"recipe must be a Recipe or the name of one, got {type(given).__name__}")
    config: Any = transformer.config
    written, chunks = config.get(KEY), config.get("chunk_partition")
    if written is None and chunks:
        # trained to be causal in diffusers' own layout
        return dataclasses.replace(RECIPES["anyflow-far"], first=chunks[0], chunk=max(chunks))
    if written is None:
        layers, heads = config.num_layers, config.num_attention_heads
        raise ValueError(
            f"this {type(transformer).__name__} of {layers} layers and {heads} heads is "
            "bidirectional as far as its configuration says: it was trained to see later frames "
            "while it makes earlier ones, so a stream of it would fall apart. A stream needs a "
            "causal model: scripts/convert_causal.py writes one from the weights of Self-Forcing, "
            "CausVid, Causal-Forcing, LongLive or Krea. If this model is causal, say how it is "
            f"run: recipe=Recipe(...), or the name of one of {', '.join(RECIPES)}"
        )
    return build(Recipe, _tuples(written), f"{KEY} in the configuration of the transformer")


def _tuples(written: object) -> object:
    """JSON has lists where a recipe has tuples."""
    if not isinstance(written, Mapping):
        return written
    return {key: tuple(x) if isinstance(x, list) else x for key, x in written.items()}
