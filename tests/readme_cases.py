"""What every README.md and CONTRIBUTING.md of the project says: its code, commands and links."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("git", "pip", "bash", "python", "accelerate", "vidattn")
# a shell in which programs say how they were called instead of running
SHELL = "cd() { :; }\n" + "".join(f"{x}() {{ printf '%q ' {x} \"$@\"; echo; }}\n" for x in PROGRAMS)


@dataclass(frozen=True)
class Page:
    """One page.

    Args:
        path: of the file.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path inside the project."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """What is no block of code."""
        return BLOCK.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """The code blocks in a language."""
        return [text for name, text in BLOCK.findall(self.text) if name == language]

    @property
    def files(self) -> dict[str, str]:
        """Blocks that are whole files, by the path that stands behind their docstring."""
        head = re.compile(r'\A"""[^\n]*"""    # (\S+\.py)$', re.MULTILINE)
        return {found[1]: text for text in self.blocks("python") if (found := head.search(text))}

    @property
    def commands(self) -> list[list[str]]:
        """The words of all commands, each once: those in blocks, and those in sentences."""
        spoken = re.findall(
            rf"`((?:{'|'.join(PROGRAMS)}) [^`]*)`", re.sub(r"\s*\n\s*", " ", self.prose)
        )
        spoken += re.findall(rf"^    ((?:{'|'.join(PROGRAMS)}) .*)$", self.prose, re.MULTILINE)
        lines = [*self.blocks("bash"), *(text for text in spoken if len(text.split()) > 1)]
        shell = subprocess.run(
            ["bash", "-euc", SHELL + "\n".join(lines)], capture_output=True, text=True
        )
        assert shell.returncode == 0, f"{self.name}: {shell.stderr}"
        return [shlex.split(line) for line in dict.fromkeys(shell.stdout.splitlines())]


PAGES = [
    Page(path)
    for path in sorted([*ROOT.rglob("README.md"), ROOT / "CONTRIBUTING.md"])
    # not what is installed or made in a checkout
    if not any(
        part.startswith(".") or part in ("runs", "outputs", "build")
        for part in path.relative_to(ROOT).parts
    )
]
