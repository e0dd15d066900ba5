#!/bin/sh
# Build autoglm into .venv beside this script (the first time, and after a change) and serve a model.
#
#   sh run_autoglm_server.sh                                AutoGLM-Phone-Nano on http://127.0.0.1:8000/v1
#   sh run_autoglm_server.sh -m MODEL.gguf --port 8001      every flag of `autoglm serve`; see --help
set -u

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$ROOT/scripts/env.sh"

find_python
# A taken port or a missing file is said now, not after minutes of building.
"$PYTHON" "$ROOT/autoglm/deploy/preflight.py" "$@" || exit $?
ensure_environment ""
exec "$VENV/bin/autoglm" serve "$@"
