"""gpt-oss in plain torch for training: a compact vocabulary, rounded weights, shared prefixes.

The equations are those of transformers' `GptOssForCausalLM`. Matrix products and SwiGLU run in
bfloat16; norms, rotation and the residual stream in float32. Expert weights go through MXFP4 with a
straight-through gradient once `quantise` is set.

One dimension of the residual stream is reserved: every embedding row holds 1 there and nothing
writes to it. The unembedding rows of the unused vocabulary hold a large negative number there, so
that their logits lie far below all others for any input, and need no training.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.demo_model.fused import SinkSoftmax, Swiglu

HIDDEN, WIDTH, LAYERS = 128, 192, 4
QUERY_HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
EXPERTS, CHOSEN, WINDOW = 8, 4, 128
MAX_POSITIONS = 1024
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4_BOUNDARIES = (FP4[1:] + FP4[:-1]) / 2


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., n/32, 32) 0..15 and exponents (..., n/32) of a float32 tensor (..., n).

    The scale of a block is the smallest power of two with which its largest value is at most 7: up
    to there rounding down to 6 loses less than the coarser grid would.
    """
    blocks = weight.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.ceil(torch.log2(largest.clamp_min(2.0**-100) / 7))
    codes = torch.bucketize((blocks.abs() * torch.exp2(-exponent)).contiguous(), FP4_BOUNDARIES)
    return codes + 8 * (blocks < 0), exponent[..., 0]


def mxfp4_rounded(weight: Tensor) -> Tensor:
    """The values that `mxfp4` stands for, in float32."""
    codes, exponent = mxfp4(weight)
    values = torch.cat([FP4, -FP4])[codes] * torch.exp2(exponent)[..., None]
    return values.reshape(weight.shape)


def rope_frequencies() -> tuple[Tensor, float]:
    """YaRN frequencies (HEAD_DIM / 2) float64 of the published config, and the concentration."""
    base, factor, positions, fast, slow = 150000.0, 32.0, 4096, 32.0, 1.0

    def turning_dim(rotations: float) -> float:
        return HEAD_DIM * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turning_dim(fast), turning_dim(slow)
    i = torch.arange(HEAD_DIM // 2, dtype=torch.float64)
    frequency = base ** (-2 * i / HEAD_DIM)
    ramp = ((i - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / factor * ramp, 0.1 * math.log(factor) + 1


@dataclass
class Batch:
    """Dialogues (B, T) behind prefixes (P, S) that several of them share."""

    prefixes: Tensor  # (P, S) int64
    prefix_lengths: Tensor  # (P,)
    tokens: Tensor  # (B, T) int64
    lengths: Tensor  # (B,)
    prefix_of: Tensor  # (B,) row of `prefixes`
    labels: Tensor  # (B, T) next token where it is learned, else -1


class Layer(nn.Module):
    """Parameters of one transformer block, in float32."""

    def __init__(self):
        super().__init__()
        q, kv, out = QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, 1 / math.sqrt(2 * LAYERS)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.ones(HIDDEN))
        self.q, self.k, self.v = normal(q, HIDDEN), normal(kv, HIDDEN), normal(kv, HIDDEN)
        self.o = normal(HIDDEN, q, scale=out)
        self.q_bias, self.k_bias, self.v_bias = zeros(q), zeros(kv), zeros(kv)
        self.o_bias, self.sinks = zeros(HIDDEN), zeros(QUERY_HEADS)
        self.router, self.router_bias = normal(EXPERTS, HIDDEN), zeros(EXPERTS)
        self.gate, self.up = normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, WIDTH, HIDDEN)
        self.down = normal(EXPERTS, HIDDEN, WIDTH, scale=out)
        self.gate_bias, self.up_bias = zeros(EXPERTS, WIDTH), zeros(EXPERTS, WIDTH)
        self.down_bias = zeros(EXPERTS, HIDDEN)


def normal(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """A parameter with standard deviation scale / sqrt(columns)."""
    return nn.Parameter(torch.randn(*shape) * scale * shape[-1] ** -0.5)


def zeros(*shape: int) -> nn.Parameter:
    """A parameter of zeros."""
    return nn.Parameter(torch.zeros(*shape))


class DemoModel(nn.Module):
    """The model on `vocabulary` trained tokens and one row for all the others."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = normal(vocabulary + 1, HIDDEN, scale=0.5 * HIDDEN**0.5)
        self.unembedding = normal(vocabulary + 1, HIDDEN, scale=0.05 * HIDDEN**0.5)
        self.norm = nn.Parameter(torch.ones(HIDDEN))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.quantise = False
        frequencies, concentration = rope_frequencies()
        angles = torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float64), frequencies)
        self.register_buffer("cos", (angles.cos() * concentration).float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * concentration).float(), persistent=False)
        free = torch.ones(HIDDEN)
        free[-1] = 0
        self.register_buffer("free", free, persistent=False)

    def reserved(self) -> Tensor:
        """(HIDDEN,) 1 at the reserved dimension, else 0."""
        return 1 - self.free

    def expert_weights(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Gate and up (E, 2 * WIDTH, HIDDEN) and down (E, HIDDEN, WIDTH), rounded, bfloat16."""
        gate_up = torch.cat([layer.gate, layer.up], 1)
        down = layer.down * self.free[:, None]
        if self.quantise:
            gate_up = gate_up + (mxfp4_rounded(gate_up.detach()) - gate_up.detach())
            down = down + (mxfp4_rounded(down.detach()) - down.detach())
        return gate_up.bfloat16(), down.bfloat16()

    def forward(self, batch: Batch, balance: list[Tensor]) -> Tensor:
        """Final hidden states (B, T, HIDDEN) bfloat16; appends the balance loss of each layer."""
        prefix_tokens = batch.prefixes.numel()
        table = (self.embedding * self.free + self.reserved()).bfloat16().float()
        x = table[torch.cat([batch.prefixes.reshape(-1), batch.tokens.reshape(-1)])]
        places = Places(batch, self.cos, self.sin)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            out = self.attention(rms_norm(x, layer.norm1), layer, places, sliding=index % 2 == 0)
            x = x + linear(out, layer.o * self.free[:, None], layer.o_bias * self.free)
            h = rms_norm(x, layer.norm2)
            x = x + experts(h, layer, self.expert_weights(layer), self.free, balance)
        h = rms_norm(x[prefix_tokens:], self.norm * self.free + self.reserved())
        return h.view(*batch.tokens.shape, HIDDEN)

    def attention(self, h: Tensor, layer: Layer, places: "Places", *, sliding: bool) -> Tensor:
        """Heads' outputs (P * S + B * T, Hq * Dh): prefixes see themselves, dialogues both."""
        q = linear(h, layer.q, layer.q_bias).view(-1, QUERY_HEADS, HEAD_DIM)
        k = linear(h, layer.k, layer.k_bias).view(-1, KV_HEADS, HEAD_DIM)
        v = linear(h, layer.v, layer.v_bias).view(-1, KV_HEADS, HEAD_DIM)
        (qp, q), (kp, k), (vp, v) = (
            places.split(z) for z in (places.rotate(q), places.rotate(k), v)
        )
        first = attend(qp, kp, vp, places.prefix_masks[sliding], layer.sinks)
        k = torch.cat([kp[places.prefix_of], k], 1)
        v = torch.cat([vp[places.prefix_of], v], 1)
        rest = attend(q, k, v, places.dialogue_masks[sliding], layer.sinks)
        return torch.cat([first.flatten(0, 1), rest.flatten(0, 1)])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., HIDDEN) -> (..., vocabulary + 1) float32."""
        return (hidden @ (self.unembedding * self.free).bfloat16().T).float()


class Places:
    """Positions of all tokens, prefixes first, and which keys each of them may see.

    Masks come in pairs: index 0 is a full layer, 1 a sliding one.
    """

    def __init__(self, batch: Batch, cos: Tensor, sin: Tensor):
        self.prefix_of = batch.prefix_of
        self.sizes = [batch.prefixes.shape, batch.tokens.shape]
        own = torch.arange(batch.prefixes.shape[1]).expand(batch.prefixes.shape)
        valid = own < batch.prefix_lengths[:, None]
        count = torch.arange(batch.tokens.shape[1])
        rest = batch.prefix_lengths[batch.prefix_of][:, None] + count
        keys = torch.cat([own[batch.prefix_of], rest], 1)
        seen = torch.cat([valid[batch.prefix_of], count < batch.lengths[:, None]], 1)
        self.prefix_masks = visible(own, own, valid)
        self.dialogue_masks = visible(rest, keys, seen)
        position = torch.cat([own.reshape(-1), rest.reshape(-1)])
        self.cos, self.sin = cos[position][:, None], sin[position][:, None]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates (N, heads, HEAD_DIM); the halves of a head are the pairs."""
        a, b = x.float().chunk(2, -1)
        turned = (a * self.cos - b * self.sin, b * self.cos + a * self.sin)
        return torch.cat(turned, -1).bfloat16()

    def split(self, x: Tensor) -> list[Tensor]:
        """(N, ...) as prefixes (P, S, ...) and dialogues (B, T, ...)."""
        parts = x.split([size.numel() for size in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]


def visible(queries: Tensor, keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Additive masks (N, queries, keys) for a full and a sliding layer."""
    distance = queries[:, :, None] - keys[:, None, :]
    full = (distance >= 0) & valid[:, None, :]
    return tuple(
        torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
        for mask in (full, full & (distance < WINDOW))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """bfloat16 product of x (N, C) with a float32 weight (R, C)."""
    return torch.addmm(bias.bfloat16(), x, weight.bfloat16().T)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm, float32 inside, bfloat16 out."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (x * scale * weight.bfloat16().float()).bfloat16()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """Attention with sinks: q (N, L, Hq, Dh), k and v (N, S, Hkv, Dh) -> (N, L, Hq * Dh)."""
    N, L = q.shape[:2]
    group = QUERY_HEADS // KV_HEADS
    q = q.view(N, L, KV_HEADS, group, HEAD_DIM).permute(0, 2, 3, 1, 4)
    q = q.reshape(N, KV_HEADS, group * L, HEAD_DIM)
    scores = (q @ k.permute(0, 2, 3, 1)).view(N, QUERY_HEADS, L, -1)
    weights = SinkSoftmax.apply(scores, mask, sinks.bfloat16().float(), HEAD_DIM**-0.5)
    out = weights.view(N, KV_HEADS, group * L, -1) @ v.transpose(1, 2)
    out = out.view(N, KV_HEADS, group, L, HEAD_DIM)
    return out.permute(0, 3, 1, 2, 4).reshape(N, L, -1)


def experts(
    x: Tensor, layer: Layer, weights: tuple[Tensor, Tensor], free: Tensor, balance: list[Tensor]
) -> Tensor:
    """Weighted sum (N, HIDDEN) float32 of the CHOSEN experts of each row of x (N, HIDDEN)."""
    scores = linear(x, layer.router, layer.router_bias).float()
    top, chosen = scores.topk(CHOSEN, -1)
    share = torch.bincount(chosen.reshape(-1), minlength=EXPERTS) / chosen.numel()
    balance.append(EXPERTS * (scores.softmax(-1).mean(0) * share).sum())
    rows, slots, capacity = placement(chosen)
    source = torch.zeros(EXPERTS * capacity, dtype=torch.long)
    source[slots] = rows
    shares = torch.zeros(EXPERTS * capacity).index_put((slots,), top.softmax(-1).reshape(-1))
    gate_up, down = weights
    gate_up_bias = torch.cat([layer.gate_bias, layer.up_bias], 1).bfloat16()
    grouped = x.index_select(0, source).view(EXPERTS, capacity, -1)
    wide = torch.baddbmm(gate_up_bias[:, None], grouped, gate_up.mT)
    hidden = Swiglu.apply(wide)
    out = torch.baddbmm((layer.down_bias * free).bfloat16()[:, None], hidden, down.mT)
    out = out.view(EXPERTS * capacity, -1).float() * shares[:, None]
    return torch.zeros(x.shape).index_add(0, source, out)


def placement(chosen: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows, their slots in (EXPERTS, capacity), and the capacity, for chosen experts (N, CHOSEN).

    The capacity is rounded up, so that matrix products have few different shapes: the library
    compiles a kernel for each new one.
    """
    flat = chosen.reshape(-1)
    counts = torch.bincount(flat, minlength=EXPERTS)
    capacity = -(-int(counts.max()) // 256) * 256
    order = flat.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    slots = torch.empty_like(flat)
    slots[order] = torch.arange(len(flat)) - starts[flat[order]] + flat[order] * capacity
    return torch.arange(len(flat)) // CHOSEN, slots, capacity
