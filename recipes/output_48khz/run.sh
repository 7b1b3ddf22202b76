#!/usr/bin/env bash
# Train a 48 kHz decoder for the codes of a 24 kHz model, and measure what it adds.
#   bash recipes/output_48khz/run.sh [voices [out [override ...]]]
# voices: a folder with train.jsonl, heldout.jsonl and audio at 48 kHz, as made by recipes/cc0_voices/run.sh (data/cc0_voices).
# INIT names another model than recipes/cat_mini, EVERY=4 takes only every fourth training clip, MEASURE_EVERY=4 measures
# only every fourth held-out clip. A second call continues where the first one stopped.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

voices=$(realpath "${1:-data/cc0_voices}")
out=${2:-out/output_48khz}
python=${PYTHON:-.venv/bin/python}
init=${INIT:-recipes/cat_mini}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=10000

mkdir -p "$out"
if [ ! -e "$out/train/index.json" ]; then
    awk -v every="${EVERY:-1}" 'NR % every == 0' "$voices/train.jsonl" | sed "s#\"path\": \"#&$voices/#" >"$out/train.jsonl"
    "$python" -m moss_train pack input="$out/train.jsonl" out="$out/train" sampling_rate=48000
fi
"$python" -m moss_train fit experiment=finetune init="$init" run_dir="$out/run" \
    tokenizer.output_sampling_rate=48000 'trainable=[decoder]' semantic=null \
    data.train="$out/train" data.peak=0.7 data.crop_seconds=0.96 data.micro_batch_seconds=12 data.num_workers=1 \
    'discriminators=[]' objective.quantizer_dropout=0.5 objective.weights.relative_error=3 \
    'objective.losses.relative_error={floor_rms: 6.3e-3}' 'ema={decay: 0.99}' \
    'stages=[{name: decoder, updates: 1200, batch_seconds: 5.76, learning_rate: 1.0e-3, final_learning_rate: 2.0e-5, warmup_updates: 20}]' \
    validation.data="$voices/heldout.jsonl" validation.max_clips=6 validation.every_updates=400 \
    validation.samples_every_updates=1200 validation.samples_clips=2 checkpoint.every_updates=50 \
    trainer.accelerator=cpu trainer.num_threads=1 wandb=null "${@:3}"
"$python" recipes/output_48khz/measure.py "$out/run" "$voices/heldout.jsonl" --init "$init" --every "${MEASURE_EVERY:-1}"
