#!/usr/bin/env bash
# All checks that a change has to pass: format, lint, types, tests. Arguments are passed to pytest; TEST_WORKERS
# processes share the test files, by default one per core, at most four.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_evaluation.sh
bin=.venv/bin
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests use small tensors
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
cores="$(env -u OMP_NUM_THREADS nproc)" # without the variable, because nproc obeys it
"$bin/python" -m pytest -q --numprocesses "${TEST_WORKERS:-$((cores < 4 ? cores : 4))}" --dist loadfile "$@"
