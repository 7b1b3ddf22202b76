#!/usr/bin/env bash
# Create or complete .venv at the repository root: the packages of requirements.lock, hash-checked, and moss_train itself,
# editable. Needs Python >= 3.11 with venv, and a network the first time; returns at once when everything is there.
# PYTHON=... chooses the interpreter. After an interruption the next call starts again but reuses finished downloads.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/.moss_train_setup"
home="$venv/.moss_train_root"
unfinished="$venv/.moss_train_unfinished"

# The inputs of the environment: the lock, the declared packages and the location (an environment cannot be moved).
fingerprint() {
    cat "$root/requirements.lock" "$root/pyproject.toml" - <<<"$root" | sha256sum | cut -d ' ' -f 1
}

is_complete() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && "$python" -c '' 2>/dev/null
}

fail() {
    printf 'tools/setup.sh: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    candidate="${PYTHON:-python3}"
    fail "Python 3.11 or newer is needed; $candidate is $("$candidate" --version 2>/dev/null || echo missing)." \
        "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3.11"
}

# An environment is recreated if an installation in it was interrupted (packages may be incomplete), if it was moved or
# copied here (its scripts contain absolute paths), or if its Python is gone.
is_usable() {
    [ ! -e "$unfinished" ] && "$python" -m pip --version >/dev/null 2>&1 &&
        [ "$(cat "$home" 2>/dev/null || echo "$root")" = "$root" ]
}

make_venv() {
    local base
    base="$(find_python)"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments, its venv module is missing." \
            "Debian, Ubuntu: apt install python3-venv"
    rm -rf "$venv"
    mkdir "$venv"
    printf '%s\n' "$root" >"$home"
    "$base" -m venv "$venv"
}

# uv does not read pip's settings: take over the package index that the user configured for pip, if any.
use_index_of_pip() {
    local index="${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}"
    if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX="$index"
    fi
}

install_uv() {
    local requirement="$venv/.uv-requirement.txt"
    awk '/^[a-z]/ { keep = /^uv==/ } keep' "$root/requirements.lock" >"$requirement"
    "$python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$requirement"
}

install_packages() {
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
    touch "$unfinished"
    "$venv/bin/uv" pip install --python "$python" --require-hashes --build-constraints "$root/requirements.lock" \
        -r "$root/requirements.lock"
    rm -f "$unfinished"
    "$venv/bin/uv" pip install --python "$python" --no-deps --no-build-isolation --editable "$root"
}

if is_complete; then
    exit 0
fi
if command -v flock >/dev/null; then
    exec 9<"${BASH_SOURCE[0]}"
    flock 9 # a second setup of the same checkout waits here for the first
    if is_complete; then
        exit 0
    fi
fi
rm -f "$stamp"
echo "Setting up $venv (the first time a download of several GB)" >&2
is_usable || make_venv
use_index_of_pip
[ -x "$venv/bin/uv" ] && "$venv/bin/uv" --version >/dev/null 2>&1 || install_uv
install_packages
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Done. Next: source $venv/bin/activate, then python -m moss_train doctor, or bash recipes/quickstart/run.sh" >&2
