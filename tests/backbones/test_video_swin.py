"""Video Swin is that of torchvision, from whose weights it loads."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.video.swin_transformer import SwinTransformer3d

import vidattn.backbones  # noqa: F401

SMALL = {"embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "num_classes": 5}


# (part of a name in torchvision, replacement), to the names of the authors
TO_AUTHORS = (
    (r"^(patch_embed|norm)\.", r"backbone.\1."),
    (r"^head\.", "cls_head.fc_cls."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def torchvision_model(window):
    names = {"patch_size": [2, 4, 4], "window_size": list(window)}
    model = SwinTransformer3d(**SMALL, **names).double().eval()
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.3)
    return model


def load(state, folder, **options):
    """Our model with the weights of a file."""
    torch.save(state, folder / "weights.pth")
    overlay = {"file": str(folder / "weights.pth"), "num_classes": SMALL["num_classes"]}
    options = SMALL | options
    model = timm.create_model(
        "video_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    return model.double().eval()


# ragged patches, windows and merging; maps with fewer frames than a window, or lower, or narrower
@pytest.mark.parametrize(
    ("window", "video"),
    [
        ((3, 3, 2), (9, 45, 50)),
        ((8, 2, 2), (2, 32, 32)),
        ((1, 2, 3), (1, 35, 60)),
        ((2, 5, 7), (5, 20, 30)),
        ((3, 4, 3), (2, 12, 18)),
    ],
)
@torch.no_grad()
def test_released_weights(window, video, tmp_path):
    theirs = torchvision_model(window)
    ours = load(theirs.state_dict(), tmp_path, window=window)
    videos = torch.randn(2, 3, *video).double()
    torch.testing.assert_close(ours(videos), theirs(videos))


@torch.no_grad()
def test_weights_of_the_authors(tmp_path):
    theirs = torchvision_model((2, 3, 3))
    state = {}
    for name, x in theirs.state_dict().items():
        if found := re.match(r"features\.(\d+)\.(\d+\.)?", name):
            stage, is_between = divmod(int(found[1]), 2)
            place = "downsample." if is_between else f"blocks.{found[2]}"
            name = f"backbone.layers.{stage}.{place}{name[found.end() :]}"
        for pattern, replacement in TO_AUTHORS:
            name = re.sub(pattern, replacement, name)
        state[name] = x
    ours = load({"meta": {"epoch": 30}, "state_dict": state}, tmp_path, window=(2, 3, 3))
    videos = torch.randn(2, 3, 4, 32, 32).double()
    torch.testing.assert_close(ours(videos), theirs(videos))


@torch.no_grad()
def test_other_channels(tmp_path):
    theirs = torchvision_model((2, 3, 3))
    grey = load(theirs.state_dict(), tmp_path, window=(2, 3, 3), in_chans=1)
    videos = torch.randn(2, 1, 4, 32, 32).double()
    torch.testing.assert_close(grey(videos), theirs(videos.expand(-1, 3, -1, -1, -1)))
    six = load(theirs.state_dict(), tmp_path, window=(2, 3, 3), in_chans=6)
    videos = torch.randn(2, 3, 4, 32, 32).double()
    torch.testing.assert_close(six(torch.cat([videos, videos], 1)), theirs(videos))


@torch.no_grad()
def test_biases_of_other_windows_are_resized(tmp_path):
    state = torchvision_model((2, 3, 3)).state_dict()
    name, ours = "features.0.1.attn.relative_position_bias_table", "stages.0.blocks.1.attn.rpb"
    found = load(state, tmp_path, window=(2, 5, 4)).state_dict()[ours]
    # frame by frame and head by head
    table = state[name].view(3, 5, 5, 1)
    for i in range(3):
        answer = F.interpolate(table[i, None, :, :, 0][None], (9, 7), mode="bicubic")
        torch.testing.assert_close(found.view(3, 9, 7)[i], answer[0, 0])
    with pytest.raises(RuntimeError, match="size mismatch for stages.0.blocks.0.attn.rpb"):
        load(state, tmp_path, window=(4, 3, 3))


def test_own_weights_load_as_they_are(tmp_path):
    model = timm.create_model("video_swin_tiny", **SMALL).double()
    again = load(model.state_dict(), tmp_path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="depths and num_heads must have one entry for each"):
        timm.create_model("video_swin_tiny", depths=(1, 1))
