"""Files that ship with the package: the bundled model and the run configurations."""

from pathlib import Path, PurePosixPath

_PACKAGE = Path(__file__).resolve().parents[1]


def resource(relative: str) -> Path:
    """Return the path of a shipped file or folder in a wheel, an editable install or a checkout.

    Raises ValueError for a path that leaves the package, FileNotFoundError for one that is absent.

    >>> resource("configs").name
    'configs'
    """
    parts = PurePosixPath(relative).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(
            f"got resource {relative!r}; needed a path inside the package such as 'assets/tiny-t2v'"
        )
    roots = [_PACKAGE]
    # A checkout keeps assets/ and configs/ beside vidattn/. Without the marker the folder beside us
    # is site-packages, whose assets/ would be someone else's.
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        roots.append(_PACKAGE.parent)
    for root in roots:
        path = root.joinpath(*parts)
        if path.exists():
            return path
    looked = ", ".join(str(root.joinpath(*parts)) for root in roots)
    raise FileNotFoundError(
        f"{relative!r} does not ship with this copy of vidattn (looked for {looked}). "
        "Reinstall vidattn, or restore the folder from the repository."
    )
