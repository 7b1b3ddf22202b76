#!/usr/bin/env bash
# Add the optional packages of `evaluate` that are not in requirements.lock to .venv: PESQ, a recogniser, DistillMOS, packages
# of other codecs; 0.4 GB, hash-checked, each without its own dependencies, because some of these no longer build.
# Packages that cannot be installed are named and left out: `evaluate` then says so in a footnote. Repeated calls take no time.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
bash "$root/tools/setup.sh"

can_compile() {
    command -v "${CC:-cc}" >/dev/null &&
        [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}

install() {
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r "$1"
}

for lock in "$root"/tools/evaluation/*.lock; do
    name="$(basename "$lock" .lock)"
    stamp="$root/.venv/.moss_train_evaluation_$name"
    if cmp -s "$lock" "$stamp"; then
        continue
    elif [ "$name" = pesq ] && ! can_compile; then
        echo "tools/setup_evaluation.sh: no PESQ: it is compiled, and a C compiler or Python.h is missing" \
            "(Debian, Ubuntu: apt install gcc python3-dev)" >&2
    elif install "$lock"; then
        cp "$lock" "$stamp"
    else
        echo "tools/setup_evaluation.sh: left out: $(grep -oE '^[a-z0-9-]+' "$lock" | sort -u | paste -sd ' ')" >&2
    fi
done
