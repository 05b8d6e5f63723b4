"""What a run of scripts/train_backbone.py is made of; a YAML file in configs/backbones holds it."""

from dataclasses import dataclass, field
from typing import Literal

Number = int | float


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        name: of timm's or of vidattn's models.
        options: keyword arguments of timm.create_model; classes and channels come from the data,
            and for a model made for one size of images ``img_size`` from ``input.size``.
        pretrained: whether the released weights are downloaded.
        weights: a file to begin with instead, .safetensors or anything torch loads weights-only.
        checkpointing: whether activations are computed again instead of kept.
    """

    name: str
    options: dict = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Tune:
    """Which weights move.

    Args:
        method: "full" for all, "linear" for the classifier, "probe" for efficient probing of the
            last feature map, "lora" for low-rank updates and the classifier.
        queries: of the probe.
        rank, alpha, dropout: of the updates; they are scaled by alpha / rank.
        targets: endings of the names of the layers that are updated.
    """

    method: Literal["full", "linear", "probe", "lora"] = "full"
    queries: int = 16
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attn.qkv", "attn.proj")


@dataclass(frozen=True)
class Data:
    """Where images come from.

    Args:
        source: an .npz file, a folder of idx files, a folder with a folder of class folders per
            split, or "hf:NAME" for a Hugging Face dataset.
        train, test: names of the splits.
        batch_size: per process and backward pass.
        workers: processes that read images, 0 for the training process itself.
        strict: whether an image that cannot be read ends the run; it is skipped otherwise.
    """

    source: str
    train: str = "train"
    test: str = "test"
    batch_size: int = 128
    workers: int = 4
    strict: bool = False


@dataclass(frozen=True)
class Input:
    """The form in which the model sees an image, augmentation aside.

    Args:
        size: pixels a side.
        channels: 1 for grey, 3 for colour.
        mean, std: of a channel in [0, 1]; those of ImageNet unless given.
        crop: share of the resized picture that the central crop of a test image keeps.
    """

    size: int = 224
    channels: Literal[1, 3] = 3
    mean: tuple[Number, ...] | None = None
    std: tuple[Number, ...] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    crop: float = 0.875


@dataclass(frozen=True)
class Augment:
    """Random changes of training images; names and defaults as in timm.data.create_transform.

    Args:
        scale, ratio: of the random crop; (1, 1) for both keeps the picture whole.
        mixup, cutmix: their alphas, 0 for none; both mix the images of a batch.
        mix_prob, switch_prob: how often a batch is mixed, and then by cutmix.
        smoothing: of the labels.
    """

    scale: tuple[Number, Number] = (0.08, 1.0)
    ratio: tuple[Number, Number] = (0.75, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Optimizer:
    """How weights move; `name` is one of timm.optim's.

    Args:
        lr: peak learning rate, for `base_batch` images a step where that is given.
        base_batch: number of images that `lr` is for; it is scaled to those of this run.
        layer_decay: factor on the learning rate for each layer further from the classifier.
        clip: largest norm of the gradient.
    """

    name: str = "adamw"
    lr: float = 1e-3
    base_batch: int | None = None
    weight_decay: float = 0.05
    betas: tuple[Number, Number] | None = None
    eps: float | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run, step by step.

    Args:
        name: how it falls from the peak to `min_lr`; "constant" stays there.
        epochs: from the first step to `min_lr`, the warm-up included.
        cooldown_epochs: at `min_lr`, behind them.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    epochs: int = 300
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    cooldown_epochs: int = 0


@dataclass(frozen=True)
class Run:
    """Everything else.

    Args:
        output: folder of checkpoints, log, plot and weights.
        accumulate: backward passes per step.
        ema: decay of the averaged weights, which are then the ones tested and kept.
        evaluate_every: epochs between two tests.
        save_every, log_every: steps between two checkpoints, two lines of the log; the first is a
            multiple of the second.
        tensorboard: whether the log is also written for TensorBoard.
        deterministic: whether operations that differ from run to run on a GPU are refused.
    """

    output: str
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1
    ema: float | None = None
    evaluate_every: int = 1
    save_every: int = 500
    log_every: int = 50
    tensorboard: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Settings:
    """A whole run."""

    model: Model
    data: Data
    run: Run
    input: Input = Input()
    tune: Tune = Tune()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()

    def __post_init__(self):
        for name, value, low in (
            ("data.batch_size", self.data.batch_size, 1),
            ("data.workers", self.data.workers, 0),
            ("input.size", self.input.size, 1),
            ("schedule.epochs", self.schedule.epochs, 1),
            ("run.accumulate", self.run.accumulate, 1),
            ("run.evaluate_every", self.run.evaluate_every, 1),
            ("run.save_every", self.run.save_every, 1),
            ("run.log_every", self.run.log_every, 1),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if self.run.save_every % self.run.log_every:
            raise ValueError(
                f"run.save_every must be a multiple of run.log_every, "
                f"got {self.run.save_every} and {self.run.log_every}"
            )
        if self.augment.mixes and self.data.batch_size % 2:
            raise ValueError(f"mixup needs an even data.batch_size, got {self.data.batch_size}")
        if self.model.pretrained and self.model.weights:
            raise ValueError("model.pretrained and model.weights are both given; choose one")
        if self.tune.method == "lora" and self.optimizer.layer_decay:
            raise ValueError("optimizer.layer_decay is for tune.method 'full', not 'lora'")
