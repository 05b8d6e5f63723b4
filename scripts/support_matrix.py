"""Write which models are served into pipelines/README.md: python scripts/support_matrix.py."""

import argparse
import re
from pathlib import Path

from vidattn.pipelines.family import Family, families

PAGE = Path(__file__).resolve().parents[1] / "pipelines" / "README.md"
TABLE = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- end of models -->)", re.DOTALL)
BESIDE = {"nothing": "", "before": "before the video", "after": "behind the video"}


def main() -> None:
    """Write the table into the page."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")


def with_table(page: str) -> str:
    """A page with the table of today between its marks."""
    return TABLE.sub(lambda _: support_matrix(), page)


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
    why = "" if family.refuse is None else family.refuse.__doc__.strip().rstrip(".")
    return f"`{layers}`", BESIDE[family.beside], why and f"some: {why[0].lower()}{why[1:]}"


if __name__ == "__main__":
    main()
