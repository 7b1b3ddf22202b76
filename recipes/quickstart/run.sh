#!/usr/bin/env bash
# From a fresh clone to a trained, exported tokenizer on real audio, on two CPU cores: pack, train through both stages
# with a kill and a resume in the middle, export, use the export without moss_train, compare with cheap baselines.
# A second call goes on where the first stopped; `rm -r out/quickstart` starts anew.
# QUICKSTART_UPDATES=short trains about a quarter and lowers the gate, for continuous integration.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash tools/setup.sh
python=.venv/bin/python
here=recipes/quickstart
started=$SECONDS

if [ "${QUICKSTART_UPDATES:-full}" = short ]; then
    out=out/quickstart-short
    schedule=(stages.0.updates=200 stages.1.updates=30 checkpoint.every_updates=50)
    half=120
    gate=0.85
else
    out=out/quickstart
    schedule=()
    half=400
    gate=0.60
fi
mkdir -p "$out"
# Everything stays below $out, nothing is asked of a network, and idle threads spin only shortly.
export HF_HOME="$PWD/$out/huggingface" HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=10000

say() { printf '\n== %s\n' "$*"; }
moss_train() { "$python" -m moss_train "$@"; }
training=("$python" -m moss_train fit experiment=cat_tiny data.train="$out/shards" "${schedule[@]}"
    validation.data="$here/audio/heldout.jsonl")

say "1. Pack the embedded recordings"
[ -e "$out/shards" ] || moss_train pack input="$here/audio/train.jsonl" out="$out/shards"

say "2. Train, and kill the process half-way"
metrics="$out/trained/metrics.csv"
rows() { if [ -e "$metrics" ]; then wc -l <"$metrics"; else echo 0; fi; }
if [ "$(rows)" -lt "$half" ]; then
    "${training[@]}" run_dir="$out/trained" &
    trainer=$!
    trap 'kill -9 "$trainer" 2>/dev/null || true' EXIT
    while kill -0 "$trainer" 2>/dev/null && [ "$(rows)" -le "$half" ]; do sleep 0.5; done
    kill -9 "$trainer" 2>/dev/null || { wait "$trainer"; exit 1; }
    wait "$trainer" 2>/dev/null || [ $? -eq 137 ] # 128 + SIGKILL
    trap - EXIT
    echo "killed with SIGKILL after $(($(rows) - 1)) updates; newest checkpoint: $(ls "$out/trained/checkpoints" | tail -n 1)"
fi

say "3. The same command again resumes"
"${training[@]}" run_dir="$out/trained"
"${training[@]}" run_dir="$out/untrained" stop_at_update=0

say "4. Export"
for name in trained untrained; do
    [ -e "$out/$name-export" ] || moss_train export checkpoint="$out/$name" out="$out/$name-export"
done

say "5. Use the exports where moss_train cannot be imported"
use_export() { "$python" $here/use_export.py "$out/$1-export" "$here/audio/heldout.jsonl" "$out/$1-audio" "$2"; }
use_export trained streaming
use_export untrained offline

say "6. Compare"
"$python" $here/compare.py "$out" --train "$here/audio/train.jsonl" --gate "$gate"
echo "$((SECONDS - started)) s after set-up; audio, spectrogram.png and report.md are in $out"
