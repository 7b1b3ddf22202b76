#!/usr/bin/env bash
# Hours of speech with text, music and sounds in many languages, from Debian packages: download, unpack, prepare, pack.
#   bash recipes/debian_audio/run.sh [folder, data/debian_audio by default]
# Needs apt-get and dpkg-deb (any Debian or Ubuntu, no root) and a checkout with an environment (tools/setup.sh).
# Packages missing from this release are named and skipped; PACKAGES="..." chooses others.
# Nearly all of it is under GPL or CC-BY-SA (see usr/share/doc in the unpacked folder): keep it on your machine.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-data/debian_audio}
python=${PYTHON:-.venv/bin/python}
packages=${PACKAGES:-"
    fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl tuxpaint-stamps-default klettres-data ktuberling-data
    pocketsphinx-testdata hedgewars-data sonic-pi-samples ufoai-sound oxygen-sounds sound-theme-freedesktop
    frozen-bubble-data starfighter-data singularity-music hyperrogue-music colobot-common-sounds
    extremetuxracer-data wesnoth-1.16-music wesnoth-1.18-music"}

mkdir -p "$folder/debs" "$folder/unpacked"
for package in $packages; do
    if ls "$folder/debs/${package}_"*.deb >/dev/null 2>&1; then
        continue
    fi
    (cd "$folder/debs" && apt-get download "$package" 2>/dev/null) || echo "not in this release: $package"
done
for deb in "$folder"/debs/*.deb; do
    mark="$folder/unpacked/.$(basename "$deb").done"
    [ -e "$mark" ] || { dpkg-deb -x "$deb" "$folder/unpacked" && touch "$mark"; }
done

for archive in "$folder"/unpacked/usr/share/games/ufoai/base/*.pk3; do # zip files
    [ ! -e "$archive" ] || { "$python" -m zipfile -e "$archive" "$folder/unpacked/usr/share/games/ufoai/base" && rm "$archive"; }
done

"$python" recipes/debian_audio/prepare.py "$folder/unpacked" "$folder"
for part in train heldout; do
    [ -e "$folder/$part/index.json" ] || "$python" -m moss_train pack input="$folder/$part.jsonl" out="$folder/$part" \
        max_invalid_fraction=0.01
done
