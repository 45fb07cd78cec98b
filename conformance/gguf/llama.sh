#!/usr/bin/env bash
# Builds llama.cpp's CPU library from the PyPI source package of llama-cpp-python (a few minutes, once, under .parity/),
# loads a converted model of the full vocabulary with it, and compares encodings with tiktoken's.
#
# usage: conformance/gguf/llama.sh [TEXT...]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/.parity/llama
version=0.3.36

if [[ ! -f $work/ready ]]; then
    rm -rf "$work"
    mkdir -p "$work"
    "${PYTHON:-python3}" -m venv "$work/venv"
    pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet)
    "${pip[@]}" install cmake ninja numpy tiktoken typing-extensions diskcache jinja2
    "${pip[@]}" download --no-binary=llama-cpp-python --no-deps --dest "$work" "llama-cpp-python==$version"
    tar -xzf "$work/llama_cpp_python-$version.tar.gz" -C "$work"
    export PATH=$work/venv/bin:$PATH
    cmake -S "$work/llama_cpp_python-$version/vendor/llama.cpp" -B "$work/build" -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > "$work/log"
    ninja -C "$work/build" llama >> "$work/log"
    touch "$work/ready"
fi
(cd "$root" && cargo build --release --quiet --package fixtures --package formats)
tiktoken=$(cd "$root" && cargo metadata --format-version 1 | "$work/venv/bin/python" -c '
import json, os, sys
print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "tiktoken-rs"))')

model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
"$root/target/release/fixtures" checkpoint --out "$model/checkpoint" > /dev/null
"$root/target/release/modelbin" --quiet convert "$model/checkpoint" -d "$model/model.gguf" > /dev/null
if [[ $# == 0 ]]; then
    set -- "$root"/formats/src/gguf/*.rs "$root"/formats/tests/*.rs "$root"/spec/*.md
fi
O200K=$tiktoken/assets/o200k_base.tiktoken PYTHONPATH=$work/llama_cpp_python-$version \
    "$work/venv/bin/python" "$here/llama.py" "$work/build/bin" "$model/model.gguf" "$@"
