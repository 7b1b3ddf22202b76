#!/usr/bin/env bash
# What is too long for every change: long tests, more kills, more random input, 2,000 updates of one run, kills by the
# clock, known vulnerabilities. FAULTS_SCALE (10) multiplies kills and examples; KILLS (20) is the number of kills by the clock.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh || exit
bin=.venv/bin
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=()

part() { # name, command...: run it, remember whether it failed
    echo "== $1" >&2
    "${@:2}" || failed+=("$1")
}

part "long tests" "$bin/python" -m pytest -q -m nightly tests

# The fault matrix, several times over, with fresh random input where the ordinary run repeats the same.
part "fault matrix" env FAULTS_SCALE="${FAULTS_SCALE:-10}" "$bin/python" -m pytest -q --timeout 3600 \
    -n "$(env -u OMP_NUM_THREADS nproc)" tests/faults

# A run of the command line, killed at random times and started again until it is finished, against an undisturbed one.
part "kills by the clock" "$bin/python" tests/faults/kill_by_clock.py --kills "${KILLS:-20}"

# Packages of the lock with published vulnerabilities. Strict: a package that the service does not know, or a service
# that does not answer, is a failure; pip-audit's own default is to leave it out and succeed.
part "known vulnerabilities (pip-audit needs the JSON pages of the package index)" \
    "$bin/uv" tool run pip-audit --strict --requirement requirements.lock --disable-pip --require-hashes

for name in "${failed[@]}"; do
    echo "tools/nightly.sh: failed: $name" >&2
done
exit "$((${#failed[@]} > 0))"
