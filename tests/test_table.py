"""Tables fit a line by wrapping text and moving columns, and never by breaking a word."""

import pytest

from vidattn.support.table import table

HEAD = ["method", "density", "whole run", "PSNR", "what it keeps"]
ROWS = [
    ["dense", "1.000", "61.50 s", "", "everything"],
    ["neighborhood:window=9,15,27", "0.053", "8.10 s", "28.91 dB", "a window on each axis " * 3],
    ["radial:density=0.3,window=raster", "0.299", "950 ms", "31.02 dB", "near frames"],
]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 24])
def test_every_word_is_whole_and_lines_fit(width):
    text = table(HEAD, ROWS, prose=["what it keeps"], width=width)
    lines = text.splitlines()
    for row in [HEAD, *ROWS]:
        for cell in row:
            assert all(word in text.split() for word in cell.split()), cell
    longest = max(len(row[0]) for row in ROWS)
    assert max(map(len, lines)) <= max(width, longest)
    assert all(line == line.rstrip() for line in lines)


def test_figures_stand_under_each_other():
    lines = table(HEAD[:3], [row[:3] for row in ROWS], width=80).splitlines()
    assert [line[-7:] for line in lines[1:]] == ["61.50 s", " 8.10 s", " 950 ms"]
    assert len({line.index(x) for line, x in zip(lines[1:], ("1.000", "0.053", "0.299"))}) == 1


def test_names_go_on_lines_of_their_own_before_columns_move_down():
    lines = table(HEAD[:4], [row[:4] for row in ROWS], width=50).splitlines()
    assert lines[0] == "method" and lines[1].split() == ["density", "whole", "run", "PSNR"]
    assert lines[4] == ROWS[1][0] and lines[5].split() == ["0.053", "8.10", "s", "28.91", "dB"]
    # 'whole run' and PSNR do not fit beside each other any more
    narrow = table(HEAD[:4], [row[:4] for row in ROWS], width=20)
    assert narrow.count(ROWS[1][0]) == 2 and "\n\n" in narrow


def test_text_wraps_beside_what_stays_whole():
    text = table(["option", "meaning"], [["window", "a b " * 30], ["near", "c"]], prose=["meaning"],
                 width=40)  # fmt: skip
    lines = text.splitlines()
    assert lines[1].startswith("window  a b") and lines[2].startswith("        a b")
    assert lines[-1] == "near    c"


def test_a_head_may_have_two_lines():
    lines = table(["GPU", "dense\nms"], [["H100", "1.5"]], width=80).splitlines()
    assert lines == ["      dense", "GPU      ms", "H100    1.5"]


def test_the_terminal_says_how_wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    wide = table(HEAD, ROWS, prose=["what it keeps"])
    monkeypatch.setenv("COLUMNS", "80")
    assert wide != table(HEAD, ROWS, prose=["what it keeps"])
    assert len(wide.splitlines()) == 4
