#!/usr/bin/env bash
# Refresh requirements.lock: the newest allowed version of every package, with hashes, for all platforms, Python >= 3.11.
# Arguments are passed to `uv pip compile`, for example `--upgrade-package torch` to upgrade one package only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -eq 0 ]; then
    set -- --upgrade
fi
.venv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --extra eval --extra cluster --extra datasets --extra tensorboard --extra onnx --extra demo --extra dev --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --output-file requirements.lock "$@"
header='# The exact versions that the tests run with, with hashes; refresh with: bash tools/lock.sh'
printf '%s\n' "$header" | cat - requirements.lock >requirements.lock.new
mv requirements.lock.new requirements.lock
