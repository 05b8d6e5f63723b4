"""The command line without a model: list, draw, options of methods, answers to mistakes."""

import argparse
import json
import signal

import pytest

from vidattn import engines
from vidattn.catalog import describe, list_methods, list_names
from vidattn.choice import Choice, parse_choice
from vidattn.cli import COMMANDS, main
from vidattn.flags.video import add_model_arguments, add_request_arguments
from vidattn.kernels.engines import exact
from vidattn.runs import output
from vidattn.runs.folder import BUNDLED, read_card
from vidattn.runs.output import fresh_file, write_atomically, write_json
from vidattn.runs.request import request_of
from vidattn.support.resources import resource

PNG = b"\x89PNG\r\n\x1a\n"


def run(capfd, *argv):
    """Exit code, what was printed, and what was complained about."""
    code = main([str(word) for word in argv])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_list_names_every_method_with_its_options(capfd):
    code, out, _ = run(capfd, "list")
    assert code == 0
    for name in list_methods():
        assert name in out
        assert all(option in out for option in describe(name).options)


@pytest.mark.parametrize("name", list_methods())
def test_list_explains_every_option_of_a_method(name, capfd):
    meanings = [option.meaning for option in describe(name).options.values()]
    assert all(meanings), "an option is missing in the docstring's Args"
    code, out, _ = run(capfd, "list", name)
    assert code == 0 and name in out
    assert all(option in out for option in describe(name).options)


def test_list_knows_the_models(capfd):
    code, out, _ = run(capfd, "list", "--models")
    assert code == 0 and out.index("WanTransformer3DModel") < out.index("and refuses these")
    assert run(capfd, "list", "radial", "--models")[0] != 0
    code, out, _ = run(capfd, "list", "--presets")
    assert code == 0 and "wan2.1-14b" in out and "radial:decay=0.2" in "".join(out.split())
    assert run(capfd, "list", "--presets", "--models")[0] != 0
    assert run(capfd, "list", "radial", "--policies")[0] != 0


@pytest.mark.parametrize(
    ("flag", "home", "wrong", "meant"),
    [("--policies", "cache", "rollin", "rolling"), ("--guides", "guides", "softpga", "softpag")],
)
def test_list_explains_policies_and_guides(capfd, flag, home, wrong, meant):
    code, out, _ = run(capfd, "list", flag)
    assert code == 0
    for name in list_names(home):
        assert name in out
        code, explained, _ = run(capfd, "list", flag, name)
        assert code == 0 and all(option in explained for option in describe(name, home).options)
    code, _, err = run(capfd, "list", flag, wrong)
    assert code == 2 and f"did you mean '{meant}'" in err


def test_list_says_what_runs_attention_here(capfd, monkeypatch):
    monkeypatch.setattr(exact, "speed_of", lambda kind: 2.0 if kind.has_gradient else 0.5)
    code, out, _ = run(capfd, "list", "--engines")
    assert code == 0
    for engine in engines.ON_CPU:
        assert f"{engine} " in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("float32", "bfloat16"))]
    assert [row[-4:] for row in rows] == [["0.50x"] * 4, ["2.00x"] * 4] * 2
    assert run(capfd, "list", "--engines", "--models")[0] != 0


@pytest.mark.parametrize("name", list_methods())
def test_draw_makes_a_picture_of_every_method(name, capfd, tmp_path):
    path = tmp_path / "new" / "plan.png"
    code, out, _ = run(capfd, "draw", name, "--grid", "5x7x11", "--text", 3, "--output", path)
    assert code == 0 and str(path) in out
    assert path.read_bytes().startswith(PNG)
    assert [x.name for x in path.parent.iterdir()] == ["plan.png"]


def test_draw_takes_options_both_ways(capfd, tmp_path):
    path = tmp_path / "plan.png"
    grid = ("--grid", "9x16x16", "--output", path)
    one = run(capfd, "draw", "neighborhood", "--window", "3,5,7", "--causal", "yes,no,no", *grid)
    two = run(capfd, "draw", "--method", "neighborhood:window=3,5,7,causal=yes,no,no", *grid)
    assert one[0] == two[0] == 0
    assert one[1] == two[1]


def test_draw_several(capfd, tmp_path):
    path = tmp_path / "plans.svg"
    code, out, _ = run(
        capfd, "draw", "dense", "radial:sink=no", "--query", "0,1,2", "--output", path
    )
    assert code == 0 and "sink=false" in path.read_text()
    assert "dense" in out and "1.00x" in out


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("neighborhood", {}),
        ("neighborhood:window=5,9,9,stride=1", {"window": (5, 9, 9), "stride": 1}),
        ("neighborhood:window=5x9x9", {"window": (5, 9, 9)}),
        ("neighborhood:causal=true,false,false", {"causal": (True, False, False)}),
        ("neighborhood:causal=on,tile=none", {"causal": True, "tile": None}),
        ("radial:density=1,window=raster", {"density": 1.0, "window": "raster"}),
        ("radial:sink=no,near=2", {"sink": False, "near": 2}),
    ],
)
def test_a_method_is_read_with_its_options(text, options):
    choice = parse_choice(text)
    assert choice.options == options
    assert [type(x) for x in choice.options.values()] == [type(x) for x in options.values()]
    assert parse_choice(choice.label) == choice


def test_a_label_is_what_the_command_line_reads():
    assert (
        Choice("radial", {"density": 0.3, "sink": False}).label == "radial:density=0.3,sink=false"
    )


DRAW = "draw --output {tmp}/plan.png "
MAKE = "generate x --output {tmp}/x.mp4 --model {tmp} "
BUNDLE = "generate x --output {tmp}/x.mp4 "


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("drwa", "unknown command 'drwa': did you mean 'draw'"),
        ("list radail", "unknown method 'radail': did you mean 'radial'"),
        (DRAW, "no method given"),
        (DRAW + "radail", "did you mean 'radial'"),
        (DRAW + "radial --denisty 0.3", "unknown option '--denisty': did you mean '--density'"),
        (DRAW + "radial:denisty=0.3", "unknown option of method 'radial' 'denisty': did you mean"),
        (DRAW + "radial --density 1.5", "density must be above 0 and at most 1, got 1.5"),
        (DRAW + "radial --density 0", "density must be above 0"),
        (DRAW + "radial --density lots", "density must be a number or none, got 'lots'"),
        (DRAW + "radial --window tiel", "did you mean 'tile'"),
        (DRAW + "radial:tile", "has no '='"),
        (DRAW + "neighborhood --window 5,9", "window must be one integer or t,h,w, got '5,9'"),
        (DRAW + "neighborhood --window=-5", "integers of at least 1"),
        (DRAW + "radial dense --density 0.3", "unknown option '--density'"),
        (DRAW + "radial --grid 5x7", "--grid must be three integers such as 21x30x52, got '5x7'"),
        (DRAW + "radial --grid 5x0x7", "Grid.h must be an integer of at least 1, got 0"),
        (DRAW + "radial --text=-2", "Grid.text must be an integer of at least 0, got -2"),
        (DRAW + "radial --query 0,0,99", "outside the grid"),
        ("draw radial --output {tmp}/plan.bmp", "must end in .png or .pdf or .svg"),
        ("draw radial --output {tmp}", "must end in"),
        ("draw radial --output {tmp}/file/plan.png", "cannot write in"),
        (MAKE + "--frames 0", "--frames: must be at least 1, got 0"),
        (MAKE + "--height=-16", "--height: must be at least 1, got -16"),
        (MAKE + "--steps two", "--steps: must be an integer, got 'two'"),
        (MAKE + "--seed=-1", "--seed: must be from 0"),
        (MAKE + "--dense-steps 1.5", "--dense-steps: must be a count of at least 0, or a share"),
        (MAKE + "--dtype float8", "--dtype: invalid choice: 'float8'"),
        (MAKE + "--method radial --method dense", "generate takes one --method"),
        (MAKE + "--method radial --schedule ltx-2", "generate takes a method or a schedule"),
        (MAKE + "--schedule wan2.1-14", "did you mean 'wan2.1-14b'"),
        (MAKE + "more words", "unexpected 'more'; quote a prompt"),
        ("generate --output {tmp}/x.mp4 --model some/model", "no prompt given"),
        ("generate --prompt= --model {tmp}", "the prompt is empty"),
        ("generate a --prompt b", "2 prompts need --output FILE"),
        ("generate a --image {tmp}/no.png --model {tmp}", "--image '{tmp}/no.png' is no file"),
        ("generate a --output {tmp}/file/x.mp4 --model {tmp}", "cannot write in '{tmp}/file'"),
        ("generate a --output {tmp}/x.avi --model {tmp}", "must end in .mp4 or .gif"),
        ("compare a --output {tmp}/file --model {tmp}", "cannot write in '{tmp}/file'"),
        ("compare a --method dense --model {tmp}", "nothing to compare dense with"),
        (BUNDLE + "--offload model --device cpu", "--offload model needs a GPU"),
        (BUNDLE + "--device gpu", "--device 'gpu' cannot be used"),
        (BUNDLE + "--guidance inf", "--guidance: must be a number, got 'inf'"),
        (BUNDLE + "--num-frames 9", "unknown option '--num-frames': did you mean '--frames'?"),
        (BUNDLE + "--guidance-scale 9", "did you mean '--guidance'?"),
        (BUNDLE + "--gguf x", "unknown option '--gguf'. Known: "),
        (BUNDLE + "--video x", "unknown option '--video'. Known: "),
        ("generate x --output {tmp}/" + 252 * "x" + ".mp4", "take names of 255 bytes, got 256"),
        ("generate x --output {tmp}/" + 251 * "x" + ".mp4", "...json' is too long"),
        (MAKE, "has no model_index.json"),
        ("generate x --output {tmp}/x.mp4 --model {tmp}/gone", "is no folder on this machine"),
        ("generate x --output {tmp}/x.mp4 --model {tmp}/a.ckpt", "pickle checkpoints can run code"),
        (
            "generate x --output {tmp}/x.mp4 --model tiny",
            "is no folder on this machine, and no hub",
        ),
    ],
)
def test_a_mistake_is_named_and_fails(line, words, capfd, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run(capfd, *(word.format(tmp=tmp_path) for word in line.split()))
    assert code != 0
    assert err.startswith("vidattn: ") and words.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="radail"):
        main(["list", "radail", "--debug"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_name_the_command(command, capfd):
    code, out, _ = run(capfd, command, "--help")
    assert code == 0 and "examples:" in out and f"vidattn {command}" in out


def test_help_of_a_method_shows_its_options(capfd):
    _, out, _ = run(capfd, "generate", "--method", "radial", "--help")
    assert "options of radial" in out and "--density" in out and "--no-sink" in out
    assert "options of radial" in run(capfd, "generate", "--help")[1]
    assert "options of" not in run(capfd, "compare", "--help")[1]


def test_overview_and_version(capfd):
    code, out, _ = run(capfd, "--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    assert run(capfd, "help") == (code, out, "")
    assert run(capfd, "help", "draw") == run(capfd, "draw", "--help")
    assert run(capfd)[0] != 0
    assert "vidattn " in run(capfd, "--version")[1]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), write_atomically(path) as partial:
            partial.write_text("half")
            raise error
    assert json.loads(path.read_text()) == {"a": 1}
    assert [x.name for x in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_without_permission_is_refused(monkeypatch, tmp_path):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot write in .*Permission denied"):
        output.writable_folder(tmp_path)


def test_ctrl_c_is_exit_code_130(monkeypatch, capfd):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("vidattn.commands.list.run", interrupted)
    code, _, err = run(capfd, "list")
    assert code == 130 and "Traceback" not in err


def test_the_bundled_model_has_defaults_of_its_own():
    card, defaults = read_card(None), []
    assert card.prompt and card.sizes
    for model in ([], ["--model", str(resource(BUNDLED))]):
        parser = argparse.ArgumentParser()
        add_model_arguments(parser)
        add_request_arguments(parser)
        request = request_of(parser.parse_args([*model, "--steps", "7"]), None)
        assert request.prompt == card.prompt
        assert (request.num_frames, request.height, request.width) in card.sizes
        defaults.append(request.arguments())
    assert defaults[0] == defaults[1]
    changed = card.defaults.items() - defaults[0].items()
    assert changed == {("num_inference_steps", card.defaults["num_inference_steps"])}


def test_no_table_breaks_a_name(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    methods = ["neighborhood:window=3,5,7,causal=yes,no,no", "radial:density=0.9,window=raster"]
    draw = ("draw", *methods, "--grid", "5x7x11", "--output", tmp_path / "x.png")
    simulate = ("simulate", *methods, "--grid", "5x7x11")
    for line in (("list",), ("list", "radial"), ("list", "--presets"), draw, simulate):
        code, out, err = run(capfd, *line)
        assert code == 0, err
        lines = out.splitlines()
        long = [x for x in lines if len(x) > 80 and len(x.split()) > 1 and "/" not in x]
        assert not long, long
        for method in methods if line in (draw, simulate) else ():
            assert parse_choice(method).label in out.split()


def test_a_picture_says_that_queries_and_keys_are_made_up(capfd, tmp_path):
    path = tmp_path / "plans.svg"
    line = ("draw", "radial", "topk", "--grid", "5x7x11", "--output", path)
    code, out, _ = run(capfd, *line)
    assert code == 0 and "made up, from a smooth pattern, for topk." in " ".join(out.split())
    # the note stands beside one of the two
    assert path.read_text().count("queries and keys made up") == 1
    assert "made up" not in run(capfd, "draw", "radial", "--output", path)[1]


def test_an_ending_may_be_in_capitals(capfd, tmp_path):
    code, _, err = run(capfd, "draw", "radial", "--output", tmp_path / "plan.PNG")
    assert code == 0, err
    assert (tmp_path / "plan.PNG").read_bytes().startswith(PNG)


def test_a_file_that_is_there_is_left_alone_by_default(tmp_path):
    path = tmp_path / "video.mp4"
    assert fresh_file(path) == path
    path.touch()
    assert fresh_file(path).name == "video-2.mp4"
    (tmp_path / "video-2.json").touch()
    assert fresh_file(path).name == "video-3.mp4"
