#!/usr/bin/env bash
# The published run on all GPUs of NODES machines. Start the same line on each of them, and again after every stop:
#   SHARDS=/shards NODES=8 RENDEZVOUS=node0:29400 bash recipes/cat_1b6/torchrun.sh name=first
# Further arguments are passed to `python -m moss_train fit`.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/settings.sh"
exec bash "$here/../torchrun/run.sh" "${settings[@]}" "$@"
