#!/usr/bin/env bash
# Runs every fuzz target for a few seconds, on top of its committed corpus, which stays as it is.
# The seed is fixed: a gate should fail for what a change broke; new inputs are what long runs are for.
# Usage: fuzz/smoke.sh [SECONDS for each target, 15 unless given]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-15}
found=$(mktemp -d)
trap 'rm -rf "$found"' EXIT

cargo +nightly fuzz build
for target in $(cargo +nightly fuzz list); do
    echo "== $target"
    mkdir "$found/$target"
    cargo +nightly fuzz run "$target" "$found/$target" "fuzz/corpus/$target" -- \
        -seed=1 -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -verbosity=0
done
echo "all targets ran clean"
