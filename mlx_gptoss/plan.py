"""Will it fit: the bytes that a model, its context and a prompt need, before anything is loaded.

gpt-oss has few shapes, so weights and K,V are counted exactly, tensor by tensor and position by
position. Only the scratch memory of a prompt's chunk is an estimate, with coefficients measured on
the CPU and checked against `mx.get_peak_memory` in the tests. On Metal no peak has been measured:
activations are half as wide there, so its coefficients are meant as an upper bound.

A plan knows no machine; `fitting.judge` holds it against a limit and says what would fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import mlx.core as mx

from mlx_gptoss.attention import QUERY_BLOCK
from mlx_gptoss.cache import GROWTH, RECENT
from mlx_gptoss.checkpoint import Quantization, converted_quantization, expected_tensors
from mlx_gptoss.config import FULL, ModelConfig
from mlx_gptoss.engine import MOST_AT_ONCE, PREFILL_CHUNK
from mlx_gptoss.errors import MachineError
from mlx_gptoss.model_info import PARTS, part_of
from mlx_gptoss.table import PLACES, EmbeddingPlace

DENSE_FORMATS = ("bf16", "q8", "q4")  # of the converter, most exact first
MOST_SAVED = 8  # places to go back to, of one conversation; the instructions and the newest
MIN_CONTEXT = 1024  # less is no conversation: the system message alone takes about 100
BF16 = 2  # bytes
F32 = 4


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Bytes alive while a chunk is computed, as multiples of the arrays of its largest block.

    MLX runs ahead of its workers, so nearly all arrays of a block are alive together.

    Attributes:
        hidden: for each (token, expert) pair and each of D columns.
        inter: the same for each of H columns.
        window: float32 score arrays of a sliding layer.
        full: the same of a full layer, for each block of `QUERY_BLOCK` queries.
        full_most: of a whole chunk, whose blocks are computed together up to here.
        append: append segments of compiled decode steps, of all layers: of the newest, of the one
            it began from, and of a batch that is joined anew.
    """

    hidden: float
    inter: float
    window: float
    full: float
    full_most: float
    append: int


# Measured with `mx.get_peak_memory` on the CPU, on models of 64 to 2880 columns, chunks of 128 to
# 512 tokens. The CPU took experts in blocks of 32 tokens then, and holds less since they are of
# `moe.CPU_ROWS`. Metal takes them all together, as the CPU did when its row was measured, and its
# fused attention holds no scores in full layers.
ON_CPU = Scratch(hidden=14.2, inter=17.4, window=3.7, full=2.2, full_most=9, append=0)
ON_METAL = Scratch(hidden=39, inter=32, window=4.5, full=0, full_most=0, append=3)


def scratch_here() -> Scratch:
    """Of the device that MLX uses on this machine."""
    return ON_METAL if mx.metal.is_available() else ON_CPU


STREAM_BYTES_PER_HIDDEN = 9  # for each token and each of D columns: the residual stream
LOGIT_ARRAYS = 5  # float32 arrays of V while a token is sampled


def dense_quantization(config: ModelConfig, dense: str) -> dict[str, Quantization]:
    """How the converter packs every module for `--dense FORMAT`: MXFP4 experts, never the router.

    Args:
        config: sizes of the model.
        dense: one of `DENSE_FORMATS`.

    Returns:
        Module path to packing, as `checkpoint.expected_tensors` takes it.

    Raises:
        MachineError: no such format.
    """
    if dense not in DENSE_FORMATS:
        expected = ", ".join(DENSE_FORMATS)
        raise MachineError(f"dense: expected one of {expected}; got {dense!r}")
    return converted_quantization(config, dense)


def weight_bytes(config: ModelConfig, packing: Mapping[str, Quantization]) -> dict[str, int]:
    """Bytes of the weights by part, exactly what the converted files hold without headers."""
    parts = dict.fromkeys(PARTS.values(), 0)
    for name, spec in expected_tensors(config, packing).items():
        parts[part_of(name)] += spec.nbytes
    return parts


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one model with one batch of contexts needs; every figure is in bytes.

    Attributes:
        config: of the model.
        packing: of its weights.
        context: tokens of each row.
        batch: rows; their prompts are read one after the other.
        chunk: prompt tokens fed at once.
        snapshots: places that each can go back to; `MOST_SAVED` in a conversation.
        embedding: where the table is, as `load_model` takes it.
        scratch: of the device.
    """

    config: ModelConfig
    packing: Mapping[str, Quantization] = field(repr=False)
    context: int
    batch: int = 1
    chunk: int = PREFILL_CHUNK
    snapshots: int = 0
    embedding: EmbeddingPlace = "memory"
    scratch: Scratch = ON_METAL

    def __post_init__(self):
        most = self.config.max_position_embeddings
        for name, value, low, high in (
            ("context", self.context, 1, most),
            ("batch", self.batch, 1, MOST_AT_ONCE),
            ("chunk", self.chunk, 1, most),
            ("snapshots", self.snapshots, 0, 2**20),
        ):
            if not low <= value <= high:
                raise MachineError(f"{name}: expected {low} to {high}, got {value}")
        if self.embedding not in PLACES:
            expected = ", ".join(PLACES)
            raise MachineError(f"embedding: expected one of {expected}; got {self.embedding!r}")

    @cached_property
    def weights(self) -> dict[str, int]:
        """By part."""
        return weight_bytes(self.config, self.packing)

    @property
    def resident_bytes(self) -> int:
        """Weights that are in memory."""
        left_out = self.weights["embedding"] if self.embedding == "file" else 0
        return sum(self.weights.values()) - left_out

    @property
    def row_bytes(self) -> int:
        """Keys and values of one position in one layer."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim * BF16

    @property
    def full_layers(self) -> int:
        """Layers whose cache grows with the context."""
        return self.config.layer_types.count(FULL)

    @property
    def snapshot_bytes(self) -> int:
        """One saved point of a conversation: the rings of the sliding layers."""
        sliding = self.config.num_hidden_layers - self.full_layers
        return self.batch * sliding * self.config.sliding_window * self.row_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """What one more position costs, once the window is full."""
        return self.batch * self.full_layers * self.row_bytes

    @property
    def kv_bytes(self) -> int:
        """Rings, and the full layers' stores with the free capacity they have at `context`."""
        positions = capacity(self.context, self.chunk) + RECENT
        return self.snapshot_bytes + positions * self.kv_bytes_per_token

    @property
    def prefill_bytes(self) -> int:
        """Scratch of a row's last chunk, and of the others' tokens.

        The chunk takes its largest block, and its store may grow.
        """
        c, tokens = self.config, min(self.chunk, self.context)
        pairs, held = tokens * c.num_experts_per_tok, self.scratch
        experts = pairs * (held.hidden * c.hidden_size + held.inter * c.intermediate_size)
        window = held.window * tokens * 2 * c.sliding_window * F32 * c.num_attention_heads
        stream = STREAM_BYTES_PER_HIDDEN * tokens * c.hidden_size
        growth = self.row_bytes * capacity(self.context, self.chunk)
        others = self.decode_bytes // self.batch * (self.batch - 1)
        return int(max(experts, window, self._full_score_bytes)) + stream + growth + others

    @property
    def _full_score_bytes(self) -> float:
        """Scores of the last chunk in a full layer, where they are held: on the CPU."""
        tokens = min(self.chunk, self.context)
        ends = range(self.context - tokens + QUERY_BLOCK, self.context + 1, QUERY_BLOCK)
        keys = min(self.scratch.full * sum(ends), self.scratch.full_most * self.context)
        return keys * min(QUERY_BLOCK, tokens) * self.config.num_attention_heads * F32

    @property
    def decode_bytes(self) -> int:
        """Scratch of a decoded token: logits, one layer's keys and values in float32, appends."""
        wide = 2 * self.row_bytes * self.context
        append = self.scratch.append * self.config.num_hidden_layers * RECENT * self.row_bytes
        return self.batch * (LOGIT_ARRAYS * F32 * self.config.vocab_size + wide + append)

    @property
    def total_bytes(self) -> int:
        """The peak: everything that stays, and the larger of the two scratches."""
        stays = self.resident_bytes + self.kv_bytes + self.snapshots * self.snapshot_bytes
        return stays + max(self.prefill_bytes, self.decode_bytes)


def capacity(positions: int, chunk: int) -> int:
    """Positions that a full layer's store has room for after a prompt, read chunk by chunk.

    Follows `cache.FullCache`: room grows by an eighth or by `GROWTH`, in whole steps of `GROWTH`.
    """
    room = 0
    for start in range(0, positions, chunk):
        needed = min(start + chunk, positions)
        if needed > room:
            target = max(needed, room + max(GROWTH, room // 8))
            room = -(-target // GROWTH) * GROWTH
    return room


def max_context(plan: MemoryPlan, limit_bytes: int) -> int:
    """The longest context, in tokens, within a limit; 0 if the weights alone exceed it."""
    low, high = 0, plan.config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if replace(plan, context=middle).total_bytes <= limit_bytes:
            low = middle
        else:
            high = middle - 1
    return low
