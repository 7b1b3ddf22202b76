#!/usr/bin/env bash
# Everything that has to pass before a change is taken: format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
bin=.venv/bin
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tensors of the tests are small
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/python" -m pytest -q "$@"
