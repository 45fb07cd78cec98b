#!/usr/bin/env bash
# Converts synthetic checkpoints to GGUF and reads them with the PyPI package gguf, which is llama.cpp's own; then back
# to model.bin, which must be the exported file again.
#
# usage: conformance/gguf/run.sh
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$root/.parity/gguf-venv
gguf=0.19.0

if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('gguf') != '$gguf')" 2>/dev/null; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install "gguf==$gguf"
fi
(cd "$root" && cargo build --release --quiet --package fixtures --package formats)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
modelbin=$root/target/release/modelbin

check() {
    local name=$1
    shift
    "$root/target/release/fixtures" checkpoint --out "$work/$name" "$@" > "$work/log"
    "$modelbin" --quiet export -s "$work/$name" -d "$work/$name.bin" > "$work/log"
    "$modelbin" --quiet convert "$work/$name.bin" -d "$work/$name.gguf" > "$work/log"
    "$modelbin" --quiet convert "$work/$name.gguf" -d "$work/$name-again.bin" > "$work/log"
    cmp "$work/$name.bin" "$work/$name-again.bin"
    # model.bin's scaling of Q and K rounds some extreme values, so values are compared in a file made without it.
    "$modelbin" --quiet convert "$work/$name" -d "$work/$name.gguf" > "$work/log"
    "$venv/bin/python" "$here/check.py" "$work/$name.gguf" "$work/$name"
}

check full-vocabulary --layers 2 --experts 4 --hidden 64 --intermediate 96 --heads 3
check extreme --layers 1 --experts 33 --hidden 96 --intermediate 32 --heads 4 --kv-heads 2 --values extreme
