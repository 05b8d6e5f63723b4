"""What the catalog reads in the files of the methods is what their classes are."""

import inspect
import typing

import pytest

from vidattn.cache import policy_class
from vidattn.catalog import describe, list_methods, list_policies
from vidattn.methods import create_method, method_class
from vidattn.support.config import show_value


@pytest.mark.parametrize(
    ("home", "name"),
    [("methods", name) for name in list_methods()] + [("cache", name) for name in list_policies()],
)
def test_a_method_or_policy_is_described_as_it_is(home, name):
    of = {"methods": method_class, "cache": policy_class}[home]
    cls, entry = of(name), describe(name, home)
    hints = typing.get_type_hints(cls)
    fields = cls.options()
    assert {key: option.hint for key, option in entry.options.items()} == {
        key: hints[key] for key in fields
    }
    for key, option in entry.options.items():
        assert option.default == show_value(fields[key].default)
    own = [key for key in inspect.get_annotations(cls) if key in fields]
    assert list(entry.options)[: len(own)] == own
    doc, about = (inspect.getdoc(x).replace("``", "") for x in (cls, inspect.getmodule(cls)))
    assert entry.summary.split() == doc.split("\n\n")[0].split()
    assert entry.about.split() == about.split()
    if home == "cache":
        return
    if entry.reads_content is not None:
        assert create_method(name).reads_content is entry.reads_content
    else:
        assert isinstance(inspect.getattr_static(cls, "reads_content"), property)
