"""Where everything lies in a model.bin with the o200k vocabulary.

Written from the genuine exporter alone, so that it shares no mistake with the crate that it helps to test. The driver
names the first difference by it, and records digests by it."""

WEIGHTS = 1802240  # the first page boundary after the tokenizer section
TOKENS = 200014
HEAD_DIM = 64
PAGE = 16384


def sections(spec):
    """(name, start, end) of each section of the file, paddings among them, in order and without gaps."""
    h, i, e = spec["hidden"], spec["intermediate"], spec["experts"]
    heads, kv_heads = spec["heads"], spec["kv_heads"]
    qkv = (heads + 2 * kv_heads) * HEAD_DIM
    found = [("file and model header", 0, 116), ("tokenizer", 116, WEIGHTS)]

    def add(name, size, align=16):
        end = found[-1][2]
        start = -(-end // align) * align
        if start > end:
            found.append((f"padding before {name}", end, start))
        found.append((name, start, start + size))

    add("embedding.weight", TOKENS * h * 2, PAGE)
    for n in range(spec["layers"]):
        add(f"block.{n}.attn.norm.scale", h * 2)
        add(f"block.{n}.attn.qkv.weight", qkv * h * 2)
        add(f"block.{n}.attn.qkv.bias", qkv * 2, 1)
        add(f"block.{n}.attn.sinks", heads * 2)
        add(f"block.{n}.attn.out.weight", h * heads * HEAD_DIM * 2)
        add(f"block.{n}.attn.out.bias", h * 2, 1)
        add(f"block.{n}.mlp.norm.scale", h * 2)
        add(f"block.{n}.mlp.gate.weight", e * h * 2)
        add(f"block.{n}.mlp.gate.bias", e * 2, 1)
    add("norm.scale", h * 2)
    add("unembedding.weight", TOKENS * h * 2)
    for n in range(spec["layers"]):
        for expert in range(e):
            name = f"block.{n}.experts[{expert}]"
            add(f"{name}.mlp1 blocks", 2 * i * h // 2, 16 if expert else PAGE)
            add(f"{name}.mlp1 scales", 2 * i * h // 32)
            add(f"{name}.mlp1 bias", 2 * i * 2)
            add(f"{name}.mlp2 blocks", h * i // 2)
            add(f"{name}.mlp2 scales", h * i // 32)
            add(f"{name}.mlp2 bias", h * 2)
    return found
