"""What a clip of moving emoji shows, by plain image processing and a small classifier.

T frames, H height, W width; videos are (T, H, W, 3) float arrays in [0, 1].
"""

import itertools

import numpy as np
from t2v.blobs import Blobs, background_of, blobs_of
from t2v.motion import BOUNCE_FRAMES, CIRCLE_FRAMES
from t2v.naming import Classifier, load_classifier, train_classifier
from t2v.scenes import STEPS

__all__ = ["ASPECTS", "load_classifier", "look", "right", "train_classifier"]

ASPECTS = ("motion", "thing", "background", "whole")
# Pixels a frame: slow things move at 1, bouncing ones at up to 5.
MIN_SPEED = 0.4
MAX_STEP = 9.0
# Pixels between a way and the motion it is taken for.
MAX_ERROR = 6.0
# The least that may be left of a thing's pixels in a frame.
FADED = 0.5


def _pieces(blobs: list[Blobs]) -> list[list[tuple[int, np.ndarray]]]:
    """Unbroken runs of (frame, centroid) in which a thing is wholly, or almost, in view."""
    full = np.quantile([b.pixels for b in blobs], 0.75)
    runs = [[]]
    for t, blob in enumerate(blobs):
        if blob.count == 0 or (blob.cut and blob.pixels < 0.85 * full):
            runs.append([])
        else:
            runs[-1].append((t, blob.centre))
    return [run for run in runs if len(run) > 2]


def _residual(runs: list, columns: np.ndarray, shared: bool) -> tuple[float, np.ndarray]:
    """Root mean square distance of a way from the best a + b * columns, each run with its own a.

    `columns` are (T, K, 2): K ways of (y, x) over time whose weights b are sought. Gives b too.
    """
    times = np.concatenate([[t for t, _ in run] for run in runs])
    way = np.concatenate([[c for _, c in run] for run in runs])
    number = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
    own = np.eye(1 if shared else len(runs))[np.zeros_like(number) if shared else number]
    rows = [
        np.concatenate([own * (axis == 0), own * (axis == 1), columns[times, :, axis]], axis=1)
        for axis in (0, 1)
    ]
    matrix, target = np.concatenate(rows), np.concatenate([way[:, 0], way[:, 1]])
    weights = np.linalg.lstsq(matrix, target, rcond=None)[0]
    error = np.sqrt(2 * np.mean((matrix @ weights - target) ** 2))
    return float(error), weights[2 * own.shape[1] :]


def motion_of(blobs: list[Blobs]) -> str:
    """Name of the motion whose way fits the centroids best, or "none"."""
    runs = _pieces(blobs)
    if sum(map(len, runs)) < max(4, len(blobs) // 3):
        return "none"
    times = np.arange(len(blobs), dtype=float)
    still = np.zeros_like(times)
    straight = np.stack([np.stack([times, still], 1), np.stack([still, times], 1)], 1)
    error, speed = _residual(runs, straight, shared=False)
    found = max(STEPS, key=lambda name: float(np.dot(STEPS[name], speed)))
    errors = {found: error if np.abs(speed).max() >= MIN_SPEED else np.inf}
    for slow, phase in itertools.product((False, True), np.arange(0, 1, 1 / 24)):
        share = (times / BOUNCE_FRAMES[slow] + phase) % 1
        bounce = np.stack([4 * share * (1 - share), still], 1)[:, None]
        error, (height,) = _residual(runs, bounce, shared=True)
        if height < -8:
            errors["bouncing"] = min(error, errors.get("bouncing", np.inf))
        angle = 2 * np.pi * (times / CIRCLE_FRAMES[slow] + phase)
        circle = np.stack([np.sin(angle), np.cos(angle)], 1)[:, None]
        error, (radius,) = _residual(runs, circle, shared=True)
        if radius > 8:
            errors["circling"] = min(error, errors.get("circling", np.inf))
    return min(errors, key=errors.get) if min(errors.values()) < MAX_ERROR else "none"


def whole(blobs: list[Blobs]) -> str:
    """How one thing fails to hold together: "split", "jumps" or "fades"; "yes" where it does."""
    if sum(blob.count > 1 for blob in blobs) > 1:
        return "split"
    steps = [
        np.linalg.norm(b - a) / (t - s)
        for run in _pieces(blobs)
        for (s, a), (t, b) in zip(run, run[1:])
    ]
    if not steps or max(steps) > MAX_STEP:
        return "jumps"
    inside = [blob.pixels for blob in blobs if blob.count and not blob.cut]
    if inside and min(inside) < FADED * np.median(inside):
        return "fades"
    return "yes"


def look(video: np.ndarray, classifier: Classifier) -> dict[str, str]:
    """What is seen in a (T, H, W, 3) video, by aspect."""
    name, picture = background_of(video)
    blobs = [blobs_of(frame, picture) for frame in video]
    seen = (motion_of(blobs), classifier.name(video, blobs), name, whole(blobs))
    return dict(zip(ASPECTS, seen, strict=True))


def right(scene, aspect: str, seen: str) -> bool:
    """Whether what is seen is what the scene asks for."""
    return seen == ("yes" if aspect == "whole" else getattr(scene, aspect))
