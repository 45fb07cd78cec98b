"""The operations of `ace-step bench` in PyTorch: the released sizes, random weights, bf16, the same counts of runs.

    python3 engine/benches/ace_step/pytorch.py [--seconds 60] [--steps 27,60] [--compile]

Written from the shapes of the released checkpoint, as the original pipeline runs them: every run of the transformer projects the
whole context again, conditioned and unconditioned runs follow each other. --cached projects the context once, as this project does.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

C, HEADS, D, BLOCKS, FFN = 2560, 20, 128, 24, 6400
DTYPE, DEVICE = torch.bfloat16, "cuda"


def weight(*shape):
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    return (torch.rand(*shape, device=DEVICE) * 2 - 1).mul_((3 / max(inputs, 1)) ** 0.5).to(DTYPE)


class Linear:
    def __init__(self, outputs, inputs, bias=True):
        self.w = weight(outputs, inputs)
        self.b = torch.zeros(outputs, device=DEVICE, dtype=DTYPE) if bias else None

    def __call__(self, x):
        return F.linear(x, self.w, self.b)


def rms(x):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rope(x, cos, sin):
    """x [batch, heads, tokens, head_dim]: neighbours are a pair, each with an angle of its own."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def table(length):
    inverse = 1e6 ** -(torch.arange(0, D, 2, device=DEVICE).float() / D)
    angles = torch.arange(length, device=DEVICE).float()[:, None] * inverse
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


class Block:
    def __init__(self):
        self.table = weight(6, C)
        self.qkv = [Linear(C, C) for _ in range(3)]
        self.out = Linear(C, C)
        self.cross = [Linear(C, C) for _ in range(4)]
        self.inverted = Linear(2 * FFN, C)
        self.depth = weight(2 * FFN, 1, 3)
        self.depth_bias = torch.zeros(2 * FFN, device=DEVICE, dtype=DTYPE)
        self.point = Linear(C, FFN, bias=False)

    def split(self, x):
        return x.unflatten(-1, (HEADS, D)).transpose(1, 2)

    def context(self, context, tables):
        k, v = self.split(self.cross[1](context)), self.split(self.cross[2](context))
        return rope(k, *tables), v

    def __call__(self, x, modulation, tables, context, context_tables):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (self.table + modulation).chunk(6, 1)
        y = rms(x) * (1 + scale_a) + shift_a
        q, k, v = (self.split(layer(y)) for layer in self.qkv)
        q, k = F.relu(rope(q, *tables)).float(), F.relu(rope(k, *tables)).float()
        v = v.float()
        v = F.pad(v, (0, 1), value=1.0)
        scores = v.transpose(-1, -2) @ k
        out = scores @ q.transpose(-1, -2)
        out = (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).transpose(-1, -2).to(DTYPE)
        x = x + gate_a * self.out(out.transpose(1, 2).flatten(2))
        k, v = context if isinstance(context, tuple) else self.context(context, context_tables)
        q = rope(self.split(self.cross[0](x)), *tables)
        out = F.scaled_dot_product_attention(q, k, v)
        x = x + self.cross[3](out.transpose(1, 2).flatten(2))
        y = rms(x) * (1 + scale_m) + shift_m
        u = F.silu(self.inverted(y)).transpose(1, 2)
        u = F.conv1d(u, self.depth, self.depth_bias, padding=1, groups=2 * FFN).transpose(1, 2)
        value, gate = u.chunk(2, -1)
        return x + gate_m * self.point(value * F.silu(gate))


class Transformer:
    def __init__(self):
        self.blocks = [Block() for _ in range(BLOCKS)]
        self.column, self.patch = Linear(2048, 128), Linear(C, 2048)
        self.norm = torch.nn.GroupNorm(32, 2048, eps=1e-6).to(DEVICE, DTYPE)
        self.time = [Linear(C, 256), Linear(C, C), Linear(6 * C, C)]
        self.table, self.final = weight(2, C), Linear(128, C)

    def prepare(self, context):
        tables = table(context.shape[1])
        return [block.context(context, tables) for block in self.blocks]

    def __call__(self, latent, t, context, tables, context_tables):
        waves = t * torch.exp(torch.arange(128, device=DEVICE) * (-9.210340371976184 / 128))
        waves = torch.cat([waves.cos(), waves.sin()])[None].to(DTYPE)
        te = self.time[1](F.silu(self.time[0](waves)))
        modulation = self.time[2](F.silu(te)).unflatten(-1, (6, C))
        x = self.column(latent.permute(0, 3, 1, 2).flatten(2))
        x = self.patch(self.norm(x.transpose(1, 2)).transpose(1, 2))
        for index, block in enumerate(self.blocks):
            of_block = context[index] if isinstance(context, list) else context
            x = block(x, modulation, tables, of_block, context_tables)
        shift, scale = (self.table + te[:, None]).chunk(2, 1)
        x = self.final(rms(x) * (1 + scale) + shift)
        return x.unflatten(-1, (16, 8)).permute(0, 3, 2, 1)


def sample(model, frames, contexts, steps, context_tables):
    x = torch.randn(1, 8, 16, frames, device=DEVICE)
    tables = table(frames)
    first, last = int(steps * 0.25), int(steps * 0.75)
    sigmas = torch.linspace(1, 0.003, steps).mul(3) / (1 + 2 * torch.linspace(1, 0.003, steps))
    sigmas = torch.cat([sigmas, torch.zeros(1)]).tolist()
    momentum = torch.zeros_like(x)
    for i in range(steps):
        t = sigmas[i] * 1000
        v = model(x.to(DTYPE), t, contexts[0], tables, context_tables).float()
        if first <= i < last:
            u = model(x.to(DTYPE), t, contexts[1], tables, context_tables).float()
            momentum = (v - u) - 0.75 * momentum
            d = momentum * (2.5 / momentum.norm(dim=(-1, -2), keepdim=True)).clamp(max=1)
            n = F.normalize(v.double(), dim=(-1, -2))
            v = v + 14 * (d - (d.double() * n).sum((-1, -2), keepdim=True) * n).float()
        d = (sigmas[i + 1] - sigmas[i]) * v
        x = x + (d - d.mean()) * 1.0462 + d.mean()
    torch.cuda.synchronize()
    return x


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", default="27,60")
    parser.add_argument("--text-tokens", type=int, default=40)
    parser.add_argument("--lyric-tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cached", action="store_true", help="project the context once")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    frames = int(arguments.seconds * 44100 / 512 / 8)
    tokens = 1 + arguments.text_tokens + arguments.lyric_tokens
    with torch.no_grad():
        model = Transformer()
        if arguments.compile:
            Block.__call__ = torch.compile(Block.__call__)
        contexts = [torch.randn(1, tokens, C, device=DEVICE).to(DTYPE) for _ in range(2)]
        if arguments.cached:
            contexts = [model.prepare(context) for context in contexts]
        context_tables = table(tokens)
        name = "PyTorch" + " cached" * arguments.cached + " compiled" * arguments.compile
        for steps in map(int, arguments.steps.split(",")):
            seconds = []
            for run in range(arguments.runs + 1):
                start = time.perf_counter()
                sample(model, frames, contexts, steps, context_tables)
                if run:
                    seconds.append(time.perf_counter() - start)
            runs = steps + int(steps * 0.75) - int(steps * 0.25)
            median = statistics.median(seconds)
            print(f"{name}: {steps} steps  {runs} runs  {median:.2f} s  {median / steps:.4f} s a step  "
                  f"{1e3 * median / runs:.1f} ms a run", flush=True)


main()
