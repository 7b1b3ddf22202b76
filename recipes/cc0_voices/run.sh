#!/usr/bin/env bash
# Three public-domain (CC0) voices: Kathleen (English), Kerstin (German), Nathalie (Dutch), 3.7 hours with texts.
#   bash recipes/cc0_voices/run.sh [folder, data/cc0_voices by default]
# Clones what is needed from GitHub (git, shallow and sparse), checks it, writes manifests, packs. Finished steps are
# skipped, so it can be repeated after an interruption. CC0_VOICES names an existing folder with train.jsonl,
# heldout.jsonl and the audio files in them; then nothing is cloned. CC0_MIRROR replaces GitHub with another place.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-data/cc0_voices}
python=${PYTHON:-.venv/bin/python}
mirror=${CC0_MIRROR:-https://github.com/rhasspy}
source=${CC0_VOICES:-$folder}

# The audio folder and the file pattern to check out from each repository.
declare -A audio=([kathleen]=data [kerstin]=verified [nathalie]=verified)

clone_voice() {
    local checkout="$folder/clones/dataset-voice-$1"
    [ ! -e "$checkout/.complete" ] || return 0
    if [ ! -e "$checkout/.git" ]; then
        rm -rf "$checkout.part"
        git clone --quiet --depth 1 --filter=blob:none --no-checkout "$mirror/dataset-voice-$1" "$checkout.part"
        git -C "$checkout.part" sparse-checkout set --no-cone "/${audio[$1]}/" /metadata.csv /LICENSE /README.md
        mv "$checkout.part" "$checkout"
    fi
    git -C "$checkout" checkout --quiet --force # a repeated call fetches only what is missing
    git -C "$checkout" fsck --no-dangling --no-progress >/dev/null # checks every file against its hash in git
    touch "$checkout/.complete"
}

mkdir -p "$folder"
if [ -z "${CC0_VOICES:-}" ]; then
    for voice in kathleen kerstin nathalie; do
        clone_voice "$voice"
    done
    "$python" recipes/cc0_voices/prepare.py "$folder/clones" "$folder"
fi
for part in train heldout; do
    [ -e "$source/$part.jsonl" ] || { echo "$source has no $part.jsonl" >&2; exit 2; }
    [ -e "$folder/$part/index.json" ] || "$python" -m moss_train pack input="$source/$part.jsonl" out="$folder/$part"
done
