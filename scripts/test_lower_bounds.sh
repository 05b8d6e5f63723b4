#!/usr/bin/env bash
# Runs the default test suite on the oldest releases that pyproject.toml allows, in .venv-lower.
# Wants the oldest Python too: PYTHON=python3.10 bash scripts/test_lower_bounds.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
VENV="$ROOT/.venv-lower"
PYTHON="${PYTHON:-python3.10}"
make_env
ensure_pip
constraints="$VENV/lower-bounds.txt"
"$VENV/bin/python" - "$ROOT/pyproject.toml" >"$constraints" <<'PY'
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

for line in tomllib.loads(Path(sys.argv[1]).read_text())["project"]["dependencies"]:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate():
        (bound,) = requirement.specifier
        # the bug fixes of the oldest series count as that series
        print(f"{requirement.name}=={bound.version}.*")
PY
echo "Oldest releases allowed: $(paste -sd ' ' "$constraints")" >&2
ensure_env test --constraint "$constraints"
cd "$ROOT"
exec "$VENV/bin/python" -m pytest "$@"
