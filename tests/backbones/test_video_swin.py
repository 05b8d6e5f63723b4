"""Video Swin is that of torchvision, from whose weights it loads."""

import pytest
import timm
import torch
from torchvision.models.video.swin_transformer import SwinTransformer3d

import vidattn.backbones  # noqa: F401

SMALL = {"embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "num_classes": 5}


# ragged patches, windows and merging; the last stage has fewer frames than a window
@pytest.mark.parametrize(
    ("window", "video"),
    [((3, 3, 2), (9, 45, 50)), ((8, 2, 2), (2, 32, 32)), ((1, 2, 3), (1, 35, 60))],
)
@torch.no_grad()
def test_released_weights(window, video, tmp_path):
    names = {"patch_size": [2, 4, 4], "window_size": list(window)}
    theirs = SwinTransformer3d(**SMALL, **names).double().eval()
    for x in theirs.parameters():
        torch.nn.init.normal_(x, std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": SMALL["num_classes"]}
    ours = timm.create_model(
        "video_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, window=window, **SMALL
    )
    videos = torch.randn(2, 3, *video).double()
    torch.testing.assert_close(ours.double().eval()(videos), theirs(videos))


def test_own_weights_load_as_they_are(tmp_path):
    model = timm.create_model("video_swin_tiny", **SMALL)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": SMALL["num_classes"]}
    again = timm.create_model(
        "video_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL
    )
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="depths and num_heads must have one entry for each"):
        timm.create_model("video_swin_tiny", depths=(1, 1))
