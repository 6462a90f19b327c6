"""The weights of a model by the names under which `kernels.inputs` asks for them."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss.attention import AttentionWeights
from mlx_gptoss.kernels.inputs import Weights
from mlx_gptoss.kernels.selection import dense_form
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.moe import MoeWeights
from mlx_gptoss.table import FileTable

ROWS = 640  # of a table in its file, from which a step has no more than those of its tokens

Layer = tuple[AttentionWeights, MoeWeights]


def weights_of_layer(
    layer: Layer, *, embedding: Matrix | FileTable, norm: mx.array, unembedding: Matrix
) -> Weights:
    """The weights that a kernel may read while a step is in one layer, or outside of all.

    Args:
        layer: of the model.
        embedding: of the model, like the rest.
        norm: (D,), the last one.
        unembedding: (V, D).
    """
    attention, moe = layer
    if not isinstance(embedding, Matrix):
        embedding = embedding.rows(mx.arange(min(ROWS, unembedding.weight.shape[0])))
    return Weights(
        matrices={
            "embedding": embedding,
            "q": attention.q,
            "k": attention.k,
            "v": attention.v,
            "out": attention.out,
            "router": moe.router,
            "gate": moe.gate,
            "up": moe.up,
            "down": moe.down,
            "unembedding": unembedding,
        },
        vectors={
            "attention_norm": attention.norm,
            "sinks": attention.sinks,
            "moe_norm": moe.norm,
            "norm": norm,
        },
    )


def unlike_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer of each kind: in a kind, matrices of a name are packed alike."""
    found: dict[tuple[str, ...], Layer] = {}
    for attention, moe in layers:
        matrices = (attention.q, attention.k, attention.v, attention.out, moe.router)
        found.setdefault(tuple(map(dense_form, matrices)), (attention, moe))
    return list(found.values())
