"""The table of `vidattn compare`, and what is said of times that vary."""

from dataclasses import replace

from vidattn.commands.compare import file_name, warn_of_noise
from vidattn.commands.comparison import Row, to_markdown, to_text
from vidattn.quality.measures import MEASURES


def test_a_method_with_a_long_name_has_a_file_of_its_own():
    names = {file_name("paro:calibration=" + 300 * "x" + end) for end in ("a", "b")}
    assert len(names) == 2 and max(map(len, names)) < 200
    assert file_name("radial:density=0.3") == "radial-density=0.3"


def row(label, steps_ms, total_ms=1000.0):
    return Row(label, 1.0, 1.0, steps_ms, total_ms, 0.5, {"psnr_db": 30.0})


def test_the_whole_run_comes_first_and_noise_is_warned_of(capfd):
    rows = [row("dense", [100.0] * 8), row("a:b=1", [42000.0, *[50.0] * 7], 4000.0)]
    table = to_markdown(rows, [MEASURES["psnr"]]).splitlines()
    assert table[0].startswith("| method | speed-up | whole run | step | step speed-up |")
    assert table[3].startswith("| `a:b=1` | 0.25x | 4.00 s | 50 ms ±0% | 2.00x |")
    warn_of_noise(rows, 1)
    assert capfd.readouterr().err == ""
    rows.append(row("topk", [100.0, 100.0, 100.0, 300.0, 300.0, 300.0]))
    warn_of_noise(rows, 1)
    words = " ".join(capfd.readouterr().err.split())
    assert "times varied 3.0x: the middle half of the steps of topk took 100 ms to 300 ms" in words
    assert words.endswith("use --repeats 3")


def test_the_table_of_every_method_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        row("dense", [25000.0] * 8, 628e3),
        row("radial:density=0.3,window=raster", [9e3, 12e3] * 4),
    ]
    rows = [replace(x, figures={"psnr_db": 28.9, "ssim": 0.9, "ms_ssim": 0.9}) for x in rows]
    text = to_text(rows, [MEASURES[name] for name in ("psnr", "ssim", "ms-ssim")])
    assert max(map(len, text.splitlines())) <= 80 and "\n\n" not in text
    assert "radial:density=0.3,window=raster\n" in text and "±14%" in text and " 628 s" in text
