#!/usr/bin/env bash
# Compares our exporter with the genuine one, byte for byte; see README.md.
#
# usage: conformance/parity/run.sh [--bless]
#   --bless   record what the genuine exporter does now: fixtures/genuine-digests.json and unfit.md
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

"$here/setup.sh"
(cd "$root" && cargo build --release --package fixtures --package formats)
export TIKTOKEN_CACHE_DIR=$root/.parity/tiktoken-cache TIKTOKEN_ENCODINGS_BASE=$root/.parity/encodings
"$root/.parity/venv/bin/python" -B "$here/parity.py" "$@"
if [[ ${1-} == --bless ]]; then
    "$root/target/release/fixtures" regenerate # the manifest lists the digests
fi
