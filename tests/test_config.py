"""YAML files as dataclasses, and back."""

from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from vidattn.support.config import build, plain, read_yaml


@dataclass(frozen=True)
class Inner:
    """One."""

    size: int | tuple[int, int, int]
    word: str | None = None


@dataclass(frozen=True)
class Outer:
    """Another."""

    inner: Inner | None = None
    share: float = 0.5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    many: tuple[int | float, ...] = ()

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {self.share}")


def test_there_and_back():
    made = build(
        Outer,
        {"inner": {"size": [1, 2, 3]}, "share": 1, "on": True, "kind": "b", "many": [1, 0.5]},
        "x",
    )
    assert made == Outer(Inner((1, 2, 3)), 1.0, True, "b", (1, 0.5))
    assert type(made.share) is float and type(made.many[0]) is int
    text = yaml.safe_dump(plain(made))
    assert build(Outer, yaml.safe_load(text), "x") == made
    assert plain(Outer()) == {}
    assert plain(Inner(5)) == {"size": 5}, "what has no default is always written"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shar": 1}, "unknown key of file x 'shar': did you mean 'share'"),
        ({"inner": {"sise": 1}}, "unknown key of inner of file x 'sise': did you mean 'size'"),
        ({"inner": {}}, "inner of file x lacks 'size'"),
        ({"inner": 3}, "inner of file x must be keys and values or none, got 3"),
        ({"inner": {"size": [1, 2]}}, "must be one integer or t,h,w, got"),
        ({"inner": {"size": True}}, "must be one integer or t,h,w, got True"),
        ({"share": "much"}, "share of file x must be a number, got 'much'"),
        ({"share": 2}, "file x: share must be at most 1"),
        ({"kind": "c"}, "kind of file x must be a or b, got 'c'"),
        ({"on": 1}, "on of file x must be true or false, got 1"),
        ([1], "file x must hold keys and values, got"),
    ],
)
def test_what_does_not_fit_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        build(Outer, given, "file x")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "no valid YAML"), ("- 1", "must hold keys and values"), (None, "cannot be read")],
)
def test_files_that_are_none(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_yaml(path)
