#!/usr/bin/env bash
# Compiles every Triton kernel that ships with the Triton of .venv, with 3.5, the oldest that
# pyproject.toml allows, and with 3.6, that of PyTorch 2.11, each in a folder of its own; adds what
# they need to assets/benchmarks/triton_resources.{json,md} and fails where one does not fit. No GPU
# is needed. Arguments are versions to take for 3.5 and 3.6: bash scripts/test_triton_versions.sh 3.7
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env
cd "$ROOT"
[ $# -gt 0 ] || set -- 3.5 3.6
status=0
"$VENV/bin/python" scripts/triton_resources.py || status=1
for version; do
  folder="$VENV/triton-$version"
  [ -d "$folder/triton" ] ||
    "$VENV/bin/python" -m pip install --quiet --no-deps --target "$folder" "triton==$version.*"
  PYTHONPATH="$folder" "$VENV/bin/python" scripts/triton_resources.py || status=1
done
exit $status
