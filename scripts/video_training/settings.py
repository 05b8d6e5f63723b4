"""What a run of scripts/train_video.py is made of; a YAML file in configs/training holds it."""

from dataclasses import dataclass, field
from typing import Literal

import torch

Number = int | float
# a run that is resumed may differ in these, for they change no number that is computed
FREE = (
    *("data.cache", "data.workers", "output.also", "output.merge"),
    *("run.output", "run.save_every", "run.log_every", "run.tensorboard"),
)


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        name: a hub id, or a folder in the diffusers layout.
        experts: components of the pipeline that are trained; both of them for Wan 2.2 A14B.
        dtype: of the frozen weights, of the text embeddings and of the latents that are kept.
            With tune.method "full" the weights are float32, whatever this says.
        guidance: the guidance that is embedded, for models that have it as an input.
        vae_tiling: whether clips are encoded in tiles, to save memory.
        call: further arguments of the pipeline, such as max_sequence_length.
    """

    name: str
    experts: tuple[str, ...] = ("transformer",)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    guidance: float = 1.0
    vae_tiling: bool = False
    call: dict = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Data:
    """Where clips come from, and what is cut from them.

    Args:
        source: a folder of clips and pictures with a .txt beside each, or a .jsonl or .csv file
            with the columns "path" (or "video", "video_path", "file_name") and "caption" (or
            "prompt", "text"); paths are from its folder.
        cache: folder that latents and text embeddings are kept in; they take their part of it by
            what made them, so that several runs may share it.
        buckets: (frames, height, width) each; a clip goes to the one of the nearest aspect ratio,
            and of those to the longest that it fills. Pictures go to buckets of one frame.
        fps: frames per second that clips are resampled to, None for their own.
        extract: the frames that are taken: "head" the first, "uniform" `samples` stretches evenly
            spaced, "random" `samples` stretches drawn once, "chunk" all stretches that follow one
            another.
        samples: per clip, for "uniform" and "random".
        batch_size: clips per process and backward pass.
        drop_caption: share of the captions that are replaced by the empty one, for guidance.
        workers: threads that read ahead.
        strict: whether a clip that cannot be read, is too short or has no caption, or a caption
            without a clip, ends the run; they are skipped and listed otherwise.
    """

    source: str
    buckets: tuple[tuple[int, int, int], ...]
    cache: str = "runs/cache"
    fps: float | None = 16.0
    extract: Literal["head", "uniform", "random", "chunk"] = "head"
    samples: int = 1
    batch_size: int = 1
    drop_caption: float = 0.1
    workers: int = 2
    strict: bool = False


@dataclass(frozen=True)
class Ramp:
    """A density that falls over the first steps of a run.

    Args:
        start: density at the first step; 1 is dense.
        steps: of training, until the density of the method is reached.
        every: so many steps it falls, evenly.
    """

    start: float = 1.0
    steps: int = 500
    every: int = 50


@dataclass(frozen=True)
class Attention:
    """The attention that the model learns to live with; pictures are trained with dense attention.

    Args:
        method, options: a name of `vidattn list` and its options, or
        schedule: a YAML file or the name of a preset.
        dense_layers, dense_steps: first layers and first denoising steps that stay dense, as in
            vidattn.patch of a pipeline. In training the noise level says which step it would be.
        sampler_steps: that turn a count of denoising steps into a share.
        ramp: of the density, for methods that have one.
        align: weight of the mean squared difference to the output of the dense model: of the model
            before tuning by LoRA, and of the model as it is in full tuning.
    """

    method: str | None = None
    options: dict = field(default_factory=dict)
    schedule: str | None = None
    dense_layers: int | float | None = None
    dense_steps: int | float | None = None
    sampler_steps: int = 50
    ramp: Ramp | None = None
    align: float = 0.0


@dataclass(frozen=True)
class Tune:
    """Which weights move; the names behind `method` are those of peft.LoraConfig.

    Args:
        method: "lora" for low-rank updates, "full" for all weights of the transformer.
        target_modules: endings of the names of the layers that are updated, or one regular
            expression for the whole name.
    """

    method: Literal["lora", "full"] = "lora"
    r: int = 32
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_dora: bool = False
    use_rslora: bool = False


@dataclass(frozen=True)
class Noise:
    """Noise levels and the weight of each in the loss; names as in diffusers.training_utils.

    Args:
        density: of the levels before they are shifted.
        shift: of flow matching towards noise; None for what the scheduler of the model says.
        weighting: of the loss; "min_snr" is for models that predict noise or v, the others but
            "none" for flow matching.
        snr_gamma: of "min_snr".
    """

    density: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float | None = None
    weighting: Literal["none", "sigma_sqrt", "cosmap", "min_snr"] = "none"
    snr_gamma: float = 5.0


@dataclass(frozen=True)
class Optimizer:
    """How weights move; `name` is one of timm.optim's, `schedule` one of diffusers.optimization's.

    Args:
        clip: largest norm of the gradient.
    """

    name: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[Number, Number] | None = None
    eps: float | None = None
    clip: float | None = 1.0
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = (
        "constant_with_warmup"
    )
    warmup_steps: int = 100


@dataclass(frozen=True)
class Output:
    """What a run leaves beside the weights with the keys of diffusers.

    Args:
        also: layouts that the low-rank updates are written in too: "comfy", "musubi".
        merge: whether the transformer with the updates added is written too.
    """

    also: tuple[Literal["comfy", "musubi"], ...] = ()
    merge: bool = False


@dataclass(frozen=True)
class Run:
    """Everything else.

    Args:
        output: folder of checkpoints, log and weights.
        steps: of the optimizer.
        precision: of the computation; "fp32" for that of the weights.
        accumulate: backward passes per step.
        checkpointing: whether activations are computed again instead of kept.
        ema: decay of averaged weights, which are then the ones written.
        save_every, log_every: steps between two checkpoints, two lines of the log.
        tensorboard: whether the log is also written for TensorBoard.
    """

    output: str
    steps: int
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    accumulate: int = 1
    checkpointing: bool = True
    ema: float | None = None
    save_every: int = 250
    log_every: int = 10
    tensorboard: bool = False


@dataclass(frozen=True)
class Settings:
    """A whole run."""

    model: Model
    data: Data
    run: Run
    attention: Attention
    tune: Tune = Tune()
    noise: Noise = Noise()
    optimizer: Optimizer = Optimizer()
    output: Output = Output()

    def __post_init__(self):
        ramp = self.attention.ramp or Ramp()
        for name, value, low in (
            ("data.samples", self.data.samples, 1),
            ("data.batch_size", self.data.batch_size, 1),
            ("data.workers", self.data.workers, 1),
            ("attention.sampler_steps", self.attention.sampler_steps, 1),
            ("ramp.steps", ramp.steps, 1),
            ("ramp.every", ramp.every, 1),
            ("tune.r", self.tune.r, 1),
            ("run.steps", self.run.steps, 1),
            ("run.accumulate", self.run.accumulate, 1),
            ("run.save_every", self.run.save_every, 1),
            ("run.log_every", self.run.log_every, 1),
            ("attention.align", self.attention.align, 0),
            ("optimizer.warmup_steps", self.optimizer.warmup_steps, 0),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not 0 < ramp.start <= 1:
            raise ValueError(f"ramp.start must be a density above 0 and up to 1, got {ramp.start}")
        if not 0 <= self.data.drop_caption <= 1:
            raise ValueError(f"data.drop_caption must be from 0 to 1, got {self.data.drop_caption}")
        if self.data.fps is not None and not self.data.fps > 0:
            raise ValueError(f"data.fps must be above 0 or null, got {self.data.fps}")
        if not self.data.buckets:
            raise ValueError("data.buckets is empty; give at least one [frames, height, width]")
        if not self.model.experts or len(set(self.model.experts)) < len(self.model.experts):
            raise ValueError(f"model.experts must name components once, got {self.model.experts}")
        if self.run.ema is not None and not 0 < self.run.ema < 1:
            raise ValueError(f"run.ema must be between 0 and 1, or null, got {self.run.ema}")
        if self.tune.method == "full" and (self.output.also or self.output.merge):
            raise ValueError("output.also and output.merge are for tune.method 'lora', not 'full'")
