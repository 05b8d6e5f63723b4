"""Released weights of NAT, DiNAT, DiNAT_s and the isotropic models, under the names they have here.

Two layouts are read: that of the authors, and that of Hugging Face transformers.
"""

from __future__ import annotations

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from vidattn.backbones.pyramids.checkpoints import new_name

# as checkpoints.py reads them
AUTHORS = (
    (r"^patch_embed\.", "stem."),
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", "stages.{next}.downsample."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    # the isotropic models have no stages
    (r"^layers\.(\d+)\.", r"stages.\1.blocks.0."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(?!fc\.)", "head.fc."),
)
TRANSFORMERS = (
    (r"^d?i?nat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "stem.proj."),
    (r"^embeddings\.", "stem."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", "stages.{next}.downsample."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one in either layout, or in its own.

    Position biases of windows of another size are resized, as the authors do.

    Args:
        state_dict: as the released file holds it.
        model: the model that loads it.
    """
    if any(name.startswith("stages.") for name in state_dict):
        return resize_biases(state_dict, model)
    is_transformers = any(".attention.self." in name for name in state_dict)
    rules = TRANSFORMERS if is_transformers else AUTHORS
    # made from the window by whoever needs it
    renamed = {
        new_name(name, rules): tensor
        for name, tensor in state_dict.items()
        if not name.endswith(".relative_position_index")
    }
    return resize_biases(_join(renamed) if is_transformers else renamed, model)


def resize_biases(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict whose tables of position biases, ``rpb``, are as large as those of a model."""
    tables = {name: x for name, x in model.named_parameters() if name.endswith(".rpb")}
    resized = {}
    for name, x in state_dict.items():
        if name in tables and x.dim() == tables[name].dim() and x.shape != tables[name].shape:
            window = model.get_submodule(name.removesuffix(".rpb")).window
            sides = (window, window) if isinstance(window, int) else tuple(window)
            x = resize_rel_pos_bias_table_simple(x, sides, tuple(tables[name].shape))
        resized[name] = x
    return resized


def _join(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor for queries, keys and values; two for the two layer scales."""
    joined = {}
    for name, tensor in state_dict.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".query"):
            parts = [f"{stem.removesuffix('query')}{x}.{kind}" for x in ("query", "key", "value")]
            tensors = [state_dict[part] for part in parts]
            joined[f"{stem.removesuffix('query')}qkv.{kind}"] = torch.cat(tensors)
        elif kind == "layer_scale_parameters":
            joined[f"{stem}.ls1.gamma"], joined[f"{stem}.ls2.gamma"] = tensor.unbind()
        elif not stem.endswith((".key", ".value")):
            joined[name] = tensor
    return joined
