#!/usr/bin/env bash
# Evaluates the committed model on the held-out part of recipes/debian_audio, up to 40 clips of each domain, and sets it
# against a run that was trained on that data.
#   bash recipes/evaluation_example/run.sh [manifest of held-out clips] [run folder] [output folder]
# The report lets one hear clips whose licences allow it, and no reconstruction of the other model.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

heldout=${1:-data/debian_audio/heldout.jsonl}
run=${2:-out/debian_audio}
out=${3:-out/evaluation_example}
python=${PYTHON:-.venv/bin/python}
folder=usr/share/pocketsphinx/test/data/librivox/sense_and_sensibility_01_austen_64kb
heard="[$folder-0890.wav,$folder-0930.wav,usr/share/sonic-pi/samples/ambi_choir.flac,usr/share/sonic-pi/samples/elec_wood.flac]"

mkdir -p "$out"
# 40 clips of each domain, those in the report among them.
"$python" - "$heldout" "$heard" "$out/clips.jsonl" <<'END'
import sys
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest
from recipes.debian_audio.mixture import choose_by_hash, read_manifest

manifest, heard, out = Path(sys.argv[1]), sys.argv[2].strip("[]").split(","), Path(sys.argv[3])
clips = [clip | {"path": str((manifest.parent / clip["path"]).resolve())} for clip in read_manifest(manifest)]
chosen = []
for domain in ("speech", "music", "sound"):
    members = [clip for clip in clips if clip["domain"] == domain]
    first = [clip for clip in members if clip["id"] in heard]
    others = [clip for clip in members if clip["id"] not in heard]
    chosen += first + choose_by_hash(others, 40 - len(first))
write_manifest(out, chosen)
END

evaluate() { # model, name, further options
    "$python" -m moss_train evaluate model="$1" data="$out/clips.jsonl" out="$out/$2" peak=0.7 \
        num_quantizers="[1,4,8,16]" device=cpu "${@:3}"
}
evaluate "$run" debian_audio report_clips=0
evaluate recipes/cat_mini cat_mini report_clips="$heard" compare="[$out/debian_audio]"
