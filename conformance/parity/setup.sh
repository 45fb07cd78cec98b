#!/usr/bin/env bash
# Prepares .parity/ at the repository's root: a Python environment in which the genuine exporter runs, the exporter
# itself, and the vocabulary that it would otherwise download. Needs Python 3.11 or later and the package registries;
# on Linux also gcc and binutils. Quick when there is nothing to do.
#
# usage: conformance/parity/setup.sh        (PYTHON=python3.12 picks an interpreter)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/.parity
python=${PYTHON:-python3}

wanted=$("$python" -c 'import hashlib, sys
print(sys.version, sys.prefix, *(hashlib.sha256(open(path, "rb").read()).hexdigest() for path in sys.argv[1:]))' \
    "$here/setup.sh" "$here/requirements.txt" "$here/stub_cuda.py")
if [[ -f $work/ready && $(<"$work/ready") == "$wanted" ]]; then
    echo "parity: $work is ready"
    exit 0
fi

retry() {
    local attempt
    for attempt in 1 2 3; do
        "$@" && return
        echo "parity: attempt $attempt failed: $*" >&2
        sleep $((attempt * 5))
    done
    return 1
}

rm -rf "$work"
mkdir -p "$work/encodings" "$work/tiktoken-cache"

"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet)
retry "${pip[@]}" install --no-compile --requirement "$here/requirements.txt"
retry "${pip[@]}" install --no-compile --no-deps torch==2.15.0
if [[ $(uname -s) == Linux ]]; then
    "$python" "$here/stub_cuda.py" "$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib"
fi

# The wheel wants Python 3.12 and Metal; only the script is needed, so it is unpacked, not installed.
retry "${pip[@]}" download --no-deps --python-version 3.12 --only-binary=:all: --dest "$work" gpt-oss==0.0.9
"$python" -m zipfile --extract "$work"/gpt_oss-0.0.9-*.whl "$work/gpt-oss"

# tiktoken looks its file up by the SHA-1 of its address, openai-harmony by name.
manifest=$(cd "$root" && retry cargo metadata --format-version 1 | "$python" -c '
import json, sys
print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "tiktoken-rs"))')
vocabulary=$(dirname "$manifest")/assets/o200k_base.tiktoken
"$python" - "$vocabulary" <<'PYTHON'
import hashlib, sys
found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
if found != "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d":
    sys.exit(f"{sys.argv[1]} is not the upstream vocabulary: SHA-256 {found}")
PYTHON
cp "$vocabulary" "$work/encodings/o200k_base.tiktoken"
cp "$vocabulary" "$work/tiktoken-cache/fb374d419588a4632f3f557e76b4b70aebbca790"

printf '%s' "$wanted" > "$work/ready"
echo "parity: $work is ready"
