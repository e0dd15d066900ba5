# Shared by run_autoglm_server.sh and run_tests.sh: a .venv beside the scripts with autoglm built into it.
#
# POSIX sh. The caller sets ROOT (absolute path of the repository) and calls ensure_environment EXTRA.
# Every check that can fail runs before anything slow does, and fails with one line that names the mend.
# The package is installed editable, so changed Python sources take effect at once; a change of
# pyproject.toml, CMakeLists.txt, native/ or the Python version rebuilds.

VENV=$ROOT/.venv
LOG=$VENV/install.log
MIN_PYTHON=3.10
# torch is named exactly: left to itself pip takes the newest build, with gigabytes of GPU libraries.
TORCH=torch==2.13.0

fail() {
    printf 'ERROR: %s\n' "$1" >&2
    exit "${2:-1}"
}

say() {
    printf '%s\n' "$1" >&2
}

is_macos() {
    [ "$(uname -s)" = Darwin ]
}

# mend MACOS_HINT DEBIAN_PACKAGES FEDORA_PACKAGES ARCH_PACKAGES ALPINE_PACKAGES: the line this machine's owner can type.
mend() {
    as_root=
    [ "$(id -u)" = 0 ] || as_root='sudo '
    if is_macos; then printf '%s' "$1"
    elif command -v apt-get >/dev/null 2>&1; then printf '%s' "${as_root}apt-get install -y $2"
    elif command -v dnf >/dev/null 2>&1; then printf '%s' "${as_root}dnf install -y $3"
    elif command -v pacman >/dev/null 2>&1; then printf '%s' "${as_root}pacman -S $4"
    elif command -v apk >/dev/null 2>&1; then printf '%s' "${as_root}apk add $5"
    else printf '%s' "install $2 with your system's package manager"
    fi
}

python_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Sets PYTHON to an interpreter of at least MIN_PYTHON; $PYTHON, when set, is the only candidate.
find_python() {
    seen=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if python_is_new_enough "$candidate"; then
            PYTHON=$candidate
            return
        fi
        version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        seen="${seen:-$candidate is Python $version}"
    done
    hint=$(mend 'brew install python@3.12' 'python3 python3-venv python3-dev' 'python3 python3-devel' python 'python3 python3-dev')
    if [ -n "$seen" ]; then
        fail "$seen, and autoglm needs $MIN_PYTHON or newer. Mend: $hint, or name one: PYTHON=/path/to/python3 sh $0" 2
    fi
    fail "${PYTHON:-python3} was not found; autoglm needs Python $MIN_PYTHON or newer. Mend: $hint" 2
}

check_venv_module() {
    "$PYTHON" -c 'import venv, ensurepip' >/dev/null 2>&1 && return
    version=$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    fail "$PYTHON cannot make a virtual environment (its venv module is not installed). Mend: $(mend \
        'brew install python@3.12' "$version-venv" python3 python 'python3 py3-pip')" 2
}

check_compiler() {
    compiler=${CXX:-}
    for candidate in c++ g++ clang++; do
        [ -n "$compiler" ] || { command -v "$candidate" >/dev/null 2>&1 && compiler=$candidate; }
    done
    hint=$(mend 'xcode-select --install' build-essential 'gcc-c++' base-devel build-base)
    [ -n "$compiler" ] || fail "no C++ compiler was found (looked for c++, g++, clang++). Mend: $hint" 2
    # On macOS c++ exists as a stub before the tools do, so only a compile tells.
    work=$(mktemp -d) || fail "cannot make a temporary folder; is the disk full?" 2
    printf '#include <optional>\nint main() { std::optional<int> x = 0; return *x; }\n' >"$work/probe.cpp"
    # $CXX may hold flags too ("ccache g++"), so it is split on purpose.
    # shellcheck disable=SC2086
    if ! $compiler -std=c++17 -c "$work/probe.cpp" -o "$work/probe.o" >"$work/log" 2>&1; then
        reason=$(grep -m 1 -i error "$work/log" || head -n 1 "$work/log")
        rm -rf "$work"
        fail "the C++ compiler '$compiler' cannot compile C++17 ($reason). Mend: $hint" 2
    fi
    rm -rf "$work"
}

check_python_headers() {
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' && return
    version=$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    fail "the headers of $PYTHON (Python.h) are not installed, and the native part needs them. Mend: $(mend \
        'brew install python@3.12' "$version-dev" python3-devel python python3-dev)" 2
}

# check_disk MEGABYTES
check_disk() {
    free_mb=$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1024) }')
    [ "${free_mb:-0}" -ge "$1" ] && return
    fail "only $free_mb MB are free in $ROOT, and the installation needs $1 MB. Mend: free some space, or clone to a larger disk" 2
}

# What the installed state depends on, as one line: where, which Python, and the sources that are compiled.
fingerprint() {
    (
        cd "$ROOT" || exit 1
        pwd
        "$1" -c 'import sys; print(sys.version)'
        { cat pyproject.toml CMakeLists.txt scripts/env.sh
          find native -type f | LC_ALL=C sort | while read -r file; do printf '%s\n' "$file"; cat "$file"; done
        } 2>/dev/null | cksum
    ) | tr '\n' ' '
}

# watch_log PID WHAT: one short line of progress from the growing log until PID ends; keeps its exit code.
watch_log() {
    shown=
    waited=0
    while kill -0 "$1" 2>/dev/null; do
        line=$(tail -n 40 "$LOG" 2>/dev/null | sed -n \
            -e 's/^[[:space:]]*\(\[[0-9]*\/[0-9]*\]\) .*\/\([^/]*\)$/compiling \1 \2/p' \
            -e 's/^[[:space:]]*\(Downloading [^ ]*\( ([^)]*)\)\{0,1\}\).*/\1/p' \
            -e 's/^[[:space:]]*\(Collecting [^ ]*\).*/\1/p' \
            -e 's/^[[:space:]]*\(Installing collected packages\).*/\1/p' | tail -n 1 | cut -c1-70)
        if [ -t 2 ]; then
            printf '\r\033[K  %s: %s (%d s)' "$2" "$line" "$waited" >&2
        elif [ "$line" != "$shown" ] && [ $((waited % 10)) = 0 ]; then
            say "  $2: $line ($waited s)"
            shown=$line
        fi
        sleep 1
        waited=$((waited + 1))
    done
    [ -t 2 ] && printf '\r\033[K' >&2
    wait "$1"
}

# run_pip WHAT ARGUMENTS...: pip with its output in the log, progress on the screen, one line on failure.
run_pip() {
    what=$1
    shift
    "$VENV/bin/python" -m pip --disable-pip-version-check --retries "${PIP_RETRIES:-2}" --no-input "$@" >"$LOG" 2>&1 &
    pip_pid=$!
    trap 'kill "$pip_pid" 2>/dev/null; say ""; exit 130' INT TERM
    watch_log "$pip_pid" "$what"
    code=$?
    trap - INT TERM
    [ "$code" = 0 ] && return
    if grep -q -i -E 'No space left' "$LOG"; then
        fail "$what failed: the disk is full. Mend: free some space and run the same command again" 2
    elif grep -q -i -E 'CMake Error|ninja: build stopped|error: .*(failed to build|command failed)|Failed building' "$LOG"; then
        grep -i -E '(error|fatal)' "$LOG" | head -n 8 >&2
        fail "$what failed while compiling the native part; the whole output is in $LOG" 1
    elif grep -q -i -E 'NewConnectionError|NameResolution|Name or service|Temporary failure|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Connection (refused|broken|reset)|Network is unreachable|No matching distribution' "$LOG"; then
        fail "$what failed: Python's package index could not be reached. Mend: check the network, or name your mirror or proxy in PIP_INDEX_URL or HTTPS_PROXY, and run the same command again (details: $LOG)" 4
    fi
    tail -n 8 "$LOG" >&2
    fail "$what failed; the whole output is in $LOG" 1
}

# ensure_environment EXTRA: EXTRA is "" to serve and "test" to test. Returns at once when nothing changed.
ensure_environment() {
    extra=$1
    stamp=$VENV/autoglm-${extra:-serve}.stamp
    if [ -x "$VENV/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$VENV/bin/python")" ]; then
        return
    fi
    started=$(date +%s)
    check_venv_module
    check_compiler
    check_python_headers
    needed_mb=700
    [ -z "$extra" ] || needed_mb=3000
    [ -f "$stamp" ] || check_disk "$needed_mb"
    # A folder that was moved or copied keeps the old place in its scripts; such an environment is made anew.
    if [ -d "$VENV" ] && ! { [ -x "$VENV/bin/python" ] && python_is_new_enough "$VENV/bin/python" &&
        grep -qF "$VENV" "$VENV/bin/activate" 2>/dev/null; }; then
        rm -rf "$VENV"
    fi
    if [ ! -d "$VENV" ]; then
        say "Making a virtual environment in $VENV"
        "$PYTHON" -m venv "$VENV" || fail "$PYTHON could not make $VENV" 2
    fi
    rm -f "$VENV"/autoglm-*.stamp
    if [ "$extra" = test ]; then
        say "Installing $TORCH (the tests' oracle)"
        run_pip "installing torch" install -v --no-compile "$TORCH"
    fi
    say "Building and installing autoglm${extra:+ with the $extra needs}"
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
    export CMAKE_BUILD_PARALLEL_LEVEL
    # Of thousands of files few are ever imported; Python compiles those when it meets them.
    run_pip "building autoglm" install -v --no-compile --editable "$ROOT${extra:+[$extra]}"
    # What the tests need includes what serving needs.
    print_fingerprint=$(fingerprint "$VENV/bin/python")
    printf '%s' "$print_fingerprint" >"$VENV/autoglm-serve.stamp"
    printf '%s' "$print_fingerprint" >"$stamp"
    say "Ready after $(($(date +%s) - started)) s"
}
