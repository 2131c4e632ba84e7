#!/usr/bin/env bash
# All checks: lint, format, tests. Arguments are passed to pytest: bash script/test.sh -k prefix
source "$(dirname "$0")/environment.sh" requirements.txt tests/requirements.txt \
    script/requirements-export.txt script/requirements-ray.txt script/requirements-serve.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses auto --dist worksteal "$@"
