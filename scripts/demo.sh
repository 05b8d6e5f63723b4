#!/usr/bin/env bash
# Installs the project into .venv where needed, then generates one clip densely and one sparsely
# with the bundled model. Videos and report land in outputs/demo, both clips beside each other in
# outputs/demo/side_by_side.mp4; arguments go to `vidattn compare`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env
cd "$ROOT"
exec .venv/bin/vidattn compare --method radial:density=0.3 --frames 65 --output outputs/demo "$@"
