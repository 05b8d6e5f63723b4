"""Clips with their captions: a folder with a .txt beside each, or a table of paths and captions."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# column names of the tables that other trainers read
PATH_COLUMNS = ("path", "video", "video_path", "file_name", "image_path", "image")
CAPTION_COLUMNS = ("caption", "prompt", "text", "cap")


@dataclass(frozen=True)
class Clip:
    """A clip, or a picture, and what it shows.

    Args:
        name: path from the folder of the set.
    """

    path: Path
    name: str
    caption: str

    @property
    def is_picture(self) -> bool:
        """Whether it is one frame."""
        return self.path.suffix.lower() in PICTURES


class Problems:
    """What is wrong with a set of clips: listed, or an error at once.

    Args:
        strict: whether the first raises.
    """

    def __init__(self, strict: bool):
        self.strict, self.found = strict, {}

    def add(self, name: str, reason: str) -> None:
        """Note that a file is left out.

        Raises:
            ValueError: problems are to end the run.
        """
        if self.strict:
            raise ValueError(f"'{name}': {reason} (data.strict is on, so this ends the run)")
        self.found[name] = reason

    def show(self, say: Callable[[str], None], limit: int = 20) -> None:
        """Say what is left out."""
        if self.found:
            say(f"left out {len(self.found)} files:")
        for name, reason in list(self.found.items())[:limit]:
            say(f"  {name}: {reason}")
        if len(self.found) > limit:
            say(f"  and {len(self.found) - limit} more")


def find_clips(source: str, problems: Problems) -> list[Clip]:
    """The clips of a set that have a caption, in the order of their names or of the table.

    Raises:
        ValueError: no such set, a table that is not understood, or none with a caption.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        clips = list(_of_folder(path, problems))
    elif path.suffix in (".jsonl", ".csv") and path.is_file():
        clips = list(_of_table(path, problems))
    else:
        raise ValueError(
            f"data.source '{source}' is neither a folder nor a .jsonl or .csv file that exists"
        )
    if not clips:
        raise ValueError(
            f"data.source '{source}' has no clip with a caption: put a .txt of the same name "
            "beside each clip, or give a .jsonl or .csv file with the columns path and caption"
            + "".join(f"\n  {name}: {reason}" for name, reason in list(problems.found.items())[:5])
        )
    return clips


def _of_folder(root: Path, problems: Problems) -> Iterator[Clip]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name[0] != ".")
    media = [path for path in files if path.suffix.lower() in VIDEOS + PICTURES]
    stems = {path.with_suffix("") for path in media}
    for path in files:
        if path.suffix == ".txt" and path.with_suffix("") not in stems:
            problems.add(str(path.relative_to(root)), "a caption without a clip")
    for path in media:
        name, text = str(path.relative_to(root)), path.with_suffix(".txt")
        if not text.is_file():
            problems.add(name, f"no caption: '{text.name}' is missing")
            continue
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            problems.add(name, f"its caption cannot be read: {error}")
            continue
        yield from _with_caption(path, name, caption, problems)


def _of_table(table: Path, problems: Problems) -> Iterator[Clip]:
    seen = set()
    for number, row in enumerate(_rows(table), 1):
        where = f"{table.name}, row {number}"
        given, caption = (_column(row, names) for names in (PATH_COLUMNS, CAPTION_COLUMNS))
        if given is None:
            raise ValueError(
                f"{where} has no path; a column must be called {' or '.join(PATH_COLUMNS)}, "
                f"it has {', '.join(map(str, row))}"
            )
        path = table.parent / given
        if path.suffix.lower() not in VIDEOS + PICTURES:
            problems.add(given, f"{where}: neither a clip nor a picture by its ending")
        elif not path.is_file():
            problems.add(given, f"{where}: a caption without a clip, there is no such file")
        elif (given, caption) not in seen:
            seen.add((given, caption))
            yield from _with_caption(path, given, " ".join((caption or "").split()), problems)


def _with_caption(path: Path, name: str, caption: str, problems: Problems) -> Iterator[Clip]:
    if caption:
        yield Clip(path, name, caption)
    else:
        problems.add(name, "its caption is empty")


def _rows(table: Path) -> Iterator[dict]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{table}' cannot be read: {error}") from error
    if table.suffix == ".csv":
        yield from csv.DictReader(text.splitlines())
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{table.name}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{table.name}, line {number} must hold keys and values, got {row!r}")
        yield row


def _column(row: dict, names: Iterable[str]) -> str | None:
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)
