"""Reads a GGUF file with the PyPI package gguf and compares it with the original-layout checkpoint it was made from.

usage: check.py FILE.gguf CHECKPOINT
"""

import json
import pathlib
import struct
import sys

import gguf
import numpy
from gguf import GGMLQuantizationType as Type

CODES = numpy.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], numpy.float32)


def checkpoint(folder):
    """Every tensor by name: U8 as it is, BF16 widened to float32."""
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        for name, entry in json.loads(data[8:8 + length]).items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                narrow = numpy.frombuffer(data[start:end], "<u2").astype(numpy.uint32)
                values = (narrow << 16).view(numpy.float32)
            else:
                values = numpy.frombuffer(data[start:end], numpy.uint8)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def dequantised(blocks, scales):
    """[..., B, 16] codes, low nibble first, and [..., B] scales → [..., 32 B] values: code × 2^(scale − 127)."""
    codes = numpy.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    values = numpy.ldexp(CODES[codes].astype(numpy.float64), scales[..., None].astype(int) - 127)
    return values.astype(numpy.float32).reshape(*scales.shape[:-1], -1)


def expected(tensors, config, tokens):
    """The GGUF tensors of a checkpoint: name → type and values, slowest axis first."""
    out = {
        "token_embd.weight": (Type.BF16, tensors["embedding.weight"][:tokens]),
        "output.weight": (Type.BF16, tensors["unembedding.weight"][:tokens]),
        "output_norm.weight": (Type.F32, tensors["norm.scale"]),
    }
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    for block in range(config["num_hidden_layers"]):
        def original(name):
            return tensors[f"block.{block}.{name}"]

        def put(name, kind, values):
            out[f"blk.{block}.{name}"] = (kind, values)

        put("attn_norm.weight", Type.F32, original("attn.norm.scale"))
        put("post_attention_norm.weight", Type.F32, original("mlp.norm.scale"))
        for end, kind in (("weight", Type.BF16), ("bias", Type.F32)):
            for name, rows in zip("qkv", numpy.split(original(f"attn.qkv.{end}"), [query, query + key])):
                put(f"attn_{name}.{end}", kind, rows)
            put(f"attn_output.{end}", kind, original(f"attn.out.{end}"))
            put(f"ffn_gate_inp.{end}", Type.F32, original(f"mlp.gate.{end}"))
        put("attn_sinks.weight", Type.F32, original("attn.sinks"))
        for index, name in enumerate(("gate", "up")):
            rows = [original(f"mlp.mlp1_weight.{part}")[:, index::2] for part in ("blocks", "scales")]
            put(f"ffn_{name}_exps.weight", Type.MXFP4, dequantised(*rows))
            put(f"ffn_{name}_exps.bias", Type.F32, original("mlp.mlp1_bias")[:, index::2])
        down = dequantised(original("mlp.mlp2_weight.blocks"), original("mlp.mlp2_weight.scales"))
        put("ffn_down_exps.weight", Type.MXFP4, down)
        put("ffn_down_exps.bias", Type.F32, original("mlp.mlp2_bias"))
    return out


def values(tensor):
    if tensor.tensor_type == Type.F32:
        return tensor.data
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def main(path, folder):
    reader = gguf.GGUFReader(path)
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    value = {name: field.contents() for name, field in reader.fields.items()}
    failures = []

    def check(ok, text):
        if not ok:
            failures.append(text)

    factor, context = config["rope_scaling_factor"], config["initial_context_length"]
    metadata = {
        "general.architecture": "gpt-oss",
        "general.file_type": 38,
        "general.quantization_version": 2,
        "gpt-oss.context_length": int(context * factor),
        "gpt-oss.embedding_length": config["hidden_size"],
        "gpt-oss.block_count": config["num_hidden_layers"],
        "gpt-oss.feed_forward_length": config["intermediate_size"],
        "gpt-oss.expert_feed_forward_length": config["intermediate_size"],
        "gpt-oss.attention.head_count": config["num_attention_heads"],
        "gpt-oss.attention.head_count_kv": config["num_key_value_heads"],
        "gpt-oss.attention.key_length": 64,
        "gpt-oss.attention.value_length": 64,
        "gpt-oss.attention.layer_norm_rms_epsilon": float(numpy.float32(1e-5)),
        "gpt-oss.attention.sliding_window": config["sliding_window"],
        "gpt-oss.rope.freq_base": float(numpy.float32(config["rope_theta"])),
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": float(numpy.float32(factor)),
        "gpt-oss.rope.scaling.original_context_length": context,
        "gpt-oss.rope.scaling.yarn_beta_slow": float(numpy.float32(config["rope_ntk_alpha"])),
        "gpt-oss.rope.scaling.yarn_beta_fast": float(numpy.float32(config["rope_ntk_beta"])),
        "gpt-oss.expert_count": config["num_experts"],
        "gpt-oss.expert_used_count": 4,
        "tokenizer.ggml.model": "gpt2",
    }
    for name, needed in metadata.items():
        check(value.get(name) == needed, f"{name}: found {value.get(name)}, needed {needed}")
    tokens = len(value["tokenizer.ggml.tokens"])
    check(len(value["tokenizer.ggml.token_type"]) == tokens, "as many token types as tokens")
    check(len(set(value["tokenizer.ggml.tokens"])) == tokens, "distinct tokens")

    needed = expected(checkpoint(folder), config, tokens)
    found = {tensor.name: tensor for tensor in reader.tensors}
    check(found.keys() == needed.keys(), f"tensor names: {sorted(found.keys() ^ needed.keys())}")
    for name in found.keys() & needed.keys():
        tensor, (kind, array) = found[name], needed[name]
        check(tensor.tensor_type == kind, f"{name}: type {tensor.tensor_type.name}, needed {kind.name}")
        shape = tuple(reversed([int(size) for size in tensor.shape]))
        check(shape == array.shape, f"{name}: shape {shape}, needed {array.shape}")
        # By bits, so that −0 and NaN count too; but MXFP4's NaN-free values by value, as the package has no −0.
        a, b = values(tensor).reshape(array.shape), numpy.ascontiguousarray(array)
        same = a == b if kind == Type.MXFP4 else a.view(numpy.uint32) == b.view(numpy.uint32)
        check(same.all(), f"{name}: {numpy.count_nonzero(~same)} of {same.size} values differ")

    for text in failures:
        print(f"  FAIL  {text}")
    print(f"{path}: {len(found)} tensors, {tokens} tokens, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
