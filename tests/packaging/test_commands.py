"""The two commands install once, work from any folder and fail with advice."""

import shutil
import subprocess
import sys

import pytest

from tests.packaging.conftest import ROOT

# Runs the fingerprint for real and notes every `python -m ...` instead of running it.
FAKE_PYTHON = """#!/bin/bash
case "$1" in
  -c) exit 0 ;;
  -) exec {python} "$@" ;;
esac
echo "$@" >>{log}
{action}
"""


@pytest.fixture
def project(tmp_path):
    """A checkout with the scripts and a .venv whose programs only note how they were called."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for script in ("_env.sh", "test.sh", "demo.sh", "test_lower_bounds.sh"):
        shutil.copy(ROOT / "scripts" / script, root / "scripts" / script)
    (root / "pyproject.toml").write_text("[project]\n")
    for folder in (".venv", ".venv-lower"):
        (root / folder / "bin").mkdir(parents=True)
    fake(root, "true")
    return root


def fake(root, action):
    """(Re)write the programs of the .venv; ``action`` runs after a call is noted."""
    for program in (".venv/bin/python", ".venv/bin/vidattn", ".venv-lower/bin/python"):
        path = root / program
        log = f"'{root.parent}/calls'"
        path.write_text(FAKE_PYTHON.format(python=sys.executable, log=log, action=action))
        path.chmod(0o755)


def run(root, script, *args, path="/usr/bin:/bin"):
    """Run a script from outside the checkout; return (exit code, stderr, programs called)."""
    calls = root.parent / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["/bin/bash", str(root / "scripts" / script), *args],
        cwd=root.parent,
        env={"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr, calls.read_text().splitlines()


def installs(calls):
    return [call for call in calls if call.startswith("-m pip install")]


def test_second_run_installs_nothing(project):
    code, _, calls = run(project, "test.sh")
    assert code == 0
    (install,) = installs(calls)
    assert install.endswith(f"--editable {project}[test]")
    assert run(project, "test.sh")[2] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "-m pytest -n auto --dist loadfile",
    ]


def test_demo_needs_no_second_install_after_the_tests(project):
    run(project, "test.sh")
    code, _, calls = run(project, "demo.sh")
    assert code == 0
    assert [call.split()[0] for call in calls] == ["compare"]


def test_tests_after_the_demo_add_their_own_packages(project):
    (install,) = installs(run(project, "demo.sh")[2])
    assert install.endswith(f"--editable {project}")
    (install,) = installs(run(project, "test.sh")[2])
    assert install.endswith("[test]")


def test_changed_requirements_install_again(project):
    run(project, "test.sh")
    (project / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert len(installs(run(project, "test.sh")[2])) == 1


def test_arguments_reach_the_program(project):
    assert run(project, "test.sh", "-k", "a b")[2][-1] == "-m pytest -k a b"
    assert run(project, "demo.sh", "--steps", "4")[2][-1].endswith("outputs/demo --steps 4")


def test_failed_install_is_tried_again(project):
    fake(project, "[ $2 != pip ] || [ $3 = --version ]")
    code, error, calls = run(project, "test.sh")
    assert code != 0 and "running again resumes it" in error
    assert calls[-1].startswith("-m pip install")
    fake(project, "true")
    assert len(installs(run(project, "test.sh")[2])) == 1


@pytest.mark.parametrize("failing", ["ruff check", "ruff format", "mypy", "pytest"])
def test_failed_check_fails_the_command(project, failing):
    fake(project, f'[[ "$*" != "-m {failing}"* ]]')
    assert run(project, "test.sh")[0] != 0


def test_broken_environment_is_named(project):
    (project / ".venv" / "bin" / "python").unlink()
    code, error, _ = run(project, "test.sh")
    assert code != 0 and ".venv exists but its Python does not run" in error


def test_old_python_is_refused_with_advice(project, tmp_path):
    shutil.rmtree(project / ".venv")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python", "python3", "python3.10", "python3.11", "python3.12", "python3.13"):
        (old / name).write_text("#!/bin/bash\n[ $1 != --version ] && exit 1\necho Python 3.9.1\n")
        (old / name).chmod(0o755)
    code, error, _ = run(project, "test.sh", path=f"{old}:/usr/bin:/bin")
    assert code != 0
    assert "vidattn needs Python 3.10 or newer; none found (python3 is Python 3.9.1)" in error
    assert not (project / ".venv").exists()


def test_missing_venv_module_leaves_nothing_behind(project, tmp_path):
    shutil.rmtree(project / ".venv")
    half = tmp_path / "half" / "python3"
    half.parent.mkdir()
    half.write_text('#!/bin/bash\n[ "$1" = -c ] && exit 0\nmkdir -p "$3" && exit 1\n')
    half.chmod(0o755)
    code, error, _ = run(project, "test.sh", path=f"{half.parent}:/usr/bin:/bin")
    assert code != 0 and "apt install python3-venv" in error
    assert not (project / ".venv").exists()


def test_lower_bounds_are_pinned(project):
    (project / "pyproject.toml").write_text(
        "[project]\ndependencies = ['torch>=2.9', 'old>=1; python_version < \"3\"', 'av[x]>=1.2.3']"
    )
    code, _, calls = run(project, "test_lower_bounds.sh", "-x")
    pins = project / ".venv-lower" / "lower-bounds.txt"
    assert code == 0
    assert pins.read_text().split() == ["torch==2.9.*", "av==1.2.3.*"]
    (install,) = installs(calls)
    assert f"--constraint {pins} --editable {project}[test]" in install
    assert calls[-1] == "-m pytest -x"


def test_ci_runs_the_tests():
    runner = ROOT / ".ci" / "run"
    assert runner.stat().st_mode & 0o111
    assert "scripts/test.sh" in runner.read_text()
