"""Low-rank updates as files: with the keys of diffusers, of ComfyUI, and of musubi-tuner.

The strength alpha / r is multiplied into the second matrix, so that a file means the same to every
reader, whether or not it looks for an alpha; those that ask for one get alpha = r.

Letters: R rank.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from video_training.trainee import ADAPTER

from vidattn.runs.lora import METADATA
from vidattn.runs.output import write_atomically

# names of diffusers and of the authors, for the models whose layers correspond one to one
WAN = (
    (r"\battn1\.", "self_attn."),
    (r"\battn2\.", "cross_attn."),
    (r"\bto_([qkv])\b", r"\1"),
    (r"\bto_out\.0\b", "o"),
    (r"\badd_([kv])_proj\b", r"\1_img"),
    (r"\bffn\.net\.0\.proj\b", "ffn.0"),
    (r"\bffn\.net\.2\b", "ffn.2"),
    (r"\bcondition_embedder\.time_embedder\.linear_1\b", "time_embedding.0"),
    (r"\bcondition_embedder\.time_embedder\.linear_2\b", "time_embedding.2"),
    (r"\bcondition_embedder\.text_embedder\.linear_1\b", "text_embedding.0"),
    (r"\bcondition_embedder\.text_embedder\.linear_2\b", "text_embedding.2"),
    (r"\bcondition_embedder\.time_proj\b", "time_projection.1"),
    (r"\bproj_out\b", "head.head"),
)
LAYOUTS = {
    "comfy": {
        "WanTransformer3DModel": WAN,
        "SkyReelsV2Transformer3DModel": WAN,
        "LTXVideoTransformer3DModel": (),
    },
    "musubi": {"WanTransformer3DModel": WAN, "SkyReelsV2Transformer3DModel": WAN},
}
# all that musubi's files have, and diffusers insists on
MUSUBI_MODULES = (
    *(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v")),
    *("attn1.to_out.0", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
)


def check_layouts(model: nn.Module, also: tuple[str, ...], use_dora: bool) -> None:
    """Compare layouts with the model before it is trained.

    Raises:
        ValueError: one that is not known for it.
    """
    name = type(model).__name__
    for layout in also:
        if name not in LAYOUTS[layout]:
            raise ValueError(
                f"output.also: the '{layout}' layout is not known for {name}, but for "
                f"{', '.join(LAYOUTS[layout])}; the keys of diffusers are always written"
            )
        if use_dora:
            raise ValueError(
                f"output.also: the '{layout}' layout has no place that diffusers reads for the "
                "magnitudes of tune.use_dora; leave one of them out"
            )


def adapter_state(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The updates by the keys of diffusers, 'blocks.0.attn1.to_q.lora_A.weight'.

    Args:
        model: that has the adapter.
        trained: its parameters that move, or averages of them, by name.
    """
    state = get_peft_model_state_dict(model, state_dict=dict(trained), adapter_name=ADAPTER)
    modules, found = dict(model.named_modules()), {}
    for key, value in state.items():
        layer, ending = modules[key.partition(".lora_")[0]], ".lora_B.weight"
        strength = layer.scaling[ADAPTER] if key.endswith(ending) else 1.0
        found[key] = (value.detach().float().cpu() * strength).contiguous()
    return found


def write_adapter(
    folder: Path,
    component: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    also: tuple[str, ...],
    facts: Mapping[str, object],
) -> list[Path]:
    """Write updates in every layout that is asked for.

    Args:
        component: of the pipeline that they are for.
        facts: that travel with them.
    """
    stem = "lora" if component == "transformer" else f"lora-{component}"
    metadata = {"format": "pt", METADATA: json.dumps({"component": component, **facts})}
    files = {f"{stem}.safetensors": {f"transformer.{k}": v for k, v in state.items()}}
    for layout in also:
        rules = LAYOUTS[layout][type(model).__name__]
        found = comfy(state, rules) if layout == "comfy" else musubi(state, rules, model)
        files[f"{stem}-{layout}.safetensors"] = found
    for name, tensors in files.items():
        with write_atomically(folder / name) as partial:
            save_file(tensors, partial, metadata=metadata)
    return [folder / name for name in files]


def comfy(state: Mapping[str, Tensor], rules: tuple) -> dict[str, Tensor]:
    """Updates by the keys of ComfyUI, which are the authors' names."""
    found = {}
    for module, (down, up) in _pairs(state).items():
        name = f"diffusion_model.{_renamed(module, rules)}"
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = down, up
        # diffusers refuses an alpha elsewhere; one that equals r says nothing new anyway
        if rules and module.startswith("blocks."):
            found[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return found


def musubi(state: Mapping[str, Tensor], rules: tuple, model: nn.Module) -> dict[str, Tensor]:
    """Updates by the keys of musubi-tuner; layers without one get an update of zero.

    Raises:
        ValueError: layers outside the blocks, for which it has no keys.
    """
    pairs, modules = _pairs(state), dict(model.named_modules())
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    wanted = [f"{block}.{name}" for block in blocks for name in MUSUBI_MODULES]
    if outside := [name for name in pairs if name not in wanted]:
        raise ValueError(
            f"output.also: the 'musubi' layout has no keys for {', '.join(outside[:3])}; narrow "
            "tune.target_modules down to attention and feed-forward layers of the blocks"
        )
    found = {}
    for module in wanted:
        layer = modules[module]
        zeros = torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1)
        down, up = pairs.get(module, zeros)
        name = "lora_unet_" + _renamed(module, rules).replace(".", "_")
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
        found[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return found


def _pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Both matrices (R, in) and (out, R) of every layer."""
    ending = ".lora_A.weight"
    return {
        key.removesuffix(ending): (down, state[key.replace(".lora_A.", ".lora_B.")])
        for key, down in state.items()
        if key.endswith(ending)
    }


def _renamed(module: str, rules: tuple) -> str:
    for pattern, name in rules:
        module = re.sub(pattern, name, module)
    return module
