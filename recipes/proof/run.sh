#!/usr/bin/env bash
# Train a small model with the joint objective, and an LM without audio on the same texts, and compare them.
#   bash recipes/proof/run.sh [folder [variant [override ...]]]
# folder: the output of recipes/debian_audio/run.sh (data/debian_audio): train, train.jsonl and heldout.jsonl.
# variant: all (default); without_text, without_adversarial and without_dropout each leave out one part of the objective.
# Takes 56 minutes on one core of an AMD EPYC. A second call continues the run; `rm -r out/proof/<variant>` starts anew.
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-data/debian_audio}
variant=${2:-all}
python=${PYTHON:-.venv/bin/python}
out=out/proof/$variant
lm=(+semantic.config.initializer_range=0.1 objective.weights.semantic=100
    # More regularization: the LM is trained on each text more than ten times.
    +semantic.config.attention_dropout=0.2 optimizers.generator.weight_decay_scale.semantic=50)
changes=()
case $variant in
    all) ;;
    without_text) lm=(semantic=null) ;;
    without_adversarial) changes=(stages.1.adversarial=false) ;;
    without_dropout) changes=(objective.quantizer_dropout=0) ;;
    *) echo "unknown variant $variant" >&2 && exit 2 ;;
esac
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=10000

[ -e "$folder/heldout_known.jsonl" ] || "$python" recipes/proof/known_voices.py "$folder"
"$python" -m moss_train fit experiment=cat_tiny run_dir="$out" data.train="$folder/train" \
    'data.weights={speech: 0.7, sound: 0.2, music: 0.1}' data.max_seconds=4.0 data.micro_batch_seconds=24 \
    "stages=[{name: reconstruction, updates: 4000, batch_seconds: 11.52, learning_rate: 3.0e-3,
        final_learning_rate: 3.0e-4, warmup_updates: 100}, {name: adversarial, updates: 60, batch_seconds: 5.76,
        adversarial: true, learning_rate: 3.0e-4, final_learning_rate: 7.5e-5, discriminator_learning_rate: 3.0e-4,
        warmup_updates: 20, discriminator_warmup_updates: 20}]" \
    objective.quantizer_dropout=0.5 objective.weights.commitment=0.25 objective.weights.relative_error=0 \
    validation.data="$folder/heldout_known.jsonl" validation.max_clips=400 validation.every_updates=1000 \
    validation.samples_every_updates=4060 checkpoint.every_updates=200 checkpoint.monitor=null \
    "${lm[@]}" "${changes[@]}" "${@:3}"

if [ "$variant" != without_text ]; then
    "$python" recipes/proof/blind_lm.py "$out" --weight-decays 0.01 0.5
fi
"$python" recipes/proof/prove.py "$out"
