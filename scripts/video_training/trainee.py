"""Transformers in training with everything that moves them.

Letters: B batch.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from timm.optim import create_optimizer_v2
from torch import nn
from video_training.attention import Sparse
from video_training.batches import Batch, Loader
from video_training.noise import Process
from video_training.pipeline import (
    first_line,
    load_scheduler,
    load_transformer,
    model_folder,
)
from video_training.prepare import Prepared
from video_training.settings import Optimizer, Settings, Tune

from vidattn.grid import Size
from vidattn.pipelines.family import family_of
from vidattn.pipelines.learned import Learned
from vidattn.runs.model import pipeline_config

# the one adapter, as peft names it
ADAPTER = "default"


@dataclass
class Expert:
    """One transformer in training.

    Args:
        model: as the accelerator has prepared it.
        plain: without the wrappers of several processes.
        learned: what methods have in its layers.
    """

    model: nn.Module
    plain: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMAModel | None
    learned: Learned

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that move, by name."""
        return {k: p for k, p in self.plain.named_parameters() if p.requires_grad}


@dataclass
class Trainee:
    """All that a step changes, or reads.

    Args:
        ranges: noise levels that experts share out, as shares of noise.
        dtype: of the weights that do not move.
        step: that comes next.
    """

    settings: Settings
    accelerator: Accelerator
    experts: dict[str, Expert]
    process: Process
    sparse: Sparse
    ranges: dict[str, tuple[float, float]]
    dtype: torch.dtype
    step: int = 0
    seconds: float = 0.0


def make_trainee(settings: Settings, accelerator: Accelerator) -> Trainee:
    """The transformers before the first step.

    Raises:
        ValueError: settings that do not fit the model.
    """
    folder, model = model_folder(settings.model.name), settings.model
    process = Process(load_scheduler(folder), settings.noise)
    ranges = expert_ranges(pipeline_config(str(folder)).get("boundary_ratio"), model.experts)
    sparse = Sparse(settings.attention)
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp and (settings.run.ema or not accelerator.is_fsdp2):
        raise ValueError("FSDP is trained with --fsdp_version 2, and without run.ema")
    set_seed(settings.run.seed)
    experts = {}
    # shards hold one dtype, and weights that move are float32
    needs_all = is_fsdp or settings.tune.method == "full"
    dtype = torch.float32 if needs_all else model.torch_dtype
    for name in model.experts:
        plain = load_transformer(folder, name, dtype)
        learned = sparse.attach(name, plain)
        prepare_tuning(plain, settings.tune, learned)
        if settings.run.checkpointing:
            plain.enable_gradient_checkpointing()
        plain.train()
        experts[name] = _make_expert(plain, learned, settings, accelerator)
    return Trainee(settings, accelerator, experts, process, sparse, ranges, dtype)


def expert_ranges(
    boundary: float | None, experts: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    """The shares of noise that each expert serves.

    Args:
        boundary: between the experts of a pipeline; None where one serves all.

    Raises:
        ValueError: a second expert in a pipeline without a boundary.
    """
    if boundary is None:
        if len(experts) > 1:
            raise ValueError(
                f"model.experts {', '.join(experts)}: the pipeline has no boundary_ratio between "
                "experts; train one of them"
            )
        return {experts[0]: (0.0, 1.0)}
    served = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
    return {name: served[name] for name in experts}


def prepare_tuning(model: nn.Module, tune: Tune, learned: Learned | None = None) -> None:
    """Let only those weights of a transformer move that are tuned.

    Args:
        learned: what methods have in its layers, which moves too.

    Raises:
        ValueError: target_modules that the model does not have.
    """
    if tune.method == "full":
        model.requires_grad_(True)
        return
    model.requires_grad_(False)
    targets = tune.target_modules
    config = LoraConfig(
        r=tune.r,
        lora_alpha=tune.lora_alpha,
        lora_dropout=tune.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=tune.use_dora,
        use_rslora=tune.use_rslora,
    )
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"tune.target_modules {targets!r}: {first_line(error)}") from error
    for module in learned.modules.values() if learned else ():
        module.requires_grad_(True)
    cast_training_params(model, torch.float32)


def _make_expert(
    plain: nn.Module, learned: Learned, settings: Settings, accelerator: Accelerator
) -> Expert:
    run = settings.run
    params = [p for p in plain.parameters() if p.requires_grad]
    optimizer = make_optimizer(params, settings.optimizer)
    model, optimizer = accelerator.prepare(plain, optimizer)
    expert = Expert(model, accelerator.unwrap_model(model), optimizer, None, learned)
    if run.ema:
        expert.average = EMAModel(expert.trained.values(), decay=run.ema)
    return expert


def make_optimizer(params: list[nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of some parameters.

    Raises:
        ValueError: no such optimizer, or options that it does not take.
    """
    given = {"betas": options.betas, "eps": options.eps}
    try:
        return create_optimizer_v2(
            params,
            opt=options.name,
            lr=options.lr,
            weight_decay=options.weight_decay,
            **{key: value for key, value in given.items() if value is not None},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer '{options.name}': {error}") from error


def grid_size(plain: nn.Module, batch: Batch) -> Size:
    """(t, h, w) of the tokens of a batch."""
    arguments = {**batch.arguments, "hidden_states": batch.latents}
    return family_of(plain).place(plain, arguments).size


def check_sizes(trainee: Trainee, prepared: Prepared, loader: Loader) -> None:
    """Try the attention on every size of a set.

    Raises:
        ValueError: it cannot serve one of them.
    """
    plain = next(iter(trainee.experts.values())).plain
    firsts = {sample.size: sample for sample in reversed(prepared.samples)}
    sizes = {}
    for (frames, height, width), sample in firsts.items():
        batch = loader.read([sample], [False])
        sizes[f"clips of {frames} frames of {height} x {width}"] = grid_size(plain, batch)
    trainee.sparse.check(sizes)
