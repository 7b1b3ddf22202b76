#!/usr/bin/env bash
# The published run as a SLURM job on NODES machines with 8 GPUs each. The job requeues itself:
#   SHARDS=/shards NODES=8 bash recipes/cat_1b6/slurm.sh name=first
# Further arguments are passed to `python -m moss_train fit`.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/settings.sh"
exec sbatch --nodes="${NODES:-8}" "$here/../slurm/train.sbatch" "${settings[@]}" "$@"
