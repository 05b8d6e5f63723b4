"""What people combine with a patched pipeline, and how it is put on and taken off.

A pairing is one entry of ``PAIRINGS``; ``test_pairings`` runs it in every order, and the table in
the README of pipelines/ is printed from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import accelerate
import diffusers
import torch
from diffusers import guiders
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pairing:
    """Something that changes how a Wan pipeline runs.

    Args:
        put: puts it on a pipeline, and gives what takes it off again, if anything does.
        what: a word on it, for the table.
        skips: it leaves attention calls out.
        comes_off: what takes it off is given by ``put``.
        rounding: relative error that is left when it has come off.
        package: what it needs that is no dependency.
        options: of the run.
        guider: makes what guides a modular pipeline of the same parts, which runs instead.
    """

    put: Callable[[diffusers.WanPipeline], Callable[[], object] | None]
    what: str
    skips: bool = False
    comes_off: bool = True
    rounding: float = 0.0
    package: str | None = None
    options: tuple[tuple[str, object], ...] = ()
    guider: Callable[[], object] | None = None

    @property
    def missing(self) -> str | None:
        """The package that is not here."""
        return self.package if self.package and find_spec(self.package) is None else None


PAIRINGS: dict[str, Pairing] = {}


def pairing(what: str, **facts: object):
    """Enters a function under its name."""

    def enter(put):
        PAIRINGS[put.__name__.replace("_", " ")] = Pairing(put, what, **facts)
        return put

    return enter


def _cache(config: object, pipe: diffusers.WanPipeline) -> Callable[[], None]:
    pipe.transformer.enable_cache(config)
    return pipe.transformer.disable_cache


@pairing("step cache of diffusers", skips=True)
def first_block_cache(pipe):
    return _cache(FirstBlockCacheConfig(threshold=0.5), pipe)


@pairing("step cache of diffusers", skips=True)
def TaylorSeer(pipe):
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    )
    return _cache(config, pipe)


@pairing("step cache of diffusers", skips=True)
def MagCache(pipe):
    ratios = torch.linspace(1.0, 0.97, 6)
    config = MagCacheConfig(threshold=1.0, num_inference_steps=6, mag_ratios=ratios)
    return _cache(config, pipe)


@pairing("step cache of diffusers", skips=True)
def SeaCache(pipe):
    return _cache(SeaCacheConfig(threshold=10.0), pipe)


@pairing("step cache of diffusers", skips=True)
def pyramid_attention_broadcast(pipe):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: int(pipe.current_timestep),
        spatial_attention_block_identifiers=("blocks.*attn1",),
    )
    return _cache(config, pipe)


@pairing("step cache of another library", skips=True, package="cache_dit")
def cache_dit(pipe):
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=10.0
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    return functools.partial(cache_dit.disable_cache, pipe)


@pairing("weights in 8 bits", comes_off=False, package="torchao")
def torchao_int8(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


@pairing("weights in 8 bits", comes_off=False, package="torchao")
def torchao_fp8(pipe):
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Float8WeightOnlyConfig())


@pairing("weights in 8 bits", comes_off=False, package="optimum")
def quanto_int8(pipe):
    from optimum.quanto import freeze, qint8, quantize

    quantize(pipe.transformer, weights=qint8)
    freeze(pipe.transformer)


def _replace_linears(pipe, make: Callable[[nn.Linear], nn.Linear]) -> None:
    """Give every projection of the blocks other weights."""
    for block in pipe.transformer.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, make(child))


def _like(linear: nn.Linear, kind: type, weight: torch.Tensor, **options: object) -> nn.Linear:
    new = kind(linear.in_features, linear.out_features, linear.bias is not None, **options)
    new.weight, new.bias = weight, linear.bias
    return new


@pairing("weights in 8 bits", comes_off=False, package="bitsandbytes")
def bitsandbytes_int8(pipe):
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def quantise(linear):
        weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return _like(linear, Linear8bitLt, weight, has_fp16_weights=False).to(CPU)

    _replace_linears(pipe, quantise)


@pairing("weights in 4 bits", comes_off=False, package="bitsandbytes")
def bitsandbytes_nf4(pipe):
    from bitsandbytes.nn import Linear4bit, Params4bit

    def quantise(linear):
        weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return _like(linear, Linear4bit, weight, compute_dtype=torch.float32).to(CPU)

    _replace_linears(pipe, quantise)


def _gguf(kind: str):
    def put(pipe):
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        quant_type = gguf.GGMLQuantizationType[kind]

        def quantise(linear):
            data = torch.from_numpy(gguf.quantize(linear.weight.detach().numpy(), quant_type))
            weight = GGUFParameter(data, quant_type=quant_type)
            return _like(linear, GGUFLinear, weight, compute_dtype=torch.float32)

        _replace_linears(pipe, quantise)

    return put


PAIRINGS["GGUF Q8_0"] = Pairing(_gguf("Q8_0"), "weights in 8 bits", comes_off=False, package="gguf")
PAIRINGS["GGUF Q4_0"] = Pairing(_gguf("Q4_0"), "weights in 4 bits", comes_off=False, package="gguf")


@pairing("weights in 8 bits", comes_off=False)
def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)


@pairing("weights elsewhere until they are needed")
def model_offload(pipe):
    accelerate.cpu_offload_with_hook(pipe.transformer, CPU)
    return functools.partial(accelerate.hooks.remove_hook_from_module, pipe.transformer, True)


@pairing("weights elsewhere until they are needed")
def sequential_offload(pipe):
    accelerate.cpu_offload(pipe.transformer, CPU)
    return functools.partial(accelerate.hooks.remove_hook_from_module, pipe.transformer, True)


@pairing("weights elsewhere until they are needed", comes_off=False)
def group_offload(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def _adapter(pipe, name: str, seed: int) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name=name)


@pairing("low-rank updates of the weights")
def LoRA(pipe):
    _adapter(pipe, "first", 1)
    return functools.partial(pipe.transformer.delete_adapters, "first")


@pairing("low-rank updates of the weights")
def several_LoRAs(pipe):
    _adapter(pipe, "first", 1)
    _adapter(pipe, "second", 2)
    pipe.transformer.set_adapters(["first", "second"], [0.5, 0.7])
    return functools.partial(pipe.transformer.delete_adapters, ["first", "second"])


@pairing("low-rank updates of the weights")
def hot_swapped_LoRA(pipe):
    from peft import get_peft_model_state_dict

    _adapter(pipe, "first", 1)
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="first")
    state = {name: weight.flip(0) for name, weight in state.items()}
    options = {"adapter_name": "first", "hotswap": True, "prefix": None}
    pipe.transformer.load_lora_adapter(state, **options)
    return functools.partial(pipe.transformer.delete_adapters, "first")


@pairing("low-rank updates of the weights", rounding=1e-5)
def fused_LoRA(pipe):
    _adapter(pipe, "first", 1)
    pipe.transformer.fuse_lora()

    def undo():
        pipe.transformer.unfuse_lora()
        pipe.transformer.delete_adapters("first")

    return undo


@pairing("recomputes activations in the backward pass")
def gradient_checkpointing(pipe):
    pipe.transformer.enable_gradient_checkpointing()
    return pipe.transformer.disable_gradient_checkpointing


def _scheduler(name: str, **config: object):
    def put(pipe):
        before = pipe.scheduler
        pipe.scheduler = getattr(diffusers, name)(**config)
        return functools.partial(setattr, pipe, "scheduler", before)

    return put


PAIRINGS["of first order (Euler)"] = Pairing(
    _scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0), "scheduler"
)
PAIRINGS["of second order (Heun)"] = Pairing(
    _scheduler("FlowMatchHeunDiscreteScheduler", shift=3.0), "scheduler"
)
PAIRINGS["two prompts"] = Pairing(
    lambda pipe: None,
    "several videos at once",
    comes_off=False,
    options=(("prompt", ("a dog", "a cat by the sea")),),
)
PAIRINGS["two of one prompt"] = Pairing(
    lambda pipe: None,
    "several videos at once",
    comes_off=False,
    options=(("num_videos_per_prompt", 2),),
)


def _interrupt(pipe, step: int, time: object, values: dict) -> dict:
    pipe._interrupt = step == 2
    return values


PAIRINGS["that ends the run after some steps"] = Pairing(
    lambda pipe: None,
    "callback",
    skips=True,
    comes_off=False,
    options=(("callback_on_step_end", _interrupt),),
)

# of those that leave layers out, some of diffusers' own flags for them are broken on Wan
GUIDERS = {
    "ClassifierFreeGuidance": {},
    "ClassifierFreeZeroStarGuidance": {},
    "AdaptiveProjectedGuidance": {},
    "TangentialClassifierFreeGuidance": {},
    "AutoGuidance": {"auto_guidance_config": {"indices": [1]}},
    "SkipLayerGuidance": {
        "skip_layer_config": {"indices": [1]},
        "skip_layer_guidance_stop": 1.0,
    },
    "SmoothedEnergyGuidance": {"seg_guidance_layers": [1]},
}
for _kind, _options in GUIDERS.items():
    PAIRINGS[_kind] = Pairing(
        lambda pipe: None,
        "guider of a modular pipeline",
        skips=_kind == "AutoGuidance",
        comes_off=False,
        guider=functools.partial(getattr(guiders, _kind), **_options),
    )
