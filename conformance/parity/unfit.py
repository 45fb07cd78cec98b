"""Checkpoints that no model.bin can be made from: what the genuine exporter does with them, and the rule with which ours
refuses them."""

import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

QKV_BIAS = "block.0.attn.qkv.bias"
SCALES = "block.0.mlp.mlp1_weight.scales"
BLOCKS = "block.0.mlp.mlp2_weight.blocks"
LARGE = ("embedding.weight", "unembedding.weight")


def cast(name, dtype):
    def change(tensors, config):
        tensors[name] = tensors[name].to(dtype)
    return change


def put(name, value):
    def change(tensors, config):
        tensors[name].view(-1)[7] = value
    return change


def remove(name):
    def change(tensors, config):
        del tensors[name]
    return change


def configure(**keys):
    def change(tensors, config):
        config.update(keys)
        for key in [key for key, value in keys.items() if value is ...]:
            del config[key]
    return change


def keep_rows(tensors, config):
    for name in LARGE:
        tensors[name] = tensors[name][:200013].contiguous()


def three_experts(tensors, config):
    config["num_experts"] = 3
    for name in [name for name in tensors if ".mlp.mlp" in name or ".mlp.gate" in name]:
        tensors[name] = tensors[name][:3].contiguous()


# (case, rule, change). A change is a function of tensors and config, or names what is done to the folder.
CASES = [
    ("F32 unembedding", "SRC-DTYPE", cast("unembedding.weight", torch.float32)),
    ("F32 embedding", "SRC-DTYPE", cast("embedding.weight", torch.float32)),
    ("FP8 embedding", "SRC-DTYPE", cast("embedding.weight", torch.float8_e4m3fn)),
    ("F32 QKV bias", "SRC-DTYPE", cast(QKV_BIAS, torch.float32)),
    ("F32 MLP bias", "SRC-DTYPE", cast("block.0.mlp.mlp2_bias", torch.float32)),
    ("F16 router", "SRC-DTYPE", cast("block.0.mlp.gate.weight", torch.float16)),
    ("F32 norm", "SRC-DTYPE", cast("norm.scale", torch.float32)),
    ("BF16 scales", "SRC-DTYPE", cast(SCALES, torch.bfloat16)),
    ("F32 blocks", "SRC-DTYPE", cast(BLOCKS, torch.float32)),
    ("hidden_size above the tensors'", "SRC-SHAPE", configure(hidden_size=64)),
    ("intermediate_size above the tensors'", "SRC-SHAPE", configure(intermediate_size=128)),
    ("num_experts below the tensors'", "SRC-SHAPE", configure(num_experts=4)),
    ("num_experts above the tensors'", "SRC-SHAPE", configure(num_experts=6)),
    ("num_hidden_layers below the tensors'", "SRC-CONFIG", configure(num_hidden_layers=0)),
    ("num_attention_heads below the tensors'", "SRC-SHAPE", configure(num_attention_heads=1)),
    ("num_attention_heads not a multiple of the KV heads", "SRC-CONFIG", configure(num_attention_heads=1, num_key_value_heads=2)),
    ("hidden size not a multiple of 32", "SRC-MULTIPLE-32", "hidden 48"),
    ("200013 embedding rows", "SRC-ROWS", keep_rows),
    ("three experts", "SRC-EXPERTS", three_experts),
    ("experts_per_token 2", "SRC-ACTIVE-EXPERTS", configure(experts_per_token=2)),
    ("head_dim 32", "SRC-CONFIG", configure(head_dim=32)),
    ("one scale of 241", "SRC-SCALE", put(SCALES, 241)),
    ("one scale of 255", "SRC-SCALE", put(SCALES, 255)),
    ("a NaN in QKV", "SRC-NAN", put(QKV_BIAS, float("nan"))),
    ("a tensor twice", "SRC-DUPLICATE", "duplicate"),
    ("a missing tensor", "SRC-MISSING", remove("block.0.attn.sinks")),
    ("a shard cut short", "SRC-CONTAINER", "cut"),
    ("a missing key", "SRC-CONFIG", configure(sliding_window=...)),
    ("sliding_window null", "SRC-CONFIG", configure(sliding_window=None)),
    ("sliding_window -1", "SRC-CONFIG", configure(sliding_window=-1)),
    ("rope_theta 1", "SRC-CONFIG", configure(rope_theta=1)),
    ("rope_scaling_factor 0", "SRC-CONFIG", configure(rope_scaling_factor=0)),
    ("rope_ntk_alpha equal to rope_ntk_beta", "SRC-CONFIG", configure(rope_ntk_alpha=32.0)),
    ("rope_ntk_alpha above rope_ntk_beta", "SRC-CONFIG", configure(rope_ntk_alpha=64.0)),
]


def build(change, base, odd, folder):
    """Makes the unfit checkpoint in `folder` from the fit one in `base` (`odd`: the one of hidden size 48)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if change == "hidden 48":
        for path in odd.iterdir():
            os.link(path, folder / path.name)
        return
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    if callable(change):
        change(tensors, config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensors.pop(name) for name in LARGE}, folder / "model--00001-of-00002.safetensors")
    save_file(tensors, folder / "model--00002-of-00002.safetensors")
    if change == "duplicate":
        save_file({QKV_BIAS: tensors[QKV_BIAS] + 1}, folder / "model--00003-of-00002.safetensors")
    if change == "cut":
        path = folder / "model--00002-of-00002.safetensors"
        os.truncate(path, path.stat().st_size - 100)
