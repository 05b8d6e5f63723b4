"""The log of a training run: a CSV file, its plot, and TensorBoard where that is wanted."""

import csv
from pathlib import Path

from vidattn.commands.output import write_atomically

COLUMNS = ("step", "epoch", "lr", "loss", "test_loss", "top1", "top5", "unreadable", "seconds")


class Log:
    """Lines of numbers, one per so many steps and one per test.

    Args:
        folder: gets log.csv, curves.png and the files of TensorBoard.
        start: step that the run goes on from; lines behind it are dropped, they come again.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool):
        self.path, self.writer = folder / "log.csv", None
        folder.mkdir(parents=True, exist_ok=True)
        lines = [line for line in read_log(self.path) if int(line["step"]) <= start]
        with write_atomically(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
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
            csv.DictWriter(file, COLUMNS).writerow(line)
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


def draw_log(path: Path, picture: Path) -> None:
    """Plot loss and accuracy over epochs from a log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(path)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, columns in ((left, ("loss", "test_loss")), (right, ("top1",))):
        for column in columns:
            points = [(float(x["epoch"]), float(x[column])) for x in lines if x[column]]
            if points:
                axes.plot(*zip(*points), marker="." if column != "loss" else None, label=column)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(["training loss", "test loss"][: len(left.lines)])
    left.set_ylabel("cross-entropy")
    right.set_ylabel("test accuracy, %")
    with write_atomically(picture) as partial:
        figure.savefig(partial, dpi=120)
    pyplot.close(figure)
