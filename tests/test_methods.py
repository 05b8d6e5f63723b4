"""Every registered method by the same rules; a new file in vidattn/methods is tested as it is."""

import dataclasses
import inspect
from itertools import product

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from vidattn.catalog import describe
from vidattn.grid import Grid
from vidattn.methods import create_method, label, list_methods, method_class, plan
from vidattn.planning.reading import Reading

# options that a method may not be able to serve on every grid
EDGES = ({"density": 0.001}, {"density": 1.0}, {"tile": (1, 16, 16)}, {"near": 50})


def options_of(name: str) -> set[str]:
    return set(method_class(name).options())


def content(grid: Grid, method: str) -> dict[str, torch.Tensor]:
    """Random q and k for methods that read them."""
    if not create_method(method).reads_content:
        return {}
    return {name: torch.randn(2, 3, grid.num_tokens, 16) for name in "qk"}


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("name", list_methods())
def test_defaults_are_valid_on_any_grid(name, grid):
    made = plan(name, grid, **content(grid, name))
    mask = made.mask()
    assert mask.shape[-2:] == (grid.num_tokens, grid.num_tokens)
    assert mask.any(-1).all(), "a query without keys"
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    assert made.density == pytest.approx(mask[..., video, video].double().mean().item())
    text = slice(grid.text_start, grid.text_start + grid.text)
    assert mask[..., text, :].all() and mask[..., :, text].all(), "text is not dense"


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
@pytest.mark.parametrize("name", [n for n in list_methods() if not create_method(n).reads_content])
def test_published_sizes_are_planned_with_no_token_lost(name, grid):
    made = plan(name, grid)
    assert 0 < made.density <= made.visited_density <= 1
    assert made.layout.tokens_per_block.sum() == grid.num_tokens


@pytest.mark.parametrize("name", list_methods())
def test_method_describes_itself(name):
    cls = method_class(name)
    assert cls.__doc__.strip().splitlines()[0].endswith(".")
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    for option in describe(name).options.values():
        assert option.meaning, f"option {option.name} is not explained"


@pytest.mark.parametrize(
    ("name", "state"), [("lvsa", "step"), ("paro", "layer"), ("paro", "step"), ("strided", "layer")]
)
def test_what_a_run_sets_is_no_option(name, state):
    assert state not in describe(name).options and state not in options_of(name)
    with pytest.raises(ValueError, match=f"unknown option of method '{name}' '{state}'"):
        create_method(name, **{state: 1})
    assert label(create_method("strided").at(3)) == "strided"


@pytest.mark.parametrize("name", list_methods())
def test_options_are_given_by_keyword(name):
    parameters = inspect.signature(method_class(name)).parameters.values()
    assert all(x.kind is x.KEYWORD_ONLY for x in parameters)


# each refuses at least one of the grids
HARD = {
    "freeswim": {"window": (3, 3)},
    "lvsa": {"density": 0.02},
    "neighborhood": {"window": 3},
    "power": {"density": 0.02},
    "radial": {"density": 0.02, "near": 1},
    "sliding_tile": {"density": 0.02, "tile": (4, 4, 4)},
    "strided": {"density": 0.02, "tile": (4, 4, 4)},
}
PACKED = {"freeswim", "neighborhood", "sliding_tile", "tesa"}
# the last is too large for those to pack a position of it
GRIDS = [Grid(1, 2, 3), Grid(5, 9, 4, text=11), Grid(9, 8, 8), Grid(512, 1024, 1024)]


@pytest.mark.parametrize("name", list_methods())
def test_what_cannot_be_planned_is_refused_before(name):
    refused = 0
    for grid, options in product(GRIDS, ({}, HARD.get(name, {}), *EDGES)):
        options = {key: x for key, x in options.items() if key in options_of(name)}
        method = create_method(name, **options)
        if grid.num_tokens > 9999 and name not in PACKED:
            continue
        why = None
        try:
            method.check(grid)
        except ValueError as error:
            why = str(error)
        try:
            reading = Reading(*torch.randn(2, 1, 1, grid.num_tokens, 8)) if why is None else None
            made = method.plan(grid, reading)
        except ValueError as error:
            assert str(error) == why
            refused += 1
        else:
            assert why is None and made.grid == grid
    assert refused or name not in HARD


def test_unknown_method_lists_near_ones():
    with pytest.raises(ValueError, match="unknown method 'radail': did you mean 'radial'"):
        plan("radail", Grid(2, 2, 2))


def test_unknown_option_lists_near_ones():
    with pytest.raises(
        ValueError, match="option of method 'radial' 'densty': did you mean 'density'"
    ):
        create_method("radial", densty=0.3)


def test_every_method_is_one_file_with_one_class():
    for name in list_methods():
        assert method_class(name).__module__ == f"vidattn.methods.{name}"
