"""The table of scripts/bench_quality.py, from the figures of single clips."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vidattn.quality.fvd import frechet_distance
from vidattn.quality.measures import MEASURES

NUM_RESAMPLES = 2000
TITLES = {measure.key: measure.column for measure in MEASURES.values()}
FORMS = {measure.key: measure.form for measure in MEASURES.values()}
# what a bootstrap interval is given for; FVD is one figure about all clips
PER_CLIP = [key for key in TITLES if key != "fvd"]
NOTES = """\
density: kept pairs over all pairs of video tokens in the sparse calls; in all: with the dense
layers and steps. recall: share of dense attention's mass on the pairs that are read; error: of an
attention layer's output, relative root mean square, both on {num_layers} layers and three steps of
one dense clip. The other figures compare each clip with the dense clip of the same prompt and seed,
means over clips; in brackets the 95 % bootstrap interval, resampled by prompts. PSNR gain: over the
same clips of the same method, not rectified. Methods stand in the order of PSNR.
freeswim exists for videos larger than those a model was trained on, and reads a window of the size
of those; here its window is cut to meet the density, and a token reads a part of a frame only.
"""


@dataclass(frozen=True)
class Compared:
    """One that is compared.

    Args:
        asked: the density that was asked for.
        label: what its clips are found by.
        plain: the label of the same method unrectified, where this one is rectified.
    """

    asked: float
    label: str
    plain: str | None = None


def summarize(lines: Iterable[dict], choices: Sequence[Compared]) -> dict[str, object]:
    """Means and intervals of every method, and what the others say they cannot do.

    The plain methods of one density are compared over the prompts and seeds that all of them have,
    and so are the rectified ones, each with the same clips of its plain self.

    Args:
        lines: the results of ``bench_quality``, in any order.
    """
    labels = {choice.label for choice in choices}
    lines = [line for line in lines if line["label"] in labels]
    errors = {line["label"]: line["error"] for line in lines if "error" in line}
    attention = {x["label"]: x["layers"] for x in lines if "layers" in x}
    clips: dict[str, dict[tuple[int, int], dict]] = {label: {} for label in labels}
    for line in lines:
        if line["kind"] == "clip":
            clips[line["label"]][line["prompt"], line["seed"]] = line
    possible = [choice for choice in choices if choice.label not in errors]
    rows = []
    for asked in sorted({choice.asked for choice in possible}):
        some = [x for x in possible if x.asked == asked]
        plain = [x.label for x in some if not x.plain]
        pairs = _shared(clips, plain)
        rows += [_row(asked, [clips[x][pair] for pair in pairs], attention) for x in plain if pairs]
        rectified = [x for x in some if x.plain]
        pairs = _shared(clips, [label for x in rectified for label in (x.label, x.plain)])
        for x in rectified if pairs else ():
            found, before = ([clips[label][pair] for pair in pairs] for label in (x.label, x.plain))
            rows.append(_row(asked, found, attention) | {"gain": _gain(found, before)})
    return {"rows": rows, "errors": errors}


def _shared(clips: dict[str, dict], labels: Sequence[str]) -> list[tuple[int, int]]:
    """Prompts and seeds of which all these labels have a clip."""
    return sorted(set.intersection(*(set(clips[x]) for x in labels))) if labels else []


def _gain(clips: Sequence[dict], plain: Sequence[dict]) -> dict[str, object]:
    """How much more PSNR the same clips have than without rectification."""
    values = np.array([x["psnr_db"] - y["psnr_db"] for x, y in zip(clips, plain)])
    prompts = np.array([clip["prompt"] for clip in clips])
    return {"mean": float(values.mean()), "interval": interval(values, prompts)}


def _row(asked: float, clips: Sequence[dict], attention: dict) -> dict:
    prompts = np.array([clip["prompt"] for clip in clips])
    row = {"asked": asked} | {x: clips[0][x] for x in ("label", "method", "rectify")}
    row["clips"] = [[clip["prompt"], clip["seed"]] for clip in clips]
    row |= {x: float(np.mean([clip[x] for clip in clips])) for x in ("density", "density_in_all")}
    for key in PER_CLIP:
        if all(key in clip for clip in clips):
            values = np.array([clip[key] for clip in clips])
            row[key] = {"mean": float(values.mean()), "interval": interval(values, prompts)}
    if len(clips) > 1 and all("features" in clip for clip in clips):
        sets = [torch.tensor([clip[x] for clip in clips]) for x in ("features", "dense_features")]
        row["fvd"] = {"mean": frechet_distance(*sets), "interval": None}
    if layers := attention.get(row["label"]):
        row["layers"] = layers
        for name in ("recall", "output_error"):
            row[name] = float(np.mean([layer[name] for layer in layers]))
    return row


def interval(values: np.ndarray, prompts: np.ndarray) -> list[float] | None:
    """The 95 % bootstrap interval of a mean; None with one prompt.

    Prompts are drawn with replacement, each with all its seeds: clips of one prompt are alike.

    Args:
        values: (N,) one for each clip.
        prompts: (N,) the prompt of each.
    """
    names = np.unique(prompts)
    if len(names) < 2:
        return None
    sums = np.array([[values[prompts == x].sum(), (prompts == x).sum()] for x in names])
    draws = np.random.default_rng(0).integers(len(names), size=(NUM_RESAMPLES, len(names)))
    totals = sums[draws].sum(1)
    return np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5]).tolist()


def to_markdown(report: dict) -> str:
    """One table for each density that was asked for."""
    machine, setting, rows = report["hardware"], report["setting"], report["rows"]
    num_prompts, num_seeds = report["asked"]
    layers = max((len(row["layers"]) for row in rows if "layers" in row), default=0)
    text = (
        f"# Quality against density\n\n"
        f"The bundled model (weights {setting['model']}), {setting['frames']} frames of "
        f"{setting['side']}x{setting['side']}, {setting['steps']} steps, guidance "
        f"{setting['guidance']:g}; the first {setting['dense_layers']} layers and "
        f"{setting['dense_steps']:g} of the steps are dense. {machine['cpu']}, torch "
        f"{machine['torch']}.\n`{report['command']}`\n\n"
        f"{NOTES.format(num_layers=layers)}"
    )
    for asked in sorted({row["asked"] for row in rows}):
        text += f"\n## Density {asked:g}\n"
        for is_gain in (False, True):
            some = [row for row in rows if row["asked"] == asked and ("gain" in row) == is_gain]
            if some:
                prompts, seeds = (len({clip[i] for clip in some[0]["clips"]}) for i in (0, 1))
                text += (
                    f"\n{'Rectified: ' if is_gain else ''}{len(some[0]['clips'])} clips of each "
                    f"method, of {prompts} of {num_prompts} held-out prompts and {seeds} of "
                    f"{num_seeds} seeds.\n\n{_table(some)}"
                )
    if report["errors"]:
        lines = [f"- `{label}`: {error}\n" for label, error in report["errors"].items()]
        text += f"\n## Not possible on this grid\n\n{''.join(lines)}"
    return text


def _table(rows: Sequence[dict]) -> str:
    keys = [key for key in TITLES if all(key in row for row in rows)]
    beside = [name for name in ("recall", "output_error") if any(name in row for row in rows)]
    titles = ["method", "density", "in all"]
    titles += [{"recall": "recall", "output_error": "error"}[name] for name in beside]
    titles += [TITLES[key] for key in keys]
    titles += ["PSNR gain"] * ("gain" in rows[0])
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in sorted(rows, key=lambda row: -row["psnr_db"]["mean"]):
        names = ("density", "density_in_all", *beside)
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        cells += [_cell(FORMS[key], row[key]) for key in keys]
        cells += [_cell("{:+.2f} dB", row["gain"])] if "gain" in row else []
        lines.append([f"`{row['label']}`", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(form: str, figure: dict) -> str:
    mean, limits = form.format(figure["mean"]), figure["interval"]
    if limits is None:
        return mean
    low, high = (form.format(x).removesuffix(" dB") for x in limits)
    return f"{mean} ({low} to {high})"
