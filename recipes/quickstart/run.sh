#!/usr/bin/env bash
# From a fresh clone to a trained, exported tokenizer on real audio, on two CPU cores: pack, train through both stages
# with a kill and a resume in the middle, fine-tune the committed model on the same recordings, export, use the exports
# without moss_train, compare with cheap baselines, and write a page to listen to.
# A second call continues where the first stopped; `rm -r out/quickstart` starts anew.
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
    schedule=(stages.0.updates=40 stages.1.updates=170 stages.2.updates=30 checkpoint.every_updates=50)
    half=120
    gate=0.85
    finetune_updates=40
else
    out=out/quickstart
    schedule=()
    half=400
    gate=0.45
    finetune_updates=150
fi
mkdir -p "$out"
# Everything stays below $out, no network is used, and idle threads spin only briefly.
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
"${training[@]}" run_dir="$out/untrained" max_updates=0

say "4. Fine-tune the committed model on the same recordings"
moss_train fit experiment=finetune init=recipes/cat_mini data.train="$out/shards" run_dir="$out/finetuned" \
    semantic=null 'discriminators=[]' objective.weights.commitment=5 trainer.accelerator=cpu trainer.num_threads=1 \
    "stages=[{name: finetune, updates: $finetune_updates, batch_seconds: 5.76, learning_rate: 1.0e-3,
        final_learning_rate: 2.0e-4, warmup_updates: 10}]" \
    data.crop_seconds=0.96 data.micro_batch_seconds=5.76 data.peak=0.7 data.num_workers=1 checkpoint.every_updates=50 \
    validation.data="$here/audio/heldout.jsonl" validation.max_clips=12 wandb=null

say "5. Export"
# The licences for the model card: that of the recordings (CC0 and BSD-2, audio/NOTICE), and recipes/cat_mini's own.
export_model() { [ -e "$out/$1-export" ] || moss_train export checkpoint="$2" out="$out/$1-export" licence="$3"; }
export_model trained "$out/trained" bsd-2-clause
export_model untrained "$out/untrained" bsd-2-clause
export_model finetuned "$out/finetuned" bsd-2-clause
export_model mini recipes/cat_mini cc0-1.0

say "6. Use the exports where moss_train cannot be imported"
use_export() { "$python" $here/use_export.py "$out/$1-export" "$here/audio/heldout.jsonl" "$out/$1-audio" "$2"; }
use_export trained streaming
use_export untrained offline
use_export finetuned offline
use_export mini offline

say "7. Compare, and listen"
"$python" $here/compare.py "$out" --train "$here/audio/train.jsonl" --gate "$gate"
"$python" $here/listen_page.py "$out" "$here/audio/heldout.jsonl"
echo "This call took $((SECONDS - started)) s after set-up, without what earlier calls had done."
echo "Open $out/listen.html; spectrogram.png and report.md lie beside it"
