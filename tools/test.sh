#!/usr/bin/env bash
# Everything that has to pass before a change is taken: format, lint, types, tests. Arguments go to pytest; TEST_WORKERS
# processes share the test files, by default one for every core, at most four.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_evaluation.sh
bin=.venv/bin
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tensors of the tests are small
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
cores="$(env -u OMP_NUM_THREADS nproc)" # nproc itself heeds the variable
"$bin/python" -m pytest -q --numprocesses "${TEST_WORKERS:-$((cores < 4 ? cores : 4))}" --dist loadfile "$@"
