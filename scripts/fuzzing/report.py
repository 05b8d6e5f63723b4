"""What runs of the fuzzer found, as tables for the terminal and a page that is kept."""

import datetime
import json
import platform
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vidattn.runs.hardware import hardware
from vidattn.runs.output import write_json

PAGE = """\
# Fuzzing

`scripts/fuzz.py` draws grids, methods with options, tensors, engines and states of the process.
Plans are compared with the definitions of their methods, attention and its gradients with float64
attention from an explicit mask; bad values have to be refused by name. Refused are cases that a
method cannot serve and says so, such as a density below what it keeps in any case.
"""
SECTION = """
## {cases:,} cases, {wrong:,} wrong

`{command}` on {date}, one thread of {cpu}; {system}, Python {python}, torch {torch}.

{kinds}

Cases by method: {methods}.
"""


@dataclass
class Tally:
    """Cases by kind."""

    tried: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)
    methods: Counter = field(default_factory=Counter)

    def figures(self) -> dict:
        """Everything that a page says."""
        kinds = {
            kind: {"cases": count, "refused": self.refused[kind], "wrong": self.wrong[kind]}
            for kind, count in sorted(self.tried.items())
        }
        return {"kinds": kinds, "methods": dict(sorted(self.methods.items()))}

    def __str__(self) -> str:
        return kind_table(self.figures()["kinds"])


def kind_table(kinds: dict[str, dict[str, int]]) -> str:
    """Markdown, with a row for all of them."""
    total = Counter()
    for row in kinds.values():
        total.update(row)
    lines = ["| kind | cases | refused | wrong |", "| --- | --- | --- | --- |"]
    for kind, row in [*kinds.items(), ("all", total)]:
        lines.append(f"| {kind} | {row['cases']:,} | {row['refused']:,} | {row['wrong']:,} |")
    return "\n".join(lines)


def write(path: Path, tally: Tally, command: str) -> None:
    """Put a run into a page, and into the JSON beside it, in place of an earlier one like it."""
    kept = path.with_suffix(".json")
    runs = json.loads(kept.read_text()) if kept.exists() else {}
    machine = hardware()
    runs[command] = tally.figures() | {
        "date": str(datetime.date.today()),
        "cpu": machine["cpu"],
        "system": machine["system"],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(kept, runs)
    path.write_text(to_markdown(runs), encoding="utf-8")


def to_markdown(runs: dict[str, dict]) -> str:
    """The page, from runs by their commands."""
    page = PAGE
    for command, run in runs.items():
        rows = run["kinds"].values()
        counts = {name: sum(row[name] for row in rows) for name in ("cases", "wrong")}
        methods = ", ".join(f"{name} {count:,}" for name, count in run["methods"].items())
        told = {name: x for name, x in run.items() if name not in ("kinds", "methods")}
        page += SECTION.format(
            command=command, kinds=kind_table(run["kinds"]), methods=methods, **told, **counts
        )
    return page
