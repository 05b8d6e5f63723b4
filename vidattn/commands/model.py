"""Loads a diffusers video pipeline, from the bundled model, a folder, or the hub."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from pathlib import Path

import torch

from vidattn.resources import resource

BUNDLED = "assets/tiny-t2v"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "model", "sequential")


def load_pipeline(args: argparse.Namespace) -> object:
    """A diffusers pipeline, ready to run as the flags say.

    Args:
        args: ``model`` is a folder, a hub id, or None for the bundled model; ``dtype`` is a name,
            or auto: bfloat16 on a GPU, float32 on a CPU; ``device`` is a name, or auto: the first
            GPU if there is one; ``offload`` "model" keeps only the running component on the GPU,
            "sequential" only the running layer.

    Raises:
        ValueError: a missing or broken model, a pickle checkpoint, or a device that is not there.
    """
    device = find_device(args.device)
    if args.offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {args.offload} needs a GPU, the device is {device}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    where = find_model(args.model)

    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    chosen = DTYPES[default_dtype(device) if args.dtype == "auto" else args.dtype]
    try:
        # the VAE of Wan breaks into blotches below float32; it is small
        dtypes = {"default": chosen}
        if _has_wan_vae(where):
            dtypes["vae"] = torch.float32
        pipe = DiffusionPipeline.from_pretrained(
            where, use_safetensors=True, local_files_only=Path(where).is_dir(), dtype=dtypes
        )
    except Exception as error:
        raise _explain(where, error) from error
    if args.vae_tiling:
        pipe.vae.enable_tiling()
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {first}") from error
    return device


def default_dtype(device: torch.device) -> str:
    """The name of the dtype that is fast and safe on a device."""
    return "bfloat16" if device.type == "cuda" else "float32"


def find_model(model: str | None) -> str:
    """The folder or hub id to load from, a folder being checked.

    Raises:
        ValueError: it is neither, or a folder that is broken or holds pickles only.
    """
    if model is None:
        try:
            folder = resource(BUNDLED)
        except FileNotFoundError as error:
            raise ValueError(f"the bundled model is missing: {error}") from error
        return str(check_folder(folder))
    path = Path(model).expanduser()
    if path.suffix.lower() in (*PICKLES, ".safetensors") and not path.is_dir():
        raise ValueError(
            f"--model '{model}' is a single file; give a folder in the diffusers layout, with "
            "model_index.json and safetensors weights" + _no_pickle(path)
        )
    if path.is_dir():
        return str(check_folder(path))
    if path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") != 1:
        raise ValueError(
            f"--model '{model}' is no folder on this machine, and no hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"--model '{model}' is no hub id: they read owner/name")
    return model


def is_bundled(model: str | None) -> bool:
    """Whether a --model is the bundled one, by default or by its folder."""
    if model is None:
        return True
    try:
        return Path(model).expanduser().resolve() == resource(BUNDLED).resolve()
    except FileNotFoundError:
        return False


def _no_pickle(path: Path) -> str:
    if path.suffix.lower() in PICKLES:
        return " (pickle checkpoints can run code when loaded and are refused)"
    return ""


def check_folder(folder: Path) -> Path:
    """A model folder in the diffusers layout with safetensors weights.

    Raises:
        ValueError: what is missing or broken, or pickles without safetensors.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"model folder '{folder}' has no model_index.json; give the folder of a whole "
            "diffusers pipeline, not of one of its parts"
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"'{index}' is no valid JSON ({error}); download it again") from error
    if not isinstance(parts, dict) or "_class_name" not in parts:
        raise ValueError(f"'{index}' names no pipeline class; download it again")
    for name, value in parts.items():
        if not (isinstance(value, list) and len(value) == 2 and value[1] is not None):
            continue
        part = folder / name
        if not part.is_dir():
            raise ValueError(
                f"model folder '{folder}' is incomplete: its model_index.json names '{name}', "
                "which is not there; download it again"
            )
        _refuse_pickles(part)
    return folder


def _refuse_pickles(part: Path) -> None:
    files = [path for path in part.iterdir() if path.is_file()]
    pickles = sorted(path.name for path in files if path.suffix.lower() in PICKLES)
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"'{part}' holds pickle weights only ({pickles[0]}), which can run code when loaded "
            "and are refused; convert them to safetensors, or download a safetensors revision"
        )


def _has_wan_vae(where: str) -> bool:
    from diffusers import DiffusionPipeline

    if Path(where).is_dir():
        config = json.loads((Path(where) / "model_index.json").read_text(encoding="utf-8"))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = DiffusionPipeline.load_config(where)
    return "AutoencoderKLWan" in (config.get("vae") or ())


def _explain(where: str, error: Exception) -> ValueError:
    """What a failed load means for the person who asked for it."""
    if Path(where).is_dir():
        return ValueError(f"model folder '{where}' cannot be loaded: {_first_line(error)}")
    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if "GatedRepoError" in names:
        return ValueError(
            f"'{where}' is gated: accept its license on https://huggingface.co/{where}, then log "
            "in with `hf auth login`"
        )
    offline = {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "ConnectTimeout"}
    if names & (offline | {"LocalEntryNotFoundError", "ProxyError"}):
        return ValueError(
            f"'{where}' is not in the local cache and the hub cannot be reached. Check the network "
            f"(or HF_HUB_OFFLINE), or run `hf download {where} --local-dir DIR` on a machine that "
            "has one, copy DIR here and give --model DIR. Without --model the bundled model runs"
        )
    if "RepositoryNotFoundError" in names:
        return ValueError(
            f"the hub has no '{where}', or it is private: check the spelling, or log in with "
            "`hf auth login`"
        )
    return ValueError(f"'{where}' cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
