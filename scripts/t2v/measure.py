"""What a clip shows, by plain image processing: where the item goes, what it is, its colour.

T frames, H height, W width; videos are (T, H, W, 3) float arrays in [0, 1]. Backgrounds have
almost no chroma, items have much, which is what tells them apart.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import ndimage
from t2v.data import COLOURS, DIRECTIONS, ITEMS, Clips, Scene
from tqdm import tqdm

ASPECTS = ("direction", "item", "colour")
MIN_CHROMA = 0.14
MIN_PIXELS = 60
# The items move at 1.5 pixels a frame.
MIN_SPEED = 0.3
NUM_VIEWS = 9


def segment(frame: np.ndarray) -> np.ndarray:
    """Mask (H, W) of the largest patch of colour of a (H, W, 3) frame; empty when too small."""
    chroma = ndimage.gaussian_filter(frame.max(-1) - frame.min(-1), 0.6)
    mask = chroma > MIN_CHROMA
    # Straps and soles of one item count as one patch.
    labels, count = ndimage.label(ndimage.binary_dilation(mask, iterations=2))
    if count == 0:
        return mask
    sizes = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    mask &= labels == 1 + int(np.argmax(sizes))
    return mask if mask.sum() >= MIN_PIXELS else np.zeros_like(mask)


def track(video: np.ndarray) -> np.ndarray:
    """Least-squares velocity (y, x) in pixels per frame of the item's centroid; NaN if unseen."""
    seen = [(t, ndimage.center_of_mass(m)) for t, m in enumerate(map(segment, video)) if m.any()]
    if len(seen) < max(2, len(video) // 2):
        return np.full(2, np.nan)
    times, centres = zip(*seen, strict=True)
    return np.polyfit(times, np.array(centres), 1)[0]


def direction_of(video: np.ndarray) -> str:
    """Name of the direction the item moves in, or "none"."""
    velocity = track(video)
    if not np.isfinite(velocity).all() or np.abs(velocity).max() < MIN_SPEED:
        return "none"
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], velocity)))


def colour_of(video: np.ndarray) -> str:
    """Name of the tint whose direction in RGB is nearest to the item's, or "none"."""
    middle = video[len(video) // 2]
    mask = segment(middle)
    if not mask.any():
        return "none"
    rgb = middle[mask].mean(0)

    def cosine(name: str) -> float:
        tint = np.array(COLOURS[name])
        return float(rgb @ tint / np.linalg.norm(rgb) / np.linalg.norm(tint))

    return max(COLOURS, key=cosine)


def view_of(frame: np.ndarray) -> torch.Tensor | None:
    """The item of a (H, W, 3) frame, untinted, as Fashion-MNIST has it: (1, 28, 28)."""
    mask = segment(frame)
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    grey = frame[box].max(-1) * ndimage.gaussian_filter(mask[box].astype(np.float32), 0.5)
    grey = torch.from_numpy(np.ascontiguousarray(grey / max(np.quantile(grey, 0.95), 0.1)))
    height, width = grey.shape
    size = [max(1, round(28 * s / max(height, width))) for s in (height, width)]
    grey = F.interpolate(grey[None, None].float(), size, mode="bilinear", antialias=True)[0]
    top, left = (28 - size[0]) // 2, (28 - size[1]) // 2
    return F.pad(grey, (left, 28 - size[1] - left, top, 28 - size[0] - top)).clamp(0, 1)


class Classifier(torch.nn.Module):
    """A small convolutional network from a (B, 1, 28, 28) view to item logits (B, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(7)),
            *(torch.nn.Flatten(), torch.nn.Linear(64, len(ITEMS))),
        )

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Logits (B, 7) of (B, 1, 28, 28) views."""
        return self.layers(views * 2 - 1)

    @torch.no_grad()
    def name(self, video: np.ndarray) -> str:
        """The item in a video by the mean of its log-probabilities over frames, or "none"."""
        picks = np.linspace(0, len(video) - 1, min(NUM_VIEWS, len(video))).round().astype(int)
        views = [v for v in (view_of(video[t]) for t in picks) if v is not None]
        if not views:
            return "none"
        return list(ITEMS)[int(self(torch.stack(views)).log_softmax(-1).mean(0).argmax())]


def _training_views(clips: Clips, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    names, views, labels = list(ITEMS), [], []
    for index in tqdm(range(count), desc="views of real items"):
        clip, scene = clips.sample(3 * 10**8 + index, (1, 64, 64))
        frame = (clip[:, 0].permute(1, 2, 0).numpy() + 1) / 2
        # The softness of a decoder, on half of them.
        blur = np.random.default_rng(index).choice([0, 0, 0.6, 1.0])
        view = view_of(ndimage.gaussian_filter(frame, (blur, blur, 0)))
        if view is not None:
            views.append(view)
            labels.append(names.index(scene.item))
    return torch.stack(views), torch.tensor(labels)


def train_classifier(clips: Clips, path: Path, count: int = 6000, epochs: int = 8) -> Classifier:
    """Train on segmented views of real train-split items and save as safetensors."""
    views, labels = _training_views(clips, count)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    total = epochs * math.ceil(len(views) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    for _ in tqdm(range(epochs), desc="classifier"):
        for picks in torch.randperm(len(views)).split(64):
            batch = views[picks] * (0.7 + 0.3 * torch.rand(len(picks), 1, 1, 1))
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(batch.roll(shift, (2, 3))), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def load_classifier(path: Path) -> Classifier:
    """The classifier saved by `train_classifier`."""
    model = Classifier()
    model.load_state_dict(load_file(path))
    return model.eval()


def look(video: np.ndarray, classifier: Classifier) -> dict[str, str]:
    """What is seen in a (T, H, W, 3) video, by aspect."""
    seen = (direction_of(video), classifier.name(video), colour_of(video))
    return dict(zip(ASPECTS, seen, strict=True))


def right(scene: Scene, aspect: str, seen: str) -> bool:
    """Whether what is seen is what the scene asks for."""
    return seen == getattr(scene, aspect)
