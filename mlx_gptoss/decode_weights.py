"""The weights of a model as arguments of its compiled decode step.

What a compiled function closes over becomes a constant of its trace, and a matrix is no array: so
its arrays go in as a dictionary, and inside the step they stand in the matrix again.
"""

from dataclasses import fields, replace
from typing import Any

import mlx.core as mx

from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model

Weights = dict[str, Any]


def arrays_of(matrix: Matrix) -> dict[str, mx.array]:
    """The arrays of a matrix by the names of its fields."""
    found = {f.name: getattr(matrix, f.name) for f in fields(matrix)}
    return {name: value for name, value in found.items() if isinstance(value, mx.array)}


def given(matrix: Matrix, arrays: dict[str, mx.array]) -> Matrix:
    """A matrix with the arrays that the compiled function was given in the place of its own."""
    return replace(matrix, **arrays)


def weights_of(model: Model) -> Weights:
    """What the step reads of a model, evaluated."""
    layers = []
    for attention, moe in model.layers:
        matrices = {"q": attention.q, "k": attention.k, "v": attention.v, "out": attention.out}
        matrices |= {"router": moe.router, "gate": moe.gate, "up": moe.up, "down": moe.down}
        layer: Weights = {name: arrays_of(matrix) for name, matrix in matrices.items()}
        layer |= {"norm": attention.norm, "sinks": attention.sinks, "moe_norm": moe.norm}
        layers.append(layer)
    rope = (model.rope.coarse, model.rope.fine)
    mx.eval(rope)
    table = model.embedding
    return {
        "embedding": arrays_of(table) if isinstance(table, Matrix) else {},
        "layers": layers,
        "norm": model.norm,
        "unembedding": arrays_of(model.unembedding),
        "rope": rope,
    }
