# Sourced by the scripts, with the requirements files that they need as arguments:
#     source script/environment.sh requirements.txt
# Changes to the project's root and sets PYTHON to an interpreter with exactly the pinned versions:
# the active environment if it has them, otherwise .venv, created once and then found in a second.
set -euo pipefail
export PYTHONUTF8=1                               # files and paths are UTF-8 whatever the locale
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"   # OpenMP threads soon sleep at a barrier: see main.py
# Make glibc keep freed memory, since every step allocates the same large blocks again. If it were
# returned in between, page faults would take a tenth of the step time of full fine-tuning.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 2
}

# has_pins PYTHON FILE...: is it Python 3.11 or later, with every pin of the files installed?
has_pins() {
    "$1" - "${@:2}" 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version

lines = [line.split("#")[0].strip() for name in sys.argv[1:] for line in open(name)]
pins = [line.split("==") for line in lines if line]
recent = sys.version_info >= (3, 11)
sys.exit(not recent or any(version(name).split("+")[0] != pin for name, pin in pins))
EOF
}

for PYTHON in "${VIRTUAL_ENV:-$PWD/.venv}/bin/python" "$PWD/.venv/bin/python" python3 ''; do
    has_pins "$PYTHON" "$@" && break
done
if [ -z "$PYTHON" ]; then
    echo "installing $* into .venv (only once, takes one to ten minutes) ..." >&2
    PYTHON="$PWD/.venv/bin/python"
    if ! { has_pins "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
        for base in python3.11 python3 python3.12 python3.13 python ''; do
            has_pins "$base" && break
        done
        [ -n "$base" ] || fail "no Python 3.11 or later on the PATH: install one"
        "$base" -m venv --clear .venv ||
            fail "$base cannot create .venv (on Debian: apt install python3-venv)"
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}" >&2 ||
        fail "the installation failed (see above); run this again to resume"
fi
