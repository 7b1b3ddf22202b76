#!/usr/bin/env bash
# AudioSet, whose audio you need to have already: prepare and pack one part from the published lists.
#   bash recipes/audioset/run.sh eval_segments.csv class_labels_indices.csv /data/audioset/eval eval
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
[ $# -eq 4 ] || { sed -n '2,/^set/p' "$0" | grep '^#' >&2; exit 2; }
segments=$(realpath "$1") labels=$(realpath "$2") audio=$(realpath "$3") part=$4
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${DATA:-data}
python=${PYTHON:-.venv/bin/python}
manifest="$folder/manifests/audioset/$part.jsonl"
"$python" recipes/audioset/prepare.py "$segments" "$labels" "$audio" "$manifest"
"$python" -m moss_train pack input="$manifest" out="$folder/shards/audioset-$part" max_invalid_fraction=0.01
