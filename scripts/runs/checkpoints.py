"""Folders of checkpoints that appear whole or not at all, and go on only with the same settings."""

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS = "settings.json"


@contextmanager
def new_checkpoint(
    folder: Path, step: int, record: dict[str, object], *, is_main: bool = True, wait=lambda: None
) -> Iterator[Path]:
    """Yield a folder to write in; behind the block it has its name, and older ones are gone.

    Killed at any point, or out of disk space, the checkpoint before it stays whole.

    Args:
        record: the settings, as `require_same` compares them.
        is_main: whether this process is the one that names and deletes.
        wait: waits for the other processes.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / SETTINGS).write_text(json.dumps(record, indent=1))
        wait()
        yield partial
        wait()
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if is_main:
        # a checkpoint of this step can stand there when a run ends again at its last step
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for other in folder.glob("step-*"):
            if other != final:
                shutil.rmtree(other)
    wait()


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    found = [path for path in folder.glob("step-*") if path.suffix != ".partial"]
    return max(found, default=None)


def require_same(path: Path, record: dict[str, object], free: Collection[str]) -> None:
    """Compare the settings of a checkpoint with those of the run that wants to go on from it.

    Args:
        free: settings that may differ, for they change no number that is computed.

    Raises:
        ValueError: others differ; they are listed.
    """
    before = json.loads((path / SETTINGS).read_text())
    now = json.loads(json.dumps(record))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in {**before, **now}
        if key not in free and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"'{path}' was written with other settings: {'; '.join(changed)}. "
            "Set them back, or choose another run.output"
        )
