#!/usr/bin/env bash
# MUSDB18-HQ, whose licence you have to accept on Zenodo: prepare and pack, with the test part in chunks of 5 s.
#   bash recipes/musdb/run.sh /data/musdb18hq
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
[ $# -eq 1 ] || { sed -n '2,/^set/p' "$0" | grep '^#' >&2; exit 2; }
source=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${DATA:-data}
python=${PYTHON:-.venv/bin/python}
"$python" recipes/musdb/prepare.py "$source" "$folder/manifests/musdb"
for part in train test; do
    "$python" -m moss_train pack input="$folder/manifests/musdb/$part.jsonl" out="$folder/shards/musdb-$part"
done
