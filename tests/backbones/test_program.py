"""Other programs know the models when ``python -m vidattn.backbones`` runs them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import neighbor
import timm
from torch import nn

if __name__ == "__main__":
    model = timm.create_model(sys.argv[1], device="meta", num_classes=3)
    print(neighbor.WORD, type(model).__name__, sys.argv[1:])
    sys.exit(7)
"""


def run(*arguments):
    command = [sys.executable, "-m", "vidattn.backbones", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_program_knows_the_models(tmp_path):
    (tmp_path / "neighbor.py").write_text("WORD = 'found'")
    (tmp_path / "train.py").write_text(PROGRAM)
    done = run(tmp_path / "train.py", "dinat_mini", "--lr", "1")
    assert done.stdout.split("\n")[0] == "found NeighborhoodTransformer ['dinat_mini', '--lr', '1']"
    assert done.returncode == 7


def test_a_program_that_is_not_there_is_named():
    done = run("train.py")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("no program 'train.py' here; timm's are in its repository")
