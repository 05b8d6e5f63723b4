"""Shipped files are found, and an absent one is named."""

import pytest

from vidattn.support.resources import resource


def test_a_shipped_folder_is_found():
    assert resource("configs").is_dir()


def test_an_absent_file_is_named():
    with pytest.raises(FileNotFoundError, match="'assets/huge-t2v' does not ship"):
        resource("assets/huge-t2v")


@pytest.mark.parametrize("relative", ["", "/etc", "../secrets", "assets/../../secrets"])
def test_a_path_that_leaves_the_package_is_refused(relative):
    with pytest.raises(ValueError, match="needed a path inside the package"):
        resource(relative)
