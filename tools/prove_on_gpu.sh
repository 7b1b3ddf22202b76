#!/usr/bin/env bash
# All measurements that need one GPU, each step with its own time limit; the short tables are printed at the end:
# speed of training (both stages of the published model, compiled and eager, and of the smaller ones) and of inference. With
# packed audio also: the real data path, the generators of other codecs at equal minutes, a scaling law, and a model that
# every call trains further, with its evaluation.
#   bash tools/prove_on_gpu.sh OUT [TRAIN_SHARDS HELDOUT_SHARDS]
# STEPS="training inference" runs only these; LIMIT is the limit of each step in seconds, 570 by default; EXPERIMENT is
# measured for speed, cat_1b6 by default; MODEL is what is trained, "cat_small" by default, optionally with overrides.
# PYTHON is the interpreter, by default that of the checkout's .venv. To try the script on a CPU: SIZE=tiny (small) for
# peers and scaling, MINUTES (2) per peer, UPDATES (300) per size.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -eq 1 ] || [ $# -eq 3 ] || { sed -n 2,10p "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
train=${2:-} heldout=${3:-}
limit=${LIMIT:-570}
experiment=${EXPERIMENT:-cat_1b6}
python=${PYTHON:-.venv/bin/python}
workers=$(($(nproc) > 2 ? $(nproc) - 2 : 1))
model=${MODEL:-cat_small}
size=${SIZE:-small}
steps=${STEPS:-training eager profile inference ladder shards peers scaling model evaluate}
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# Runs one step with its output in $out/<name>.log; a step that fails or times out does not stop the others.
step() {
    local name=$1
    shift
    [[ " $steps " == *" $name "* ]] || return 0
    echo "== $name: $*"
    timeout --signal="${signal:-INT}" --kill-after=60 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || echo "$name ended with status $status after at most $limit s, see $out/$name.log"
}

bench=("$python" tools/bench_training.py --limit-seconds $((limit * 3 / 4)))
step training "${bench[@]}" --experiment "$experiment" --out "$out/training.json"
step eager "${bench[@]}" --experiment "$experiment" --out "$out/training_eager.json" trainer.compile=false
step profile "${bench[@]}" --experiment "$experiment" --lm without --clips 10 --updates 2 --profile "$out/profile"
step inference "$python" tools/bench_inference.py --experiment "$experiment" --dtype bfloat16 --repeats 3 --chunk-frames 1 4 \
    --stream-seconds 5 --out "$out/inference.json"
for width in 256 384 512 768; do
    step ladder "${bench[@]}" --experiment cat_ladder_$width --lm without --clips 10 --out "$out/ladder_$width.json"
    [ ! -e "$out/ladder.log" ] || mv "$out/ladder.log" "$out/ladder_$width.log"
done
if [ -n "$train" ]; then
    step shards "${bench[@]}" --experiment "$experiment" --lm without --shards "$train" --updates 40 --out "$out/shards.json" \
        data.num_workers=$workers
    step peers "$python" tools/compare_peers.py --size $size --train "$train" --heldout "$heldout" \
        --minutes "${MINUTES:-2}" --out "$out/peers.json" \
        data.num_workers=$workers
    step scaling "$python" tools/scaling.py --experiment cat_$size --train "$train" --heldout "$heldout" \
        --updates "${UPDATES:-300}" --out "$out/scaling" \
        data.num_workers=$workers
    # On SIGTERM it writes a checkpoint; status 124 means that the limit was reached and the next call continues.
    # shellcheck disable=SC2086
    signal=TERM step model "$python" -m moss_train fit experiment=$model data.train="$train" validation.data="$heldout" \
        validation.every_updates=200 checkpoint.every_updates=200 wandb=null run_dir="$out/model" data.num_workers=$workers
    step evaluate "$python" -m moss_train evaluate model="$out/model" data="$heldout" out="$out/evaluation" num_workers=$workers
fi

echo
"$python" -m moss_train doctor 2>/dev/null | head -n 12
for log in "$out"/*.log; do
    printf '\n== %s\n' "$(basename "$log" .log)"
    grep -E '^\||real time|parameters,|audio-s|mel distance =|Error|error' "$log" | awk '!seen[$0]++' | tail -n 24
done
if [ -e "$out/evaluation/table.md" ]; then
    printf '\n== the model, as evaluated\n'
    head -n 40 "$out/evaluation/table.md"
fi
