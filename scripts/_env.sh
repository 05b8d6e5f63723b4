# Sourced by the other scripts: `ensure_env [extras] [pip options]` makes $VENV and installs the
# project into it, editable, unless that is already done.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

_is_supported() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

_find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
    if _is_supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "vidattn needs Python 3.10 or newer; none found (python3 is $(python3 --version 2>&1))." >&2
  echo "Install one, or name it: PYTHON=/path/to/python bash $0" >&2
  return 1
}

_make_venv() {
  local python
  python="$(_find_python)" || return 1
  echo "Making $VENV with $("$python" --version)" >&2
  if ! "$python" -m venv "$VENV"; then
    rm -rf "$VENV"
    echo "$python could not make it; on Debian or Ubuntu: apt install python3-venv" >&2
    return 1
  fi
}

# Everything an install depends on; a matching stamp means there is nothing to do.
_fingerprint() {
  "$VENV/bin/python" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
print(hashlib.sha256((root / "pyproject.toml").read_bytes() + f"{root}{sys.version}".encode()).hexdigest())
PY
}

make_env() {
  if [ -e "$VENV" ] && ! _is_supported "$VENV/bin/python"; then
    echo "$VENV exists but its Python does not run or is older than 3.10; remove it and run again." >&2
    return 1
  fi
  [ -e "$VENV" ] || _make_venv
}

# A .venv made by another tool may lack pip.
ensure_pip() {
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip --upgrade
}

ensure_env() {
  local extras="${1:-}" fingerprint stamp quiet=""
  shift $(($# > 0))
  make_env || return 1
  fingerprint="$(_fingerprint)" || return 1
  stamp="$VENV/.vidattn-installed${extras:+-$extras}"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
    return 0
  fi
  echo "Installing vidattn${extras:+[$extras]} into $VENV (PyTorch is a few GB the first time)" >&2
  ensure_pip || return 1
  # Progress bars for a person, a short log for anything else. Compiling every module of PyTorch
  # ahead of its import would take longer than all the imports of a run.
  [ -t 2 ] || quiet=--quiet
  "$VENV/bin/python" -m pip install $quiet --no-compile "$@" \
    --editable "$ROOT${extras:+[$extras]}" || {
    echo "The installation failed; nothing is marked as installed, so running again resumes it." >&2
    return 1
  }
  echo "$fingerprint" >"$VENV/.vidattn-installed"
  echo "$fingerprint" >"$stamp"
}
