"""The benchmark of what people combine with a patch."""

import json
import sys

import bench_pairings as bench


def test_it_writes_both_files(monkeypatch, tmp_path):
    small = "--rounds 1 --frames 5 --size 32 --steps 2 --only nothing".split()
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), *small])
    bench.main()
    (row,) = json.loads((tmp_path / "pairings.json").read_text())["rows"]
    assert row["beside"] == "nothing" and len(row["seconds"]) == 1 and row["psnr"] >= 100
    assert "| 1.00x | the same |" in (tmp_path / "pairings.md").read_text()


def test_ratios_are_of_medians():
    rows = [
        {"beside": "nothing", "seconds": [8.0, 6.0, 1.0], "psnr": 100.0},
        {"beside": "--compile", "seconds": [4.0, 9.0, 2.0], "psnr": 31.26},
    ]
    facts = dict.fromkeys(
        "cpu num_cores num_threads torch frames size steps density rounds".split(), 1
    )
    assert bench.to_markdown(rows, facts).endswith(
        "| nothing | 6.0 | 1.0 to 8.0 | 1.00x | the same |\n"
        "| --compile | 4.0 | 2.0 to 9.0 | 1.50x | 31.3 dB |\n"
    )
