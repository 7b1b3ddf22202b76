#!/usr/bin/env bash
# LibriTTS, CC BY 4.0: download with checksums, unpack, prepare, pack.
#   bash recipes/libritts/run.sh [subset ...]     dev-clean and test-clean by default; data/ below the checkout
# Finished steps are skipped, so it can be repeated after an interruption. OPENSLR names a mirror.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/p' "$0" | grep '^#'; exit ;; esac
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
name=libritts number=60 corpus=LibriTTS
source recipes/openslr.sh
[ $# -gt 0 ] || set -- dev-clean test-clean
make_subsets "$@"
