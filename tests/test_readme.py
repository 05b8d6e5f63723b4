"""The commands and the code of every README.md do what it says.

Commands of `vidattn` run as written in a folder with nothing but what earlier ones would have left
there. Those that make videos stop right before weights are loaded, when every flag, size and method
has been checked; under the marker "slow" they run to their end, with two denoising steps. Those of
a model on the hub end with what to do without a network. Python runs with two denoising steps and
small clips. Of the programs in scripts the arguments are read by the program itself, which then
stops.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.commands.cli_cases import run, tiny_wan
from tests.readme_cases import PAGES, ROOT, Page
from vidattn.catalog import describe, list_methods, list_names, list_policies
from vidattn.engines import ENGINES
from vidattn.pipelines.streaming.recipe import Recipe
from vidattn.schedule_file import load_schedule

PROMPTS = "a red bag moving left over a dark background\n"
# of clips that are made as written but smaller
SHORTER = {
    "steps=12": "steps=2",
    "num_frames=33": "num_frames=9",
    "=128, width=128": "=64, width=64",
}
TUNED = "rules:\n- {method: topk, options: {density: 0.25}}\n"
MAKES = ("generate", "compare", "tune", "calibrate")

# each once, whichever page it is on
COMMANDS = {shlex.join(words): words for page in PAGES for words in page.commands}
OURS = {line: words for line, words in COMMANDS.items() if words[0] == "vidattn"}
STREAMS = [line for line, words in OURS.items() if words[1] == "stream" and len(words) > 2]
MAKING = {line: words for line, words in OURS.items() if words[1] in MAKES and len(words) > 2}
HUB = [line for line, words in MAKING.items() if "--model" in words]
BUNDLED = [line for line in MAKING if line not in HUB]
OTHERS = [line for line in COMMANDS if line not in OURS]


def pages(language: str | None = None):
    """Runs a test on every page, or on those that have code in a language."""
    some = [page for page in PAGES if language is None or page.blocks(language)]
    return pytest.mark.parametrize("page", some, ids=lambda page: page.name)


class Loaded(Exception):
    """Weights were about to be loaded."""


class Read(Exception):
    """The arguments of a program were read."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what a reader has there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "tuned.yaml").write_text(TUNED)
    for words in MAKING.values():
        for flag, name in zip(words, words[1:]):
            if flag == "--lora":
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                save_file({}, tmp_path / name)
    return tmp_path


def test_there_is_something_to_run():
    assert len(OURS) > 12 and len(HUB) > 2 and len(BUNDLED) > 4 and len(OTHERS) > 30
    assert {page.name for page in PAGES} > {"README.md", "kernels/README.md", "CONTRIBUTING.md"}


@pytest.mark.parametrize("line", [x for x in OURS if x not in (*MAKING, *STREAMS)])
def test_a_command_without_a_model_runs_as_written(line, folder, capfd):
    words = OURS[line][1:]
    # a command that is named alone is explained
    if words[0] in (*MAKES, "stream", "simulate") and len(words) == 1:
        words.append("--help")
    code, out, err = run(capfd, *words)
    assert code == 0, err
    for path in re.findall(r"^wrote (\S+)$", out, re.MULTILINE):
        assert (folder / path).is_file()


@pytest.mark.parametrize("line", BUNDLED)
def test_a_command_with_the_bundled_model_gets_as_far_as_its_weights(
    line, folder, capfd, monkeypatch
):
    def load(*_):
        raise Loaded

    monkeypatch.setattr("vidattn.runs.serve.load_pipeline", load)
    _, _, err = run(capfd, *MAKING[line][1:])
    assert err.startswith("vidattn: Loaded"), err


@pytest.mark.parametrize("line", STREAMS)
def test_a_stream_of_a_causal_model_gets_as_far_as_its_weights(line, folder, capfd, monkeypatch):
    def load(*_):
        raise Loaded

    monkeypatch.setattr("vidattn.commands.stream.load_pipeline", load)
    words = OURS[line][1:]
    pipe = tiny_wan()
    pipe.transformer.register_to_config(**Recipe().to_config())
    pipe.save_pretrained(folder / words[words.index("--model") + 1])
    capfd.readouterr()
    _, _, err = run(capfd, *words)
    assert err.startswith("vidattn: Loaded"), err


@pytest.mark.slow
@pytest.mark.parametrize("line", BUNDLED)
def test_a_command_with_the_bundled_model_runs(line, folder, capfd):
    code, out, err = run(capfd, *MAKING[line][1:], "--steps", 2)
    assert code == 0 and "wrote " in out, err


@pytest.mark.parametrize("line", HUB)
def test_a_command_with_a_model_of_the_hub_says_how_to_get_it(line, folder, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # the device that --offload wants may not be here
    monkeypatch.setattr("vidattn.runs.serve.find_device", lambda *_: torch.device("cpu"))
    code, _, err = run(capfd, *MAKING[line][1:])
    model = re.search(r"--model (\S+)", line)[1]
    assert code == 2 and f"hf download {model} --local-dir DIR" in err


@pytest.mark.parametrize("line", OTHERS, ids=str)
def test_a_program_takes_its_arguments(line, monkeypatch):
    program, *words = COMMANDS[line]
    if program == "accelerate":
        assert words.pop(0) == "launch"
    for word in words:
        if re.match(r"(scripts|configs|tests|assets)/", word):
            assert (ROOT / word).exists(), word
    if program == "bash":
        subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
    elif program in ("python", "accelerate") and words[0].startswith("scripts/"):
        read_by(monkeypatch, *words)
    else:
        known = ("git clone", "pip install", "python -m pytest", "python -m vidattn")
        assert line.startswith(known), "what runs this?"


def read_by(monkeypatch, script: str, *words: str) -> None:
    """Let a program of scripts read its arguments, and no more."""
    read = argparse.ArgumentParser.parse_args

    def read_and_stop(*args, **options):
        read(*args, **options)
        raise Read

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(Read):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pages("python")
def test_python_runs_as_written(page, folder):
    (folder / "assets").symlink_to(ROOT / "assets")
    names: dict[str, object] = {"__name__": "readme"}
    for text in page.blocks("python"):
        if text not in page.files.values():
            for long, short in SHORTER.items():
                text = text.replace(long, short)
            exec(compile(text, page.name, "exec"), names)


@pages("yaml")
def test_a_schedule_is_read(page, folder):
    for text in page.blocks("yaml"):
        (folder / "mine.yaml").write_text(text)
        schedule = load_schedule(folder / "mine.yaml")
        assert len(schedule.rules) == 3 and schedule.guard.layers == 1


@pages()
def test_what_is_linked_or_named_is_there(page):
    for target, _, place in re.findall(r"\]\(([^)#:]*)(#([^)]*))?\)", page.prose):
        path = page.path.parent / target if target else page.path
        assert path.exists(), target
        if place:
            path = path / "README.md" if path.is_dir() else path
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in [title.lower().replace(" ", "-") for title in titles], place
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|json|sh|cpp))`", page.prose)
    for name in named:
        # as seen from the root of the project, from the page, or with one name for many
        stem = name.replace("x.py", "*.py")
        assert any(ROOT.glob(stem)) or any(page.path.parent.glob(stem)), name


@pages()
def test_a_page_is_no_longer_than_it_should_be(page):
    lines = page.prose.count("\n")
    long = {"README.md": 150, "CONTRIBUTING.md": 110, "assets/tiny-t2v/README.md": 150}
    # two tables of what is served and what it works with
    long["pipelines/README.md"] = 155
    assert lines <= long.get(page.name, 75)
    assert all(len(line) <= 125 for line in page.prose.splitlines() if not line.startswith("|"))


def test_the_table_of_methods_says_what_they_read():
    page = Page(ROOT / "vidattn/methods/README.md")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w[\w ]*) \|", page.text, re.MULTILINE))
    assert set(rows) == set(list_methods()), "give each method a row in vidattn/methods/README.md"
    for name, reads in rows.items():
        expected = {True: ("content", "the heads"), False: ("nothing",)}
        # of a pattern an option decides, whether it is rectified; paro may have been calibrated
        either = ("the grid", "content")
        assert reads in expected.get(describe(name).reads_content, either), name


def test_the_table_of_policies_has_all_of_them():
    page = Page(ROOT / "vidattn/cache/README.md")
    rows = re.findall(r"^\| `(\w+)` \|", page.text, re.MULTILINE)
    assert sorted(rows) == list_policies(), "give each policy a row in vidattn/cache/README.md"


def test_the_table_of_guides_has_all_of_them():
    page = Page(ROOT / "vidattn/guides/README.md")
    rows = re.findall(r"^\| `(\w+)` \|", page.text, re.MULTILINE)
    assert sorted(rows) == list_names("guides"), "give each guide a row in its README"


def test_the_table_of_models_is_that_of_the_families(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from support_matrix import families, with_table

    page = Page(ROOT / "pipelines/README.md")
    assert page.text == with_table(page.text), "run python scripts/support_matrix.py"
    assert page.text.count("\n| `") >= len(families())


def test_the_table_of_engines_has_all_of_them():
    page = Page(ROOT / "vidattn/README.md")
    table = page.text.partition("| engine |")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(ENGINES)


def test_the_first_page_says_how_to_install():
    readme = Page(ROOT / "README.md")
    assert ["pip", "install", "."] in readme.commands
    assert {"git", "pip", "bash"} <= {words[0] for words in readme.commands}
