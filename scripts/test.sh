#!/usr/bin/env bash
# Installs the project with what its tests need into .venv-test, then runs them.
#
# usage: bash scripts/test.sh [pytest options]
#   bash scripts/test.sh -m slow        only the long checks
#   bash scripts/test.sh -k block -x    any options of pytest
#
# The environment variable PYTHON names the Python to use (default: python3). The environment is
# reused until setup.py changes.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/.venv-test
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || {
    echo "error: PYTHON=$python: expected Python 3.11 or 3.12; set PYTHON to one, e.g. python3.11" >&2
    exit 1
}

installed=$venv/installed-$(cksum <setup.py | cut -d ' ' -f 1)
if [[ ! -e $installed ]]; then
    echo "== install into .venv-test"
    "$python" -m venv "$venv"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    # first, to pin the version: the newest torch may be a download of gigabytes
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet --editable ".[test,demo,data,serve]"
    touch "$installed"
fi

export OMP_NUM_THREADS=1
"$venv/bin/python" -m pytest tests -n 2 --dist loadgroup -m "not slow" "$@"
