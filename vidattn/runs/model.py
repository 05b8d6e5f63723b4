"""Loads a diffusers video pipeline, from the bundled model, a folder, or the hub."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from vidattn.kernels.cpp.onednn import has_bfloat16_products
from vidattn.pipelines.quick_layers import quicken
from vidattn.runs.folder import find_model, is_bundled
from vidattn.runs.processes import find_processes


def load_pipeline(args: argparse.Namespace) -> object:
    """A diffusers pipeline, ready to run as the flags say.

    Args:
        args: ``model`` is a folder, a hub id, or None for the bundled model; ``dtype`` is a name,
            or auto: bfloat16 on a GPU and on a CPU that multiplies it, else float32; ``device`` is
            a name, or auto: the first GPU if there is one; ``offload`` "model" keeps only the
            running component on the GPU, "sequential" only the running layer.

    Raises:
        ValueError: a missing or broken model, a pickle checkpoint, or a device that is not there.
    """
    device = find_device(args.device, args.offload)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    where = find_model(args.model)

    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    chosen = getattr(torch, default_dtype(device) if args.dtype == "auto" else args.dtype)
    try:
        dtypes = {"default": chosen}
        if "AutoencoderKLWan" in (pipeline_config(where).get("vae") or ()):
            dtypes["vae"] = vae_dtype(device, args.dtype, is_bundled(args.model))
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
    if device.type == "cpu":
        quicken(pipe)
    return pipe


def find_device(name: str, offload: str = "none") -> torch.device:
    """The device of a name; of several processes each has a GPU of its own.

    Raises:
        ValueError: it is not there, is one GPU for several processes, or is a CPU where parts are
            to be kept off the GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = find_processes()
    if processes.count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device {name} is one GPU for {processes.count} processes: drop it")
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {first}") from error
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {offload} needs a GPU, the device is {device}")
    return device


def vae_dtype(device: torch.device, asked: str, is_measured: bool) -> torch.dtype:
    """The dtype of the VAE of Wan, which breaks into blotches below float32, but is small.

    Args:
        asked: the ``--dtype`` of the model.
        is_measured: whether its frames were found to stay the same in bfloat16, as those of the
            bundled model do (55 dB to float32's), which a CPU with bfloat16 products then saves
            most of the time.
    """
    is_faster = device.type == "cpu" and has_bfloat16_products()
    return torch.bfloat16 if asked != "float32" and is_measured and is_faster else torch.float32


def default_dtype(device: torch.device) -> str:
    """The name of the dtype that is fast and safe on a device.

    On a CPU with bfloat16 products a run of the bundled model takes little more than half as long
    in it as in float32, and its clip stays at 51 dB to that one (assets/benchmarks/types_*.md).
    """
    is_faster = device.type == "cuda" or device.type == "cpu" and has_bfloat16_products()
    return "bfloat16" if is_faster else "float32"


def pipeline_config(where: str) -> dict[str, object]:
    """What the model_index.json of a folder or hub id says.

    Raises:
        ValueError: it cannot be had.
    """
    if Path(where).is_dir():
        return json.loads((Path(where) / "model_index.json").read_text(encoding="utf-8"))
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DiffusionPipeline.load_config(where)
    except Exception as error:
        raise _explain(where, error) from error


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
