"""timm's own tests of models, from the source archive of the installed version, on ours."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_timm_accepts_every_model(tmp_path):
    download = ["pip", "download", "--no-deps", "--no-binary", "timm", f"timm=={timm.__version__}"]
    got = subprocess.run(
        [sys.executable, "-m", *download], cwd=tmp_path, capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"no source archive of timm: {got.stderr.strip().splitlines()[-1]}")
    (archive,) = tmp_path.glob("timm-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / archive.name.removesuffix(".tar.gz")
    options = ["-c", os.devnull, "--rootdir", ".", "--import-mode=importlib", "-q"]
    options += ["-p", "timm_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/test_models.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
