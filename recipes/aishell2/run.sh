#!/usr/bin/env bash
# AISHELL-2, which is available on application: prepare and pack one part, `iOS/data` or a part of the test set.
#   bash recipes/aishell2/run.sh /data/AISHELL-2/iOS/data train
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
[ $# -eq 2 ] || { sed -n '2,/^set/p' "$0" | grep '^#' >&2; exit 2; }
source=$(realpath "$1") part=$2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${DATA:-data}
python=${PYTHON:-.venv/bin/python}
manifest="$folder/manifests/aishell2/$part.jsonl"
"$python" recipes/aishell2/prepare.py "$source" "$manifest"
"$python" -m moss_train pack input="$manifest" out="$folder/shards/aishell2-$part" max_invalid_fraction=0.001
