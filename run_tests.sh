#!/bin/sh
# Build autoglm with everything the tests need into .venv beside this script, and run them.
#
#   sh run_tests.sh                   the whole suite
#   sh run_tests.sh tests/engine -k prefix        any arguments of pytest
set -u

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$ROOT/scripts/env.sh"

find_python
ensure_environment test
cd "$ROOT" || exit 1
exec "$VENV/bin/python" -m pytest "$@"
