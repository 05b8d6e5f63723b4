"""The log of a training run: a CSV file, and TensorBoard where that is wanted."""

import csv
from collections.abc import Sequence
from pathlib import Path

from vidattn.runs.output import write_atomically


class Log:
    """Lines of numbers, one per so many steps.

    Args:
        folder: gets log.csv and the files of TensorBoard.
        columns: of the file, "step" the first.
        start: step that the run goes on from; lines behind it are dropped, they come again.
    """

    def __init__(self, folder: Path, columns: Sequence[str], start: int, tensorboard: bool):
        self.path, self.columns, self.writer = folder / "log.csv", columns, None
        folder.mkdir(parents=True, exist_ok=True)
        lines = [line for line in read_log(self.path) if int(line["step"]) <= start]
        with write_atomically(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    "run.tensorboard needs the tensorboard package: pip install tensorboard"
                ) from error
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def add(self, step: int, **values: float) -> None:
        """Write a line; columns without a value stay empty."""
        line = {"step": step, **{k: f"{v:.6g}" for k, v in values.items()}}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(line)
        for name, value in values.items():
            if self.writer:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        if self.writer:
            self.writer.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """The lines of a log, without one that was being written when the run was killed."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if None not in line.values()]
