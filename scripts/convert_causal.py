"""Write a released causal Wan model as a diffusers folder that `vidattn stream` runs.

    python scripts/convert_causal.py self_forcing_dmd.pt --recipe self-forcing \\
        --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output self-forcing

Takes the .pt and .safetensors files of Self-Forcing, CausVid, Causal-Forcing, LongLive (with its
LoRA: --lora lora.pt) and Krea realtime. Everything but the transformer is that of the base model.
"""

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vidattn.pipelines.streaming.recipe import RECIPES, Recipe
from vidattn.runs.output import writable_folder
from vidattn.support.registry import unknown

State = dict[str, Tensor]
# (pattern, replacement) from the names of Wan's own code to those of diffusers, in this order; the
# norm of the cross-attention is the third there and the second here
NAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12]\.)([qkv])\.", r"\1to_\2."),
    (r"(\.attn[12]\.)o\.", r"\1to_out.0."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)
# what wrappers of modules put before or into a name
WRAPPERS = (
    r"^(generator_ema|generator|model|module|_fsdp_wrapped_module|base_model|diffusion_model)\.",
    r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.",
)
# the entries that hold the weights to use, best first
ENTRIES = ("generator_ema", "generator", "model", "state_dict", "generator_lora")
LORA = re.compile(r"^(.*)\.lora_(A|B|down|up)(?:\.default)?\.weight$")


def read_weights(path: Path) -> State:
    """The tensors in a .pt or .safetensors file, by their names without wrappers.

    Pickles are read with weights_only, which runs no code.

    Raises:
        ValueError: no such file, another ending, or something else than tensors in it.
    """
    if not path.is_file():
        raise ValueError(f"'{path}' is no file")
    if path.suffix == ".safetensors":
        return _unwrapped(load_file(path))
    if path.suffix not in (".pt", ".pth", ".ckpt", ".bin"):
        raise ValueError(f"'{path.name}' must end in .pt or .safetensors")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"'{path}' cannot be read without running its code: {first}") from error
    while isinstance(found, Mapping) and (entry := _entry(found)) is not None:
        found = found[entry]
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found)
        raise ValueError(f"'{path}' holds no weights by name, but {keys}")
    return _unwrapped(found)


def _entry(found: Mapping[str, object]) -> str | None:
    """The entry of a checkpoint that holds the weights, None where it is the weights itself."""
    return next((key for key in ENTRIES if isinstance(found.get(key), Mapping)), None)


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    """The tensors by their names without the marks of wrappers, each once."""
    found: State = {}
    for name, value in state.items():
        before, plain = None, name
        while plain != before:
            before = plain
            for pattern in WRAPPERS:
                plain = re.sub(pattern, "", plain)
        if plain in found:
            raise ValueError(f"{plain} stands twice in this file, once as {name}")
        found[plain] = value
    return found


def add_lora(state: State, lora: State, scale: float | None = None) -> State:
    """Weights in Wan's names with low-rank updates added.

    Args:
        lora: (r, in) tensors NAME.lora_A.weight and (out, r) NAME.lora_B.weight, in Wan's names;
            NAME.alpha scales them by alpha / r.
        scale: of all updates; when not given alpha / r, or 1 without an alpha.

    Raises:
        ValueError: an update without its other half, of a weight that is not there, or none.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in lora.items():
        if match := LORA.match(name):
            side = {"down": "A", "up": "B"}.get(match[2], match[2])
            halves.setdefault(match[1], {})[side] = value
        elif not name.endswith(".alpha"):
            raise ValueError(f"{name} is no low-rank update: they end in .lora_A or .lora_B.weight")
    if not halves:
        raise ValueError("there is no low-rank update in the LoRA: names end in .lora_A.weight")
    merged = dict(state)
    for name, sides in halves.items():
        if set(sides) != {"A", "B"}:
            raise ValueError(f"{name} has lora_{'/'.join(sides)} only: both halves are needed")
        weight = f"{name}.weight"
        if weight not in state:
            raise ValueError(f"the LoRA updates {weight}, which the model does not have")
        down, up = sides["A"].float(), sides["B"].float()
        alpha = lora.get(f"{name}.alpha")
        factor = scale if scale is not None else 1.0 if alpha is None else float(alpha) / len(down)
        merged[weight] = (state[weight].float() + factor * up @ down).to(state[weight].dtype)
    return merged


def to_diffusers(state: State) -> State:
    """Weights in Wan's names by those of diffusers.

    Raises:
        ValueError: two of them get the same name.
    """
    found: State = {}
    for name, value in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise ValueError(f"two weights of this file are called {name}")
        found[name] = value
    return found


def config_of(state: State) -> dict[str, object]:
    """The configuration of the transformer that weights in the names of diffusers are of.

    Raises:
        ValueError: a weight that it is read from is missing.
    """
    try:
        embedding = state["patch_embedding.weight"]
        width = embedding.shape[0]
        ffn = state["blocks.0.ffn.net.0.proj.weight"].shape[0]
        frequencies = state["condition_embedder.time_embedder.linear_1.weight"].shape[1]
        text = state["condition_embedder.text_embedder.linear_1.weight"].shape[1]
        outs = state["proj_out.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"these are no weights of a Wan model: {error.args[0]} is missing"
        ) from error
    patch = tuple(embedding.shape[2:])
    layers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    # all released models have heads of 128
    heads = max(1, width // 128)
    return {
        "patch_size": list(patch),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": embedding.shape[1],
        "out_channels": outs // (patch[0] * patch[1] * patch[2]),
        "text_dim": text,
        "freq_dim": frequencies,
        "ffn_dim": ffn,
        "num_layers": max(layers) + 1,
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
    }


def build_transformer(state: State, recipe: Recipe, **changes: object):
    """A ``WanTransformer3DModel`` with weights in Wan's names, that says how it is run.

    Args:
        changes: of its configuration.

    Raises:
        ValueError: weights that are missing or left over, or have another shape.
    """
    from diffusers import WanTransformer3DModel

    found = to_diffusers(state)
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**config_of(found), **changes})
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    missing, left = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    other = [x for x in wanted.keys() & found.keys() if tuple(found[x].shape) != wanted[x]]
    if missing or left or other:
        lines = [f"missing: {_some(missing)}"] if missing else []
        lines += [f"left over: {_some(left)}"] if left else []
        lines += [f"of another shape: {_some(other)}"] if other else []
        raise ValueError("these weights do not fit a Wan transformer; " + "; ".join(lines))
    # buffers are not in the state: made anew, on the CPU
    model = WanTransformer3DModel.from_config(model.config)
    model.load_state_dict(found, assign=True)
    model.register_to_config(**recipe.to_config())
    return model.eval()


def _some(names: Iterable[str]) -> str:
    """Names with their blocks counted rather than listed."""
    counts = Counter(re.sub(r"^blocks\.\d+\.", "blocks.N.", name) for name in names)
    return ", ".join(f"{name} ({n} times)" if n > 1 else name for name, n in sorted(counts.items()))


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="a .pt or .safetensors file")
    parser.add_argument("--recipe", required=True, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--lora", type=Path, metavar="FILE", help="low-rank updates to add")
    parser.add_argument(
        "--base", required=True, metavar="FOLDER",
        help="a downloaded Wan folder in the layout of diffusers, for all but the transformer",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    try:
        convert(args)
    except ValueError as error:
        parser.exit(2, f"convert_causal: {error}\n")
    print(f"wrote {args.output}: vidattn stream --model {args.output}")


def convert(args: argparse.Namespace) -> None:
    """Write the folder.

    Raises:
        ValueError: an unknown recipe, a base that is no folder, or weights that do not fit.
    """
    if args.recipe not in RECIPES:
        raise unknown("recipe", args.recipe, RECIPES)
    base = Path(args.base)
    if not (base / "model_index.json").is_file():
        raise ValueError(
            f"--base '{base}' is no folder in the layout of diffusers: `hf download "
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir {base}` makes one"
        )
    writable_folder(args.output)
    state = read_weights(args.weights)
    if args.lora is not None:
        state = add_lora(state, read_weights(args.lora))
    state = {name: x.to(getattr(torch, args.dtype)) for name, x in state.items()}
    model = build_transformer(state, RECIPES[args.recipe])
    model.save_pretrained(args.output / "transformer")
    for part in base.iterdir():
        if part.is_dir() and part.name != "transformer" and not part.name.startswith("."):
            shutil.copytree(part, args.output / part.name, dirs_exist_ok=True)
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    (args.output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
