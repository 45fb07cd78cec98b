"""Compares `modelbin export` with the genuine exporter. Started by run.sh; see README.md."""

import hashlib
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import time

import numpy
import torch
from safetensors import safe_open

import genuine
import layout
import unfit

ROOT = genuine.ROOT
WORK = ROOT / ".parity/work"
HERE = pathlib.Path(__file__).resolve().parent
TABLE = HERE / "unfit.md"
DIGESTS = ROOT / "fixtures/genuine-digests.json"

# What the fixtures command takes when a flag is not given.
DEFAULTS = dict(layers=2, experts=4, hidden=64, intermediate=64, heads=2, kv_heads=1)

# Name, the model (flags of the fixtures command), shards of the original checkpoint.
SHAPES = [
    ("facts", dict(), 1),
    ("zero-blocks", dict(layers=0, hidden=32, intermediate=32), 1),
    ("one-block", dict(layers=1, experts=5, hidden=32, intermediate=64, heads=3), 3),
    ("33-experts", dict(layers=3, experts=33, hidden=32, intermediate=32, heads=4, kv_heads=2, seed=3), 5),
    ("four-blocks", dict(layers=4, hidden=32, intermediate=96, heads=8, kv_heads=8, seed=4), 1),
    ("wide", dict(layers=1, experts=7, hidden=96, intermediate=32, heads=1, window=1, seed=5), 2),
    ("extreme-3", dict(layers=1, experts=5, hidden=32, intermediate=32, kv_heads=2, values="extreme", seed=6), 3),
    ("extreme-5", dict(layers=2, hidden=64, intermediate=32, heads=5, values="extreme", seed=7), 5),
    ("factor-1.7", dict(layers=1, hidden=32, intermediate=32, rope_factor=1.7, seed=8), 1),
    ("factor-2.3", dict(layers=1, hidden=32, intermediate=32, initial_context=1001, rope_factor=2.3,
                        rope_alpha=0.5, rope_beta=48.5, rope_theta=10000.5, swiglu_limit=6.3, seed=9), 3),
    ("unscaled", dict(layers=1, hidden=32, intermediate=32, initial_context=131072, rope_factor=1,
                      rope_theta=500000, window=4096, seed=10), 1),
]

# Shapes whose digests are committed, so that `cargo test` can check them without Python. Small ones.
RECORDED = ["one-block", "extreme-3", "factor-2.3"]

failures = []


def report(ok, text):
    print(("  ok    " if ok else "  FAIL  ") + text, flush=True)
    if not ok:
        failures.append(text)


def generate(folder, flags, **more):
    command = [ROOT / "target/release/fixtures", "checkpoint", "--out", folder]
    for key, value in {**flags, **more}.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ours(source, target, *flags):
    command = [ROOT / "target/release/modelbin", "export", "-s", source, "-d", target, *flags]
    return subprocess.run(command, capture_output=True, text=True)


def difference(a, b, spec):
    """None, or the first difference of two files in words."""
    a, b = numpy.memmap(a, mode="r"), numpy.memmap(b, mode="r")
    common = min(len(a), len(b))
    unequal = numpy.flatnonzero(a[:common] != b[:common])
    if len(unequal) == 0:
        return None if len(a) == len(b) else f"lengths {len(a)} and {len(b)}"
    first = int(unequal[0])
    names = [name for name, start, end in layout.sections(spec) if start <= first < end]
    where = names[0] if names else "behind the last section"
    return f"{len(unequal)} bytes differ, the first at {first} in {where}: {a[first]:#04x} and {b[first]:#04x}"


def compare(name, source, target, wanted, spec, *flags):
    result = ours(source, target, *flags)
    if result.returncode != 0:
        return report(False, f"{name}: modelbin export ended with {result.returncode}: {result.stderr.strip()}")
    found = difference(wanted, target, spec)
    report(found is None, f"{name}: {found or f'identical, {wanted.stat().st_size} bytes'}")


def shape(name, flags, shards):
    spec = {**DEFAULTS, **flags}
    folder = WORK / name
    wanted, target = folder / "genuine.bin", folder / "ours.bin"
    generate(folder / "original", flags, shards=shards)
    started = time.monotonic()
    genuine.export(folder / "original", wanted)
    took = time.monotonic() - started

    sections = layout.sections(spec)
    end = sections[-1][2]
    report(wanted.stat().st_size == end, f"{name}: the genuine exporter wrote {wanted.stat().st_size} bytes, {end} expected ({took:.1f} s)")
    compare(f"{name}, original, {shards} shard(s)", folder / "original", target, wanted, spec)
    transformed(name, folder / "original", target, spec)

    for rope_keys, hf_shards in [("rope-scaling", 1), ("rope-parameters", 3)]:
        generate(folder / "hf", flags, layout="hf", shards=hf_shards, rope_keys=rope_keys)
        compare(f"{name}, Hugging Face, {hf_shards} shard(s), {rope_keys}", folder / "hf", target, wanted, spec)
        shutil.rmtree(folder / "hf")
    if flags.get("values") != "extreme":
        # Each ordinary block has only one exact MXFP4 form, so that quantising must find it.
        generate(folder / "hf-bf16", flags, layout="hf-bf16")
        compare(f"{name}, Hugging Face BF16, quantised", folder / "hf-bf16", target, wanted, spec, "--quantize")

    content = wanted.read_bytes()
    record = None
    if name in RECORDED:
        digests = [
            {"name": section, "start": start, "end": end, "sha256": hashlib.sha256(content[start:end]).hexdigest()}
            for section, start, end in sections if start < end
        ]
        record = {"name": name, "spec": flags, "shards": shards, "size": len(content),
                  "sha256": hashlib.sha256(content).hexdigest(), "sections": digests}
    shutil.rmtree(folder)
    return record


def transformed(name, checkpoint, target, spec):
    """Compares our stored QKV of the last block with the intermediate tensors of the genuine statements."""
    if spec["layers"] == 0 or not target.exists():
        return
    positions = {section: (start, end) for section, start, end in layout.sections(spec)}
    for part in ("weight", "bias"):
        tensor_name = f"block.{spec['layers'] - 1}.attn.qkv.{part}"
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt") as shard:
                if tensor_name in shard.keys():
                    tensor = shard.get_tensor(tensor_name)
        steps = genuine.transform_qkv(tensor, spec)
        start, end = positions[tensor_name]
        stored = torch.frombuffer(bytearray(target.read_bytes()[start:end]), dtype=torch.int16)
        bits = {step: value.contiguous().view(torch.int16).flatten() for step, value in steps.items()}
        q, k, v = stored.split([len(bits[step]) for step in ("q", "k", "v")])
        equal = {step: torch.equal(part, bits[step]) for step, part in (("q", q), ("k", k), ("v", v))}
        # Where scaling is exact, undoing it on our bytes must give the reordered rows.
        scale = torch.cat([torch.full_like(q, 2, dtype=torch.float32), torch.full_like(k, 4, dtype=torch.float32)])
        undone = torch.cat([q, k]).view(torch.bfloat16).float() * scale
        before = bits["interleaved"].view(torch.bfloat16).float()
        exact = before.abs() >= 2.0**-123
        equal["interleaved"] = torch.equal(undone[exact], before[exact])
        wrong = [step for step, same in equal.items() if not same]
        text = f"differ in {', '.join(wrong)}" if wrong else "q, k, v and their interleaving are the genuine script's"
        report(not wrong, f"{name}, {tensor_name}: {text}")


def outcome(source, target):
    """What the genuine exporter does, in words."""
    try:
        genuine.export(source, target)
    except Exception as error:  # whatever it may be: that is what is recorded
        left = target.stat().st_size if target.exists() else 0
        kind = "struct.error" if isinstance(error, struct.error) else type(error).__name__
        return f"{kind}, leaves {left:,} bytes behind" if left else kind
    return "**succeeds**"


def refusals():
    """Runs the unfit checkpoints; returns the table."""
    flags = dict(layers=1, experts=5, hidden=32, intermediate=64)
    base, odd, folder = WORK / "base", WORK / "odd", WORK / "unfit"
    generate(base, flags)
    generate(odd, {**flags, "hidden": 48})
    rows = []
    for case, rule, change in unfit.CASES:
        unfit.build(change, base, odd, folder / "checkpoint")
        genuinely = outcome(folder / "checkpoint", folder / "genuine.bin")
        out = folder / "out"
        out.mkdir()
        result = ours(folder / "checkpoint", out / "ours.bin")
        left = [path.name for path in out.iterdir()]
        lines = [line for line in result.stderr.splitlines() if rule in line]
        ok = result.returncode == 1 and lines and not left
        report(bool(ok), f"{case}: {lines[0].strip() if ok else f'exit {result.returncode}, left {left}: {result.stderr.strip()}'}")
        rows.append(f"| {case} | {genuinely} | {rule} |")
        shutil.rmtree(folder)
    return "\n".join([
        "# Unfit checkpoints", "",
        "Written by `run.sh --bless`: what the genuine exporter does with a checkpoint that has no model.bin, and the rule",
        "with which `modelbin export` refuses it before it writes anything.", "",
        "| checkpoint | genuine exporter | rule |", "|---|---|---|", *rows, "",
    ])


def settle(path, text, bless):
    """Compares a committed record with what was found now, or replaces it."""
    if bless:
        path.write_text(text)
    current = path.exists() and path.read_text() == text
    report(current, f"{path.relative_to(ROOT)} is {'current' if current else 'stale: run.sh --bless'}")


def main(arguments):
    bless = arguments == ["--bless"]
    if arguments and not bless:
        sys.exit("usage: run.sh [--bless]")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    started = time.monotonic()
    try:
        records = [record for record in (shape(*arguments) for arguments in SHAPES) if record]
        document = {"origin": "create-local-model.py of the PyPI package gpt-oss 0.0.9, run by conformance/parity/run.sh",
                    "files": records}
        settle(DIGESTS, json.dumps(document, indent=1) + "\n", bless)
        settle(TABLE, refusals(), bless)
    finally:
        shutil.rmtree(WORK)
    print(f"parity: {len(failures)} failure(s) in {time.monotonic() - started:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
