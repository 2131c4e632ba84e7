# Sourced by the scripts, with the requirement files that they need as arguments:
#     source script/environment.sh requirements.txt
# Goes to the project's root and sets PYTHON to an interpreter that has exactly those pins: the
# active environment where it serves, else .venv, made once and then found again in a second.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# serves PYTHON FILE...: is it Python 3.11 or later, with every pin of the files installed?
serves() {
    [ -x "$1" ] && "$1" - "${@:2}" 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version

lines = [line.split("#")[0].strip() for name in sys.argv[1:] for line in open(name)]
pins = dict(line.split("==") for line in lines if line)
ok = all(version(name).split("+")[0] == pin for name, pin in pins.items())
sys.exit(not ok or sys.version_info < (3, 11))
EOF
}

# new_environment: make .venv with the first Python on the path that is recent enough
new_environment() {
    local name
    for name in python3.11 python3 python3.12 python3.13 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$name" -m venv .venv && return
            echo "error: $name cannot make an environment (on Debian: apt install python3-venv)" >&2
            exit 2
        fi
    done
    echo "error: Python 3.11 or later is needed and not on the path" >&2
    exit 2
}

PYTHON="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}/bin/python"
if ! serves "$PYTHON" "$@"; then
    PYTHON="$PWD/.venv/bin/python"
    if ! serves "$PYTHON" "$@"; then
        echo "installing $* into .venv: once, one to ten minutes ..." >&2
        [ -x "$PYTHON" ] || new_environment
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}" >&2 || {
            echo "error: the installation failed (see above); the next call goes on with it" >&2
            exit 2
        }
    fi
fi
