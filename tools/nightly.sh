#!/usr/bin/env bash
# Checks that take too long for every change: long tests, more kills, more random input, 2,000 updates of one run, kills by
# the clock, known vulnerabilities. FAULTS_SCALE (10) multiplies kills and examples; KILLS (20) is the number of kills by the clock.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh || exit
bin=.venv/bin
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=()

part() { # name, command...: run it and remember whether it failed
    echo "== $1" >&2
    "${@:2}" || failed+=("$1")
}

part "long tests" "$bin/python" -m pytest -q -m nightly tests

# The fault tests, several times over, with new random input where the ordinary run always uses the same.
part "fault matrix" env FAULTS_SCALE="${FAULTS_SCALE:-10}" "$bin/python" -m pytest -q --timeout 3600 \
    -n "$(env -u OMP_NUM_THREADS nproc)" tests/faults

# A training command that is killed at random times and restarted until it finishes, compared with an undisturbed run.
part "kills by the clock" "$bin/python" tests/faults/kill_by_clock.py --kills "${KILLS:-20}"

# Packages of the lock with published vulnerabilities. Strict mode fails for a package that the service does not know, or
# if the service does not answer; pip-audit's default is to leave the package out and succeed.
part "known vulnerabilities (pip-audit needs the JSON pages of the package index)" \
    "$bin/uv" tool run pip-audit --strict --requirement requirements.lock --disable-pip --require-hashes

for name in "${failed[@]}"; do
    echo "tools/nightly.sh: failed: $name" >&2
done
exit "$((${#failed[@]} > 0))"
