"""Real motion as attention inputs: patches, PCA, positions; and the figures of a method."""

import argparse

import bench_recall as bench
import pytest
import torch
from benchmarks import motion_latents as latents
from torch.testing import assert_close

from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods import plan


@pytest.fixture
def clip():
    return torch.randint(256, (9, 32, 48, 3), dtype=torch.uint8)


def test_patches_hold_the_pixels_of_their_place(clip):
    found = latents.patches(clip, 2)
    assert found.shape == (4, 6, 768)
    expected = clip[5:9, 8:16, 32:40].float() / 127.5 - 1
    assert_close(found[1, 4], expected.flatten())
    assert_close(
        latents.patches(clip, 0)[3, 5].view(4, -1),
        (clip[0, 24:, 40:] / 127.5 - 1).view(1, -1).expand(4, -1),
    )


def test_the_encoder_keeps_what_differs_most(clip):
    """Clips whose patches differ along 3 directions are restored from 16."""
    mixed = torch.randint(2, (9, 4, 6, 3)).float() @ torch.randn(3, 8 * 8 * 3)
    frames = mixed.view(9, 4, 6, 8, 8, 3).permute(0, 1, 3, 2, 4, 5).reshape(9, 32, 48, 3)
    # one picture, still for each latent frame
    frames = frames[torch.tensor([0, 1, 1, 1, 1, 5, 5, 5, 5])] * 20 + 128
    pca = latents.fit_pca([frames])
    code = pca.encode(frames)
    assert code.shape == (3, 4, 6, 16)
    again = code[1] * pca.spread @ pca.basis.T + pca.mean
    assert_close(again, latents.patches(frames, 1), atol=1e-3, rtol=1e-3)
    assert_close(pca.basis.T @ pca.basis, torch.eye(16), atol=1e-4, rtol=0)
    assert_close(code.flatten(0, 2)[:, :3].square().mean(0), torch.ones(3), atol=0.2, rtol=0)


def test_tokens_are_squares_of_four_latents():
    code = torch.arange(3 * 4 * 6 * 16.0).view(3, 4, 6, 16)
    tokens, grid = latents.tokens_of(code)
    assert grid == Grid(3, 2, 3) and tokens.shape == (18, 64)
    assert_close(tokens[(1 * 2 + 1) * 3 + 2], code[1, 2:4, 4:6].flatten())


def test_only_differences_of_positions_count():
    grid = Grid(3, 4, 5)
    x = torch.randn(12).expand(grid.num_tokens, 12)
    turned = latents.rotate(x, grid)
    scores = (turned @ turned.T).view(*grid.size, *grid.size)
    assert_close(scores[0, 1, 2, 1, 3, 3], scores[1, 0, 0, 2, 2, 1], rtol=1e-4, atol=1e-4)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert scores[0, 0, 0, 0, 0, 0] > scores[0, 0, 0].flatten()[1:].max()


def test_heads_are_normalized_and_differ():
    q, k, v = latents.heads_of(torch.randn(60, 64), Grid(3, 4, 5), num_heads=2, head_dim=128)
    assert q.shape == k.shape == v.shape == (1, 2, 60, 128)
    assert_close(q.square().mean(-1), torch.ones(1, 2, 60), atol=1e-4, rtol=0)
    assert torch.equal(q, k) and not torch.allclose(q[:, 0], q[:, 1])


@pytest.mark.parametrize("shape", [(8, 32, 48, 3), (9, 24, 48, 3)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="4n \\+ 1 frames"):
        latents.num_latent_frames(torch.zeros(shape))


def test_methods_are_measured_on_the_tokens_of_clips():
    grid = Grid(3, 8, 6)
    sources = {name: (torch.randn(grid.num_tokens, 64), grid) for name in "ab"}
    args = argparse.Namespace(
        densities=(0.5,),
        plain=False,
        methods=("topk", "neighborhood", "radial"),
        heads=2,
        queries=grid.num_tokens,
    )
    report = bench.measure(sources, args)
    by_label = {row["label"]: row["clips"] for row in report["rows"]}
    assert list(by_label)[:2] == ["topk:density=0.5,rectify=false", "topk:density=0.5,rectify=true"]
    assert all(list(clips) == ["a", "b"] for clips in by_label.values())
    found = by_label["topk:density=0.5,rectify=false"]["a"]
    q, k, v = latents.heads_of(sources["a"][0], grid, num_heads=2)
    made = plan("topk", grid, q, k, density=0.5)
    out, dense = (attend(q, k, v, x) for x in (made, plan("dense", grid)))
    error = (out - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
    assert found["output_error"] == pytest.approx(error.sqrt().mean().item(), rel=1e-3)
    assert found["density"] == pytest.approx(made.density) and 0 < found["recall"] < 1
    report |= {"command": "c", "hardware": {"num_threads": 1, "cpu": "x", "torch": "y"}}
    text = bench.to_markdown(report)
    assert "144 tokens (3x8x6)" in text and f"| {found['density']:.3f} |" in text


def test_what_a_method_cannot_do_is_said():
    row = {"label": "radial:density=0.1", "asked": 0.1, "clips": {"a": {"error": "no way"}}}
    report = {
        "package": "p", "clips": ["a"], "grid": [1, 1, 1], "heads": 1, "head_dim": 8, "queries": 1,
        "best_tenth": 0.5, "hardware": {"num_threads": 1, "cpu": "x", "torch": "y"}, "rows": [row],
        "command": "c",
    }  # fmt: skip
    assert "- `radial:density=0.1`: no way" in bench.to_markdown(report)
