"""Encoded clips: cut short, added to, on a full disk, of another autoencoder."""

import contextlib
import io
import resource
import signal
from pathlib import Path

import pytest
import torch
from t2v import latents
from t2v import vae as vaes
from t2v.team import Team

from tests.scripts import world_cases as cases

KIND = {"size": [5, 16, 24], "count": 5}
MICRO_VAE = {"z_dim": 4, "base_dim": 8, "dim_mult": [1, 1, 2], "num_res_blocks": 1}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return cases.world.Clips(cases.write_sprites(tmp_path_factory.mktemp("sprites")), 3)


def autoencoder(seed: int = 0):
    torch.manual_seed(seed)
    return vaes.build_vae(**MICRO_VAE).eval()


def encode(clips, work: Path, count: int = 5, vae=None, team=None) -> None:
    vae = vae or autoencoder()
    latents.encode_clips(vae, clips, KIND | {"count": count}, work, team or Team())


def pool(clips, work: Path, count: int = 5, team=None):
    return latents.LatentPool(clips, KIND | {"count": count}, work, team or Team())


def test_pool_gives_each_clip_with_what_it_shows(clips, tmp_path):
    encode(clips, tmp_path)
    drawn, scenes = pool(clips, tmp_path).draw([3, 9, 0], 2)
    assert drawn.shape == (3, 4, 2, 2, 3) and scenes[0] is not scenes[2]
    numbers = [latents._first_number(KIND["size"]) + place for place in (3, 4, 0)]
    for found, scene, number in zip(drawn, scenes, numbers):
        clip, expected = clips.sample(number, (5, 16, 24))
        assert scene == expected
        mean = vaes.encode_moments(autoencoder(), clip[None]).chunk(2, dim=1)[0][0]
        torch.testing.assert_close(found, mean, rtol=0.05, atol=0.05)


def test_more_clips_are_added_to_those_there(clips, tmp_path):
    encode(clips, tmp_path, 4)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    encode(clips, tmp_path, 7)
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(before) == 2 and len(after) == 4
    assert all(after[name] == time for name, time in before.items())
    first, more = pool(clips, tmp_path, 4), pool(clips, tmp_path, 7)
    torch.testing.assert_close(more.latents[:4], first.latents, rtol=0, atol=0)
    assert len(more.scenes) == len(more.latents) == 7


def test_two_workers_share_the_clips(clips, tmp_path):
    teams = []
    for rank in range(2):
        teams.append(Team())
        teams[-1].rank, teams[-1].size = rank, 2
        encode(clips, tmp_path, team=teams[-1])
    found = [pool(clips, tmp_path, team=team).scenes for team in teams]
    assert [len(scenes) for scenes in found] == [3, 2]
    alone = pool(clips, tmp_path).scenes
    assert sorted(map(str, found[0] + found[1])) == sorted(map(str, alone))


def test_latents_of_another_autoencoder_are_refused(clips, tmp_path):
    encode(clips, tmp_path)
    other = autoencoder(1)
    with pytest.raises(ValueError, match="written by the encoder .* delete"):
        encode(clips, tmp_path, vae=other)
    # A decoder that trained on leaves them as they are.
    other.load_state_dict(autoencoder().state_dict())
    other.decoder.conv_out.bias.data += 1
    encode(clips, tmp_path, vae=other)


def test_missing_and_changed_files_are_refused(clips, tmp_path):
    encode(clips, tmp_path)
    other = cases.world.Clips.__new__(cases.world.Clips)
    other.__dict__ |= clips.__dict__ | {"seed": 4}
    with pytest.raises(ValueError, match="other scenes"):
        pool(other, tmp_path)
    (tmp_path / "latents_5x16x24_2.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        pool(clips, tmp_path)


def test_full_disk_leaves_nothing_half_written(clips, tmp_path):
    encode(clips, tmp_path, 2)
    (kept,) = tmp_path.iterdir()
    size, soft, hard = kept.stat().st_size, *resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The file system takes no more than half of the next file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        # A captured bar is a file too, which would come to its end first.
        redirected = contextlib.redirect_stderr(io.StringIO())
        with (
            redirected,
            pytest.raises(ValueError, match="could not write .*latents_5x16x24_2.* make room"),
        ):
            encode(clips, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [kept]
    encode(clips, tmp_path)
    assert len(pool(clips, tmp_path).scenes) == 5


def test_too_few_clips_for_all_processes_are_refused(clips, tmp_path):
    second = Team(1, 2)
    with pytest.raises(ValueError, match="2 clips of 5x16x24 leave some of 2 .* ask for 3"):
        encode(clips, tmp_path, 2, team=second)
    assert not list(tmp_path.iterdir())
    encode(clips, tmp_path, 3, team=second)
    assert len(pool(clips, tmp_path, 3, team=second).latents) == 1
