"""What a chip allows and what we predict: bytes that a decoded token must read, and its dispatches.

The limit is arithmetic: bytes over bandwidth. The prediction is not a measurement. Its constants
were fitted to nine decode speeds that others published for llama.cpp and Ollama on M1 to M5 (llmfit
benchmark_cache.json and pull requests 812 and 1031; llama.cpp pull request 19555; zinc README;
geerlingguy/ai-benchmarks): 79 % of nominal bandwidth, and 7.25 us for each dependent dispatch on
M1, a tenth of that less with every generation. That attention reads keys and values at 45 % of
bandwidth is assumed.

A prompt is bound by arithmetic. Chips' peaks are cores x 128 x 2 x clock, known to a tenth; of M5's
matrix units only projections are known. 55 % in matrix products is what llama.cpp reaches on M1 Max
(llmfit), M1 Pro (mlx-lm issue 858) and M2 Ultra (llama.cpp pull request 19555), and mlx-lm on M4
Max (mlx-lm pull request 406); 45 % in attention, and 35 % of matrix units, are assumed.
"""

from collections.abc import Mapping

from mlx_gptoss.checkpoint import Quantization
from mlx_gptoss.chips import Chip
from mlx_gptoss.config import FULL, ModelConfig
from mlx_gptoss.plan import weight_bytes

BF16 = 2
BANDWIDTH_SHARE = 0.79
ATTENTION_SHARE = 0.45
DISPATCH_S = 7.25e-6
FASTER_PER_GENERATION = 0.10
MATMUL_SHARE, MATMUL_SHARE_OF_MATRIX_UNITS, SCORES_SHARE = 0.55, 0.35, 0.45
PER_SLIDING_LAYER, PER_FULL_LAYER, FIXED = 6, 7, 3  # dependent dispatches of our decode step


def step_bytes(
    config: ModelConfig, packing: Mapping[str, Quantization], *, depth: int, batch: int = 1
) -> tuple[int, int]:
    """Bytes that decoding one token in each of several rows must read.

    Rows choose their experts on their own: of E experts, rows that choose K each read
    E (1 - (1 - K/E)^B) on average, if all experts are alike.

    Args:
        config: of the model.
        packing: of its weights.
        depth: tokens before the one that is decoded.
        batch: rows.

    Returns:
        Bytes of weights, and of keys and values.
    """
    parts, experts = weight_bytes(config, packing), config.num_local_experts
    row = parts.pop("embedding") // config.vocab_size
    chosen = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)
    read = round(parts.pop("experts") // experts * chosen)
    position = 2 * config.num_key_value_heads * config.head_dim * BF16
    kv = sum(
        position * (depth if kind == FULL else min(depth, config.sliding_window))
        for kind in config.layer_types
    )
    return read + batch * row + sum(parts.values()), batch * kv


def limit_tok_per_s(
    config: ModelConfig,
    packing: Mapping[str, Quantization],
    chip: Chip,
    *,
    depth: int,
    batch: int = 1,
) -> float:
    """Tokens/s of all rows together at the chip's full bandwidth and with no other cost."""
    read = sum(step_bytes(config, packing, depth=depth, batch=batch))
    return batch * chip.bandwidth_gb_per_s * 1e9 / read


def predicted_tok_per_s(
    config: ModelConfig, packing: Mapping[str, Quantization], chip: Chip, *, depth: int
) -> float:
    """Decoded tokens/s that we expect of our kernels: a prediction, see the head of this module."""
    weights, kv = step_bytes(config, packing, depth=depth)
    bandwidth = chip.bandwidth_gb_per_s * 1e9
    full = config.layer_types.count(FULL)
    sliding = len(config.layer_types) - full
    dispatches = PER_SLIDING_LAYER * sliding + PER_FULL_LAYER * full + FIXED
    one = DISPATCH_S * (1 - FASTER_PER_GENERATION * (chip.generation - 1))
    seconds = weights / (BANDWIDTH_SHARE * bandwidth) + kv / (ATTENTION_SHARE * bandwidth)
    return 1 / (seconds + dispatches * one)


def prefill_flops(config: ModelConfig, *, prompt: int) -> tuple[float, float]:
    """Floating-point operations of a whole prompt: of matrix products, and of attention's scores.

    The unembedding of the last token is left out; a query sees half of the prompt on average.
    """
    c = config
    heads = c.num_attention_heads * c.head_dim
    attention = c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim)
    experts = c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    layer = attention + experts + c.hidden_size * c.num_local_experts
    seen = sum(
        prompt / 2 if kind == FULL else min(prompt / 2, c.sliding_window) for kind in c.layer_types
    )
    return 2.0 * prompt * c.num_hidden_layers * layer, 4.0 * prompt * heads * seen


def prefill_limit_tok_per_s(config: ModelConfig, chip: Chip, *, prompt: int) -> float:
    """Prompt tokens/s at the chip's peak of arithmetic."""
    return prompt * chip.flop_per_s / sum(prefill_flops(config, prompt=prompt))


def predicted_prefill_tok_per_s(config: ModelConfig, chip: Chip, *, prompt: int) -> float:
    """Prompt tokens/s that we expect: a prediction, see the head of this module."""
    products, scores = prefill_flops(config, prompt=prompt)
    share = MATMUL_SHARE_OF_MATRIX_UNITS if chip.has_matrix_units else MATMUL_SHARE
    seconds = products / (share * chip.flop_per_s) + scores / (SCORES_SHARE * chip.alu_flop_per_s)
    return prompt / seconds
