#!/usr/bin/env bash
# One run on the GPUs of one machine or of several, started by torchrun: bash recipes/torchrun/run.sh experiment=cat_1b6 ...
# Arguments are passed to `python -m moss_train fit`. On several machines start the same line on each, with NODES (their number)
# and RENDEZVOUS (host:port of one of them, reachable from all). The run directory has to be on a shared file system.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac

nodes="${NODES:-1}"
processes="${PROCESSES_PER_NODE:-gpu}" # gpu: one process per GPU; a number also works without GPUs
if [ "$nodes" -gt 1 ] && [ -z "${RENDEZVOUS:-}" ]; then
    echo "run.sh: NODES=$nodes needs RENDEZVOUS=<host of one of the machines>:29400" >&2
    exit 2
fi
if [ "$nodes" -gt 1 ]; then
    rendezvous=(--rdzv-backend=c10d --rdzv-id="${RUN_ID:-moss_train}" --rdzv-endpoint="$RENDEZVOUS")
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for each attempt: the machines may disagree on the attempt number
else
    rendezvous=(--standalone)
fi
# Writing a checkpoint may take minutes. torch 2.11 ignores this variable and waits for 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"
# When a process dies, its group is stopped; torchrun restarts all processes and the run resumes from its newest checkpoint.
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes" \
    --max-restarts="${MAX_RESTARTS:-3}" "${rendezvous[@]}" -m moss_train fit "$@"
