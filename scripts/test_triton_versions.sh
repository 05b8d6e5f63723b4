#!/usr/bin/env bash
# Compiles the kernels with the oldest Triton that pyproject.toml allows and with the newest, each in
# a folder of its own in front of .venv. No GPU is needed. Arguments go to pytest: the most used
# kernels by default, all that ship with -m 'slow or not slow'; VERSIONS="3.6.*" names others.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test
cd "$ROOT"
oldest="$(sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml)"
# word splitting is wanted: one version to a word
for version in ${VERSIONS:-"$oldest.*" newest}; do
  folder="$VENV/triton-${version//\*/latest}"
  wanted="triton==$version"
  [ "$version" = newest ] && wanted=triton
  if [ ! -d "$folder/triton" ] || [ "$version" = newest ]; then
    "$VENV/bin/python" -m pip install --quiet --no-deps --upgrade --target "$folder" "$wanted"
  fi
  echo "Compiling with Triton of $folder" >&2
  PYTHONPATH="$folder" TRITON_CACHE_DIR="$folder/cache" \
    "$VENV/bin/python" -m pytest tests/kernels/test_triton_compile.py "$@"
done
