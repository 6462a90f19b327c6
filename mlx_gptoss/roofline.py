"""What a chip allows and what we predict: bytes that a decoded token must read, and its dispatches.

The limit is arithmetic: bytes over bandwidth. The prediction is not a measurement. Its constants
were fitted to nine decode speeds that others published for llama.cpp and Ollama on M1 to M5 (llmfit
benchmark_cache.json and pull requests 812 and 1031; llama.cpp pull request 19555; zinc README;
geerlingguy/ai-benchmarks): 79 % of nominal bandwidth, and 7.25 us for each dependent dispatch on
M1, a tenth of that less with every generation. That attention reads keys and values at 45 % of
bandwidth is assumed.
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
PER_SLIDING_LAYER, PER_FULL_LAYER, FIXED = 6, 7, 3  # dependent dispatches of our decode step


def bytes_per_token(
    config: ModelConfig, packing: Mapping[str, Quantization], *, depth: int
) -> tuple[int, int]:
    """Bytes of weights, and of keys and values, that one token decoded after `depth` must read."""
    parts = weight_bytes(config, packing)
    row = parts.pop("embedding") // config.vocab_size
    experts = parts.pop("experts") * config.num_experts_per_tok // config.num_local_experts
    position = 2 * config.num_key_value_heads * config.head_dim * BF16
    kv = sum(
        position * (depth if kind == FULL else min(depth, config.sliding_window))
        for kind in config.layer_types
    )
    return experts + row + sum(parts.values()), kv


def limit_tok_per_s(
    config: ModelConfig, packing: Mapping[str, Quantization], chip: Chip, *, depth: int
) -> float:
    """Decoded tokens/s at the chip's full bandwidth and with no other cost."""
    return chip.bandwidth_gb_per_s * 1e9 / sum(bytes_per_token(config, packing, depth=depth))


def predicted_tok_per_s(
    config: ModelConfig, packing: Mapping[str, Quantization], chip: Chip, *, depth: int
) -> float:
    """Decoded tokens/s that we expect of our kernels: a prediction, see the head of this module."""
    weights, kv = bytes_per_token(config, packing, depth=depth)
    bandwidth = chip.bandwidth_gb_per_s * 1e9
    full = config.layer_types.count(FULL)
    sliding = len(config.layer_types) - full
    dispatches = PER_SLIDING_LAYER * sliding + PER_FULL_LAYER * full + FIXED
    one = DISPATCH_S * (1 - FASTER_PER_GENERATION * (chip.generation - 1))
    seconds = weights / (BANDWIDTH_SHARE * bandwidth) + kv / (ATTENTION_SHARE * bandwidth)
    return 1 / (seconds + dispatches * one)
