#!/usr/bin/env bash
# LibriTTS, CC BY 4.0: download with checksums, unpack, prepare, pack.
#   bash recipes/libritts/run.sh [subset ...]     dev-clean and test-clean by default; data/ below the checkout
# Every step that is done is passed over, so it can be repeated after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

declare -A sha256=(
    [dev-clean]=da0864e1bd26debed35da8a869dd5c04dfc27682921936de7cff9c8a254dbe1a
    [dev-other]=d413eda26f3a152ac7c9cf3658ef85504dfb1b625296e5fa83727f5186cca79c
    [test-clean]=234ea5b25859102a87024a4b9b86641f5b5aaaf1197335c95090cde04fe9a4f5
    [test-other]=33a5342094f3bba7ccc2e0500b9e72d558f72eb99328ac8debe1d9080402f10d
    [train-clean-100]=c5608bf1ef74bb621935382b8399c5cdd51cd3ee47cec51f00f885a64c6c7f6b
    [train-clean-360]=ce7cff44dcac46009d18379f37ef36551123a1dc4e5c8e4eb73ae57260de4886
    [train-other-500]=e35f7e34deeb2e2bdfe4403d88c8fdd5fbf64865cae41f027a185a6965f0a5df
)
folder=${DATA:-data}
python=${PYTHON:-.venv/bin/python}
[ $# -gt 0 ] || set -- dev-clean test-clean
mkdir -p "$folder/downloads"

for subset in "$@"; do
    sum=${sha256[$subset]:-}
    [ -n "$sum" ] || { echo "unknown subset $subset; there are ${!sha256[*]}" >&2; exit 2; }
    archive="$folder/downloads/libritts-$subset.tar.gz"
    if [ ! -e "$archive.ok" ]; then
        curl --fail --location --retry 5 --continue-at - --output "$archive" \
            "https://www.openslr.org/resources/60/$subset.tar.gz"
        echo "$sum  $archive" | sha256sum --check --quiet
        touch "$archive.ok"
    fi
    [ -e "$folder/LibriTTS/$subset/.unpacked" ] || {
        tar -xzf "$archive" -C "$folder"
        touch "$folder/LibriTTS/$subset/.unpacked"
    }
done
"$python" recipes/libritts/prepare.py "$folder/LibriTTS" "$folder/manifests/libritts"
for subset in "$@"; do
    [ -e "$folder/shards/libritts-$subset/index.json" ] || "$python" -m moss_train pack \
        input="$folder/manifests/libritts/$subset.jsonl" out="$folder/shards/libritts-$subset"
done
