"""The command line in fresh processes: questions and typos are answered without PyTorch."""

import subprocess
import sys
from pathlib import Path

import vidattn

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "--version": 0,
    "--help": 0,
    "help": 0,
    "list": 0,
    "list radial": 0,
    "list --presets": 0,
    "list --policies": 0,
    "list --guides": 0,
    "generate --help": 0,
    "stream x --policy tempcach": 2,
    "lsit": 2,
    "help radail": 2,
    "list radail": 2,
    "generate --gguf x": 2,
    "generate --guide softpga": 2,
    "compare --method radial:denisty=0.3": 2,
    "tune --prompts nothing --budget density=0.3 --method topp": 2,
    "generate x --schedule wan2.1-14": 2,
    "simulate radial --model wan": 2,
}


def test_questions_and_typos_are_answered_without_pytorch():
    code = (
        "import sys, time\n"
        "from vidattn.cli import main\n"
        f"codes = {{line: main(line.split()) for line in {list(QUICK)}}}\n"
        f"assert codes == {QUICK}, codes\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 2, 'a tenth of a second each, and as long to start'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_runs_the_package():
    done = subprocess.run(
        [sys.executable, "-m", "vidattn", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"vidattn {vidattn.__version__}\n")
