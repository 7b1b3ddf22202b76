# Sourced by the recipes for corpora on openslr.org. They first set `name` (of the recipe), `number` (on openslr.org), `corpus`
# (the archive's folder) and the associative array `sha256` of the archives. Then `make_subsets subset ...` downloads with
# checksums, unpacks, prepares and packs. Finished steps are skipped.

folder=${DATA:-data}
python=${PYTHON:-.venv/bin/python}

make_subsets() {
    local subset
    mkdir -p "$folder/downloads"
    for subset in "$@"; do
        [ -n "${sha256[$subset]:-}" ] || { echo "unknown subset $subset; there are ${!sha256[*]}" >&2; exit 2; }
    done
    for subset in "$@"; do
        fetch_subset "$subset"
    done
    "$python" "recipes/$name/prepare.py" "$folder/$corpus" "$folder/manifests/$name"
    for subset in "$@"; do
        [ -e "$folder/shards/$name-$subset/index.json" ] || "$python" -m moss_train pack \
            input="$folder/manifests/$name/$subset.jsonl" out="$folder/shards/$name-$subset"
    done
}

fetch_subset() {
    local archive="$folder/downloads/$name-$1.tar.gz"
    if [ ! -e "$archive.ok" ]; then
        curl --fail --location --retry 5 --continue-at - --output "$archive" \
            "${OPENSLR:-https://www.openslr.org}/resources/$number/$1.tar.gz"
        echo "${sha256[$1]}  $archive" | sha256sum --check --status ||
            { echo "$archive is not the published archive; remove it and try again" >&2; exit 1; }
        touch "$archive.ok"
    fi
    if [ ! -e "$folder/$corpus/$1/.unpacked" ]; then
        tar -xzf "$archive" -C "$folder"
        touch "$folder/$corpus/$1/.unpacked"
    fi
}
