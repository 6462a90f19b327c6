"""Tensor names of the two source layouts, and the rows of each that make up a converted tensor.

The table is data, read in both directions: converted name to its part of a source tensor (writing),
and source name to all the converted tensors cut from it (verifying). A test proves over both
published models that the parts of every source tensor cover each of its rows exactly once.
"""

import math
from dataclasses import dataclass
from enum import Enum

from mlx_gptoss.checkpoint import MXFP4, expected_tensors, linear_modules
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.weight_files import TensorSpec


class Layout(Enum):
    """Where names come from: the Hugging Face repositories, or OpenAI's `original/` folders."""

    HUGGING_FACE = "Hugging Face"
    ORIGINAL = "original"


class Rows(Enum):
    """Which rows of a source tensor a converted tensor takes.

    Gate and up rows are interleaved in both layouts; q, k and v rows follow each other, but only
    `original/` keeps the three in one tensor.
    """

    ALL = "all"
    EVEN = "even"
    ODD = "odd"
    Q = "q"
    K = "k"
    V = "v"


@dataclass(frozen=True)
class Part:
    """The rows `rows` along `axis` of the source tensor `source`."""

    source: str
    axis: int
    rows: slice


GLOBAL_NAMES = (
    # converted, Hugging Face, original
    ("model.embed_tokens.weight", "model.embed_tokens.weight", "embedding.weight"),
    ("model.norm.weight", "model.norm.weight", "norm.scale"),
    ("lm_head.weight", "lm_head.weight", "unembedding.weight"),
)
LAYER_NAMES = (
    # after model.layers.N., after model.layers.N., after block.N., rows
    ("input_layernorm.weight", "input_layernorm.weight", "attn.norm.scale", Rows.ALL),
    ("self_attn.q_proj.weight", "self_attn.q_proj.weight", "attn.qkv.weight", Rows.Q),
    ("self_attn.q_proj.bias", "self_attn.q_proj.bias", "attn.qkv.bias", Rows.Q),
    ("self_attn.k_proj.weight", "self_attn.k_proj.weight", "attn.qkv.weight", Rows.K),
    ("self_attn.k_proj.bias", "self_attn.k_proj.bias", "attn.qkv.bias", Rows.K),
    ("self_attn.v_proj.weight", "self_attn.v_proj.weight", "attn.qkv.weight", Rows.V),
    ("self_attn.v_proj.bias", "self_attn.v_proj.bias", "attn.qkv.bias", Rows.V),
    ("self_attn.o_proj.weight", "self_attn.o_proj.weight", "attn.out.weight", Rows.ALL),
    ("self_attn.o_proj.bias", "self_attn.o_proj.bias", "attn.out.bias", Rows.ALL),
    ("self_attn.sinks", "self_attn.sinks", "attn.sinks", Rows.ALL),
    (
        "post_attention_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.norm.scale",
        Rows.ALL,
    ),
    ("mlp.router.weight", "mlp.router.weight", "mlp.gate.weight", Rows.ALL),
    ("mlp.router.bias", "mlp.router.bias", "mlp.gate.bias", Rows.ALL),
    (
        "mlp.experts.gate_proj.weight",
        "mlp.experts.gate_up_proj_blocks",
        "mlp.mlp1_weight.blocks",
        Rows.EVEN,
    ),
    (
        "mlp.experts.gate_proj.scales",
        "mlp.experts.gate_up_proj_scales",
        "mlp.mlp1_weight.scales",
        Rows.EVEN,
    ),
    ("mlp.experts.gate_proj.bias", "mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias", Rows.EVEN),
    (
        "mlp.experts.up_proj.weight",
        "mlp.experts.gate_up_proj_blocks",
        "mlp.mlp1_weight.blocks",
        Rows.ODD,
    ),
    (
        "mlp.experts.up_proj.scales",
        "mlp.experts.gate_up_proj_scales",
        "mlp.mlp1_weight.scales",
        Rows.ODD,
    ),
    ("mlp.experts.up_proj.bias", "mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias", Rows.ODD),
    (
        "mlp.experts.down_proj.weight",
        "mlp.experts.down_proj_blocks",
        "mlp.mlp2_weight.blocks",
        Rows.ALL,
    ),
    (
        "mlp.experts.down_proj.scales",
        "mlp.experts.down_proj_scales",
        "mlp.mlp2_weight.scales",
        Rows.ALL,
    ),
    ("mlp.experts.down_proj.bias", "mlp.experts.down_proj_bias", "mlp.mlp2_bias", Rows.ALL),
)


def parts(config: ModelConfig, layout: Layout) -> dict[str, Part]:
    """Converted tensor name to the part of the source tensor that it holds.

    Converted names are those of a checkpoint whose dense weights stay bfloat16.
    """
    column = 1 if layout is Layout.HUGGING_FACE else 2
    table = {row[0]: Part(row[column], 0, slice(None)) for row in GLOBAL_NAMES}
    prefix = "model.layers" if layout is Layout.HUGGING_FACE else "block"
    for n in range(config.num_hidden_layers):
        for row in LAYER_NAMES:
            table[f"model.layers.{n}.{row[0]}"] = Part(
                f"{prefix}.{n}.{row[column]}", *_rows(config, layout, row[3])
            )
    return table


def by_source(table: dict[str, Part]) -> dict[str, dict[str, Part]]:
    """The same table from the other side: source name to the converted tensors cut from it."""
    turned: dict[str, dict[str, Part]] = {}
    for converted, part in table.items():
        turned.setdefault(part.source, {})[converted] = part
    return turned


def source_tensors(config: ModelConfig, layout: Layout) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a source checkpoint whose experts are MXFP4.

    Shapes are those of the converted tensors: blocks are 16 bytes where those count 4-byte words,
    and along the axis that is cut the rows of all parts add up.
    """
    experts = {module: MXFP4 for module in linear_modules(config) if ".experts." in module}
    converted = expected_tensors(config, experts)
    specs: dict[str, TensorSpec] = {}
    for source, pieces in by_source(parts(config, layout)).items():
        wholes = [converted[name] for name in pieces]
        axis = next(iter(pieces.values())).axis
        shape, dtype = list(wholes[0].shape), wholes[0].dtype
        shape[axis] = sum(spec.shape[axis] for spec in wholes)
        if dtype == "U32":
            shape, dtype = [*shape[:-1], shape[-1] // 4, 16], "U8"
        specs[source] = TensorSpec(tuple(shape), dtype)
    return specs


def dense_expert_spec(blocks: TensorSpec) -> TensorSpec:
    """The bfloat16 `[E, in, out]` tensor that a fine-tune holds instead of these MXFP4 blocks."""
    experts, rows, *columns = blocks.shape
    return TensorSpec((experts, math.prod(columns) * 2, rows), "BF16")


def _rows(config: ModelConfig, layout: Layout, rows: Rows) -> tuple[int, slice]:
    if rows is Rows.EVEN:
        return 1, slice(0, None, 2)
    if rows is Rows.ODD:
        return 1, slice(1, None, 2)
    if rows is Rows.ALL or layout is Layout.HUGGING_FACE:
        return 0, slice(None)
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return 0, {Rows.Q: slice(0, q), Rows.K: slice(q, q + kv), Rows.V: slice(q + kv, None)}[rows]
