#!/usr/bin/env bash
# Evaluates the tokenizer of the quickstart on the held-out part of recipes/debian_audio, and sets it against itself at the
# end of its first stage, on 40 clips of each domain.
#   bash recipes/evaluation_example/run.sh [manifest of held-out clips] [run folder of the quickstart] [output folder]
# Recordings that the quickstart trains on are left out of the manifest; its own held-out clips take their place, and of
# these, whose licences allow it, the report lets one hear some.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

heldout=${1:-data/debian_audio/heldout.jsonl}
run=${2:-out/quickstart/trained}
out=${3:-out/evaluation_example}
python=${PYTHON:-.venv/bin/python}
own=recipes/quickstart/audio/heldout.jsonl
heard="[speech/librivox_0930.flac,music/bass_woodsy_c.flac,sound/misc_crow.flac]"

mkdir -p "$out"
folder=$(cd "$(dirname "$heldout")" && pwd)
grep -v -E '"(id|path)": "[^"]*(sonic|pocketsphinx)' "$heldout" |
    sed -E "s#\"path\": \"([^/])#\"path\": \"$folder/\1#" >"$out/clips.jsonl"

evaluate() { # checkpoint, name, further options
    "$python" -m moss_train evaluate model="$run/checkpoints/$1" data="[$out/clips.jsonl,$own]" out="$out/$2" \
        num_quantizers="[1,2,4,8,16]" device=cpu "${@:3}"
}
evaluate update-00000700 first_stage max_clips=40 report_clips=0
evaluate update-00000800 second_stage report_clips="$heard" compare="[$out/first_stage]"
