#!/bin/sh
# Builds the native module with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests that reach it.
#   sh scripts/sanitize.sh [pytest arguments]      needs the .venv that run_tests.sh makes, and GCC
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize
python=$root/.venv/bin/python
cd "$root"
PATH=$root/.venv/bin:$PATH
"$python" -m pip install -q cmake ninja nanobind
cmake -S . -B "$build" -G Ninja -DAUTOGLM_SANITIZE=ON -DPython_EXECUTABLE="$python" >"$build.log" 2>&1 ||
    { cat "$build.log"; exit 1; }
ninja -C "$build"
# A package of its own, so that the release build is not the one imported.
rm -rf "$build/site" && mkdir -p "$build/site"
cp -r autoglm "$build/site/"
rm -f "$build/site/autoglm/kernels/"_native*.so
cp "$build/"_native*.so "$build/site/autoglm/kernels/"
[ $# -gt 0 ] || set -- tests/kernels tests/parity tests/invariants -m "not slow"
# Python itself leaks by design at exit; everything else aborts the run.
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    PYTHONPATH="$build/site:$root" PYTHONSAFEPATH=1 \
    "$python" -m pytest -q -p no:cacheprovider "$@"
