#!/usr/bin/env bash
# Installs the project into .venv where needed, then lints it, checks its types and runs the default test suite.
# Arguments go to pytest: bash scripts/test.sh tests/test_imports.py -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test
cd "$ROOT"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
# the whole suite on all cores, a file of tests at a time
[ $# -gt 0 ] || set -- -n auto --dist loadfile
exec .venv/bin/python -m pytest "$@"
