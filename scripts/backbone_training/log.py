"""The log of a backbone's training: its columns, and its plot."""

from pathlib import Path

from runs.log import read_log

from vidattn.runs.output import write_atomically

COLUMNS = ("step", "epoch", "lr", "loss", "test_loss", "top1", "top5", "unreadable", "seconds")


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
