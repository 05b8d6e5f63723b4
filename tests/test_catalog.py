"""What the catalog reads in the files of the methods is what their classes are."""

import inspect
import typing

import pytest

from vidattn.catalog import describe, list_methods
from vidattn.methods import create_method, method_class
from vidattn.support.config import show_value


@pytest.mark.parametrize("name", list_methods())
def test_a_method_is_described_as_it_is(name):
    cls, entry = method_class(name), describe(name)
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
    if entry.reads_content is not None:
        assert create_method(name).reads_content is entry.reads_content
    else:
        assert isinstance(inspect.getattr_static(cls, "reads_content"), property)
