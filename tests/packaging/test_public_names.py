"""What `import vidattn` offers, and what it leaves alone."""

import subprocess
import sys

import pytest

import vidattn
from tests.packaging.conftest import ROOT

PUBLIC = {
    "Grid",
    "Recipe",
    "attend",
    "guide",
    "list_methods",
    "neighborhood_attention",
    "patch",
    "plan",
    "stream",
    "unpatch",
}


def run(code):
    """Run code in a fresh interpreter at the root of the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_listed_and_resolve():
    assert set(vidattn.__all__) == PUBLIC
    assert set(dir(vidattn)) == PUBLIC | {"__version__"}
    assert all(callable(getattr(vidattn, name)) for name in PUBLIC)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vidattn' has no attribute 'atend'"):
        _ = vidattn.atend


# The function vidattn.plan and the module vidattn.plan share a name; the function keeps it.
ORDERS = {
    "module first": "import vidattn.plan",
    "type first": "from vidattn.plan import Plan",
    "function first": "from vidattn import plan",
    "package first": "import vidattn",
    "a user first": "import vidattn.kernels.block_lists, vidattn.attention",
    "by name": "import importlib; importlib.import_module('vidattn.plan')",
}


@pytest.mark.slow
@pytest.mark.parametrize("first", ORDERS)
def test_the_function_plan_wins_in_a_fresh_process(first):
    run(f"{ORDERS[first]}\n{STAYS_A_FUNCTION}")


STAYS_A_FUNCTION = """
import importlib, pickle, sys
import vidattn
from vidattn.plan import Plan
import vidattn.plan
importlib.import_module("vidattn.plan")
assert callable(vidattn.plan) and vidattn.plan is sys.modules["vidattn.methods"].plan
assert sys.modules["vidattn.plan"].Plan is Plan is pickle.loads(pickle.dumps(Plan))
plan = vidattn.plan("dense", vidattn.Grid(2, 3, 5))
assert isinstance(plan, Plan)
"""


def test_the_function_plan_wins_and_heavy_libraries_stay_out():
    heavy = (
        "heavy = {'diffusers', 'transformers', 'timm', 'matplotlib', 'imageio'}\n"
        "dir(vidattn)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run("from vidattn.plan import Plan\n" + STAYS_A_FUNCTION + heavy)


def test_importing_costs_little_beside_pytorch_and_leaves_its_compiler_alone():
    run(
        "import sys, time, vidattn\n"
        "assert 'torch' not in sys.modules, 'the command line answers much without it'\n"
        "begin = time.process_time()\n"
        "import torch\n"
        "torch_s, before = time.process_time() - begin, set(sys.modules)\n"
        "vidattn.Grid, vidattn.attend, vidattn.plan, vidattn.neighborhood_attention\n"
        "all_s = time.process_time() - begin\n"
        "compiler = {'torch._dynamo', 'torch._inductor', 'triton', 'sympy'}\n"
        "assert not compiler & (set(sys.modules) - before)\n"
        "assert all_s < 1.3 * torch_s, (all_s, torch_s)\n"
    )
