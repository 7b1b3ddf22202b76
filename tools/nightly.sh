#!/usr/bin/env bash
# What is too long for every change: more kills, more random input, kills by the clock, known vulnerabilities.
# FAULTS_SCALE (10) multiplies kills and examples; KILLS (20) is the number of kills by the clock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
bin=.venv/bin
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0

# The fault matrix, several times over, with fresh random input where the ordinary run repeats the same.
FAULTS_SCALE="${FAULTS_SCALE:-10}" "$bin/python" -m pytest -q --timeout 3600 -n "$(env -u OMP_NUM_THREADS nproc)" tests/faults || status=1

# A run of the command line, killed at random times and started again until it is finished, against an undisturbed one.
"$bin/python" tests/faults/kill_by_clock.py --kills "${KILLS:-20}" || status=1

# Packages of the lock with published vulnerabilities; needs a network.
"$bin/uv" tool run pip-audit --requirement requirements.lock --disable-pip --require-hashes || status=1

exit "$status"
