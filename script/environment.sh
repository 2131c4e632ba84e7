# Sourced by the scripts, with the requirements files that they need as arguments:
#     source script/environment.sh requirements.txt
# Changes to the project's root and sets PYTHON to an interpreter with exactly the pinned versions:
# the active environment if it has them, otherwise .venv, created once and then found in a second.

export PYTHONUTF8=1 # files and paths are UTF-8 whatever the locale
# How long OpenMP threads spin at a barrier before they sleep: see main.py.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"
# Make glibc keep freed memory, since every step allocates the same large blocks again. If it were
# returned in between, page faults would take a tenth of the step time of full fine-tuning.
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

# install FILE...: install the pins into .venv, which is created first if missing or unusable
install() {
    local name
    if ! { recent .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
        for name in python3.11 python3 python3.12 python3.13 python ''; do
            recent "${name:-false}" && break
        done
        [ -n "$name" ] || {
            echo "error: no Python 3.11 or later on the PATH: install one" >&2
            exit 2
        }
        "$name" -m venv --clear .venv || {
            echo "error: $name cannot create .venv (on Debian: apt install python3-venv)" >&2
            exit 2
        }
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        "${@/#/--requirement=}" >&2 || {
        echo "error: the installation failed (see above); run this again to resume" >&2
        exit 2
    }
}

PYTHON=
for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
    "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" "$PWD/.venv/bin/python" python3; do
    if [ -n "$candidate" ] && serves "$candidate" "$@"; then
        PYTHON=$candidate
        break
    fi
done
if [ -z "$PYTHON" ]; then
    echo "installing $* into .venv (only once, takes one to ten minutes) ..." >&2
    install "$@"
    PYTHON="$PWD/.venv/bin/python"
fi
