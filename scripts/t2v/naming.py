"""Naming things: a small classifier of blobs, trained on poses the clips for training do not have.

B views; frames are (H, W, 3) float arrays in [0, 1].
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import ndimage
from t2v.blobs import Blobs, background_of, blobs_of
from t2v.scenes import THINGS
from tqdm import tqdm

VIEW_PX = 32
NUM_VIEWS = 9


def view_of(frame: np.ndarray, blob: Blobs) -> torch.Tensor | None:
    """The largest blob of a (H, W, 3) frame on grey, as large as fits: (3, 32, 32)."""
    if not blob.count:
        return None
    rows, columns = np.flatnonzero(blob.mask.any(1)), np.flatnonzero(blob.mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    opacity = ndimage.gaussian_filter(blob.mask[box].astype(np.float32), 0.7)[..., None]
    cut = torch.from_numpy(frame[box] * opacity + 0.5 * (1 - opacity)).float().permute(2, 0, 1)
    height, width = cut.shape[1:]
    size = [max(1, round(VIEW_PX * s / max(height, width))) for s in (height, width)]
    cut = F.interpolate(cut[None], size, mode="bilinear", antialias=True)[0]
    top, left = (VIEW_PX - size[0]) // 2, (VIEW_PX - size[1]) // 2
    sides = (left, VIEW_PX - size[1] - left, top, VIEW_PX - size[0] - top)
    return F.pad(cut, sides, value=0.5)


class Classifier(torch.nn.Module):
    """A small convolutional network from a (B, 3, 32, 32) view to logits of the things."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 24, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(24, 48, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(48, 96, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Flatten(), torch.nn.Linear(96 * 16, len(THINGS))),
        )

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Logits (B, number of things) of (B, 3, 32, 32) views."""
        return self.layers(views * 2 - 1)

    @torch.no_grad()
    def name(self, video: np.ndarray, blobs: list[Blobs]) -> str:
        """The thing by the mean of its log-probabilities over the frames that show most of it."""
        seen = [t for t, blob in enumerate(blobs) if blob.count]
        order = sorted(seen, key=lambda t: (blobs[t].cut, -blobs[t].pixels))
        views = [view_of(video[t], blobs[t]) for t in order[:NUM_VIEWS]]
        if not views:
            return "none"
        return list(THINGS)[int(self(torch.stack(views)).log_softmax(-1).mean(0).argmax())]


def _training_views(clips, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (count, 3, 32, 32) of things, as sharp as painted or as soft as decoded, and names."""
    names, views, labels = list(THINGS), [], []
    for index in tqdm(range(count), desc="views of real things", mininterval=10):
        rng = np.random.default_rng((5, index))
        clip, scene = clips.sample(3 * 10**8 + index, (1, 80, 80))
        frame = (clip[:, 0].permute(1, 2, 0).numpy() + 1) / 2
        blur = rng.choice([0, 0, 0.6, 1.0, 1.4])
        frame = ndimage.gaussian_filter(frame, (blur, blur, 0))
        view = view_of(frame, blobs_of(frame, background_of(frame[None])[1]))
        if view is not None:
            views.append(view)
            labels.append(names.index(scene.thing))
    return torch.stack(views), torch.tensor(labels)


def train_classifier(clips, path: Path, count: int = 8000, epochs: int = 8) -> Classifier:
    """Train on views of real things and save as safetensors."""
    views, labels = _training_views(clips, count)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    total = epochs * math.ceil(len(views) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    for _ in tqdm(range(epochs), desc="classifier", mininterval=10):
        for picks in torch.randperm(len(views)).split(64):
            batch = views[picks] * (0.8 + 0.4 * torch.rand(len(picks), 3, 1, 1))
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
