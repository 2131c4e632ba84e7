# Sourced by the scripts, with the requirement files that they need as arguments:
#     source script/environment.sh requirements.txt
# Goes to the project's root and sets PYTHON to an interpreter that has exactly those pins: the
# active environment where it serves, else .venv, made once and then found again in a second.

export PYTHONUTF8=1 # files and paths are UTF-8 whatever the locale
# How long OpenMP threads spin at a barrier before they sleep: see main.py.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"
# glibc keeps freed blocks, since every step asks for the same large ones again. If they are returned
# in between, each of their pages costs a fault: a tenth of the time of a step of full fine-tuning.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

# recent PYTHON: is it Python 3.11 or later?
recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# serves PYTHON FILE...: is it recent, with every pin of the files installed?
serves() {
    recent "$1" && "$1" - "${@:2}" 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version

lines = [line.split("#")[0].strip() for name in sys.argv[1:] for line in open(name)]
pins = dict(line.split("==") for line in lines if line)
sys.exit(any(version(name).split("+")[0] != pin for name, pin in pins.items()))
EOF
}

# install FILE...: put the pins into .venv, made first if it is not there or not usable
install() {
    local name
    if ! { recent .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
        for name in python3.11 python3 python3.12 python3.13 python ''; do
            recent "${name:-false}" && break
        done
        [ -n "$name" ] || {
            echo "error: Python 3.11 or later is needed and not on the path" >&2
            exit 2
        }
        "$name" -m venv --clear .venv || {
            echo "error: $name cannot make .venv (on Debian: apt install python3-venv)" >&2
            exit 2
        }
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        "${@/#/--requirement=}" >&2 || {
        echo "error: the installation failed (see above); run it again to continue" >&2
        exit 2
    }
}

PYTHON=
for candidate in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" \
    "$PWD/.venv/bin/python" python3; do
    if serves "$candidate" "$@"; then
        PYTHON=$candidate
        break
    fi
done
if [ -z "$PYTHON" ]; then
    echo "installing $* into .venv: once, one to ten minutes ..." >&2
    install "$@"
    PYTHON="$PWD/.venv/bin/python"
fi
