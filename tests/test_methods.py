"""Every registered method by the same rules; a new file in vidattn/methods is tested as it is."""

import dataclasses

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from vidattn.grid import Grid
from vidattn.methods import create_method, list_methods, method_class, plan


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
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in cls.__doc__, f"option {field.name} is not explained"


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
