"""The commands and the code of README.md do what it says.

The code blocks, and the commands of more than two words in sentences, are taken out of README.md.
Commands of `vidattn` run as written in a folder with nothing but what earlier ones would have left
there. Those that make videos stop right before weights are loaded, when every flag, size and method
has been checked; under the marker "slow" they run to their end, with two denoising steps. Those of
a model on the hub end with what to do without a network. Python runs with two denoising steps. Of
other programs only the files are looked for.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli_cases import run
from vidattn.schedule_file import load_schedule

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPTS = "a red bag moving left over a dark background\n"
TUNED = "rules:\n- {method: topk, options: {density: 0.25}}\n"


def blocks(language: str) -> list[str]:
    """The code blocks in a language."""
    return [text for name, text in BLOCK.findall(README) if name == language]


def commands() -> list[str]:
    """The command lines, each once, in one line and without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    spoken = re.findall(r"`((?:vidattn|python|bash) [^`]*)`", BLOCK.sub("", README))
    lines += [text for text in spoken if len(text.split()) > 2]
    words = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return list(dict.fromkeys(filter(None, words)))


OURS = [line for line in commands() if line.startswith("vidattn ")]
OTHERS = [line for line in commands() if not line.startswith("vidattn ")]
MAKING = [x for x in OURS if x.split()[1] in ("generate", "compare", "tune", "calibrate")]
HUB = [line for line in MAKING if "--model" in line]


class Loaded(Exception):
    """Weights were about to be loaded."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what a reader has there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "tuned.yaml").write_text(TUNED)
    for name in re.findall(r"--lora (\S+)", README):
        (tmp_path / name).parent.mkdir(parents=True)
        save_file({}, tmp_path / name)
    return tmp_path


def test_there_is_something_to_run():
    assert len(OURS) > 8 and len(HUB) > 1 and len(MAKING) > len(HUB) + 4
    assert len(blocks("python")) > 3 and len(blocks("yaml")) == 1


@pytest.mark.parametrize("line", [line for line in OURS if line not in MAKING])
def test_a_command_without_a_model_runs_as_written(line, folder, capfd):
    code, out, err = run(capfd, *shlex.split(line)[1:])
    assert code == 0, err
    for path in re.findall(r"^wrote (\S+)$", out, re.MULTILINE):
        assert (folder / path).is_file()


@pytest.mark.parametrize("line", [line for line in MAKING if line not in HUB])
def test_a_command_with_the_bundled_model_gets_as_far_as_its_weights(
    line, folder, capfd, monkeypatch
):
    def load(*_):
        raise Loaded

    monkeypatch.setattr("vidattn.commands.serve.load_pipeline", load)
    _, _, err = run(capfd, *shlex.split(line)[1:])
    assert err.startswith("vidattn: Loaded"), err


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in MAKING if line not in HUB])
def test_a_command_with_the_bundled_model_runs(line, folder, capfd):
    code, out, err = run(capfd, *shlex.split(line)[1:], "--steps", 2)
    assert code == 0 and "wrote " in out, err


@pytest.mark.parametrize("line", HUB)
def test_a_command_with_a_model_of_the_hub_says_how_to_get_it(line, folder, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # the device that --offload wants may not be here
    monkeypatch.setattr("vidattn.commands.serve.find_device", lambda *_: torch.device("cpu"))
    code, _, err = run(capfd, *shlex.split(line)[1:])
    model = re.search(r"--model (\S+)", line)[1]
    assert code == 2 and f"hf download {model} --local-dir DIR" in err


@pytest.mark.parametrize("line", OTHERS)
def test_other_programs_are_there(line):
    words = line.split()
    assert words[0] in ("git", "pip", "bash", "python", "accelerate"), "what runs this?"
    for word in words[1:]:
        if re.match(r"(scripts|configs|tests)/", word):
            assert (ROOT / word).exists()


def test_python_runs_as_written(folder):
    (folder / "assets").symlink_to(ROOT / "assets")
    names: dict[str, object] = {"__name__": "readme"}
    for text in blocks("python"):
        grid = re.search(r"Grid\((\d+), (\d+), (\d+), text=(\d+)", text)
        if grid:
            t, h, w, beside = map(int, grid.groups())
            shape = (1, 1, t * h * w + beside, 16)
            names |= {name: torch.randn(shape) for name in "qkv"}
        exec(text.replace("num_inference_steps=12", "num_inference_steps=2"), names)
    assert names["video"].shape[0] == 33 and names["out"].shape == names["q"].shape


def test_the_schedule_is_read(folder):
    (folder / "mine.yaml").write_text(blocks("yaml")[0])
    schedule = load_schedule(folder / "mine.yaml")
    assert len(schedule.rules) == 3 and schedule.guard.layers == 1


def test_what_is_linked_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", BLOCK.sub("", README)):
        assert (ROOT / target).exists(), target
    assert "git clone" in README and "pip install ." in README
