#!/usr/bin/env python3
"""Let PyPI's Linux wheel of torch be imported on a machine without CUDA.

The wheel's libraries are linked against some 2.5 GB of NVIDIA packages that CPU work never calls. This writes an
empty stand-in for each of them next to torch's own libraries: every symbol that torch's libraries ask for, under the
version that they ask for, as a function that returns an error.

usage: stub_cuda.py SITE_PACKAGES/torch/lib        (needs gcc, nm and readelf)
"""

import pathlib
import re
import subprocess
import sys
import tempfile

NVIDIA_LIBRARY = re.compile(r"lib(cu|nccl|nvrtc|nvshmem)[^/]*\.so\.\d+")
NVIDIA_SYMBOL = re.compile(r"(cu[A-Z]|cuda|cusparse|nccl|nvshmem|nvrtc)\w*")
# cudaErrorNoDevice: whoever counts devices finds none. Zero would mean success.
NO_DEVICE = 100


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(folder):
    folder = pathlib.Path(folder)
    # libcaffe2_nvrtc.so is only opened when CUDA code is compiled.
    own = [path for path in folder.glob("*.so*") if path.name != "libcaffe2_nvrtc.so"]
    own = [path for path in own if not NVIDIA_LIBRARY.fullmatch(path.name)]

    libraries, symbols = set(), {}
    for path in own:
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-dW", path)):
            if NVIDIA_LIBRARY.fullmatch(name):
                libraries.add(name)
        for line in output("nm", "-D", "--undefined-only", path).splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            symbols.setdefault(version.lstrip("@"), set()).add(symbol)

    for library in sorted(libraries):
        # Most libraries version their symbols with their own name.
        version = "NVSHMEM" if library.startswith("libnvshmem") else library
        names = set(symbols.get(version, ()))
        if library.startswith("libcudart"):
            # Symbols without a version may come from anywhere, and everything loads the CUDA runtime.
            names |= {name for name in symbols.get("", ()) if NVIDIA_SYMBOL.fullmatch(name)}
        with tempfile.TemporaryDirectory() as scratch:
            source, map_file = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "stub.map")
            source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(names)))
            map_file.write_text(f"{version} {{ global: *; }};\n")
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-fno-builtin", "-w", "-nostdlib", f"-Wl,-soname,{library}",
                 f"-Wl,--version-script={map_file}", "-o", folder / library, source],
                check=True,
            )
    print(f"stand-ins for {len(libraries)} CUDA libraries")


if __name__ == "__main__":
    main(sys.argv[1])
