"""Write what is served and with what it works into pipelines/README.md.

python scripts/support_matrix.py
"""

import argparse
import re
import sys
from pathlib import Path

from vidattn.pipelines.family import Family, families

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "pipelines" / "README.md"
BESIDE = {"nothing": "", "before": "before the video", "after": "behind the video"}


def main() -> None:
    """Write the tables into the page."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")


def with_table(page: str) -> str:
    """A page with the tables of today between their marks."""
    for name, table in (("models", support_matrix()), ("pairings", pairing_matrix())):
        marks = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)"
        page = re.sub(marks, lambda _: table, page, flags=re.DOTALL)  # noqa: B023
    return page


def pairing_matrix() -> str:
    """A line for each kind of thing that tests/pipelines/test_pairings.py combines with a patch."""
    sys.path.insert(0, str(ROOT))
    from tests.pipelines.pairings import PAIRINGS

    rows: dict[tuple[str, str], list[str]] = {}
    for name, pairing in PAIRINGS.items():
        comes_off = "" if not pairing.comes_off else "to rounding" if pairing.rounding else "yes"
        rows.setdefault((pairing.what, comes_off), []).append(name)
    lines = ["| beside a patch | | taken off while patched |", "|---|---|---|"]
    lines += [f"| {what} | {', '.join(names)} | {off} |" for (what, off), names in rows.items()]
    return "\n".join(lines) + "\n"


def support_matrix() -> str:
    """A line for each family: the classes of diffusers, their layers, text, and what is refused."""
    lines = ["| class of diffusers | layers | text | refused, because |", "|---|---|---|---|"]
    for family in sorted(families(), key=lambda x: (isinstance(x.refuse, str), x.models)):
        names = ", ".join(f"`{name}`" for name in family.models)
        lines.append(f"| {names} | {' | '.join(_cells(family))} |")
    return "\n".join(lines) + "\n"


def _cells(family: Family) -> tuple[str, str, str]:
    """Layers, where the text stands, and why all or some of the models are refused."""
    if isinstance(family.refuse, str):
        return "", "", family.refuse
    layers = family.layers.replace(r"\d+", "N").replace(r"\.", ".").replace(")?", ")")
    layers = layers.replace("|", r"\|")
    why = "" if family.refuse is None else family.refuse.__doc__.strip().rstrip(".")
    return f"`{layers}`", BESIDE[family.beside], why and f"some: {why[0].lower()}{why[1:]}"


if __name__ == "__main__":
    main()
