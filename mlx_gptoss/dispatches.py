"""How many kernels one step launches on Metal, counted in its graph without running it.

Whether a primitive launches no kernel, one, or two is read off mlx/backend/metal and
mlx/backend/gpu of MLX 0.32: views launch none, a concatenation one for each part, the rest one.
MLX's CPU takes fused primitives apart, so a graph made there counts more than Metal's.
"""

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gptoss.config import FULL
from mlx_gptoss.decode import Decoder
from mlx_gptoss.decode_state import ROWS
from mlx_gptoss.kernels.projections import CONTROL
from mlx_gptoss.kernels.sampling import SAMPLING

VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten
    NumberOfElements Reshape Slice Split Squeeze StopGradient Transpose Unflatten View""".split()
)

Node = tuple[str, list[Any], list[Any]]  # primitive, what it reads, what it makes


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one step launches.

    Attributes:
        kernels: kernels launched.
        depth: of them, the longest chain in which each needs the one before.
        inputs: arrays that enter the graph.
    """

    kernels: int
    depth: int
    inputs: int


def launches(primitive: str, *, parts: int) -> int:
    """Kernels of one primitive that reads so many arrays."""
    if primitive == "Concatenate":
        return parts
    return 0 if primitive in VIEWS else 1


def count_traced(call: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array]) -> Counted:
    """Trace a function of arrays and count its graph; nothing is evaluated."""
    found: list[dict[str, Any]] = []
    mx.export_function(found.append, call, *arrays)
    primitives = [p for p in found if p["type"] == "primitive"]
    return _count(
        [(p["name"], [i[0] for i in p["inputs"]], [o[0] for o in p["outputs"]]) for p in primitives]
    )


def count_lazy(*outputs: mx.array, names: Mapping[str, str] | None = None) -> Counted:
    """Count the graph behind arrays that are not evaluated yet.

    Args:
        outputs: of one step.
        names: primitives that stand for others, and the others' names.
    """
    handle, path = tempfile.mkstemp(suffix=".dot")
    os.close(handle)
    try:
        mx.export_to_dot(path, *outputs)
        text = Path(path).read_text()
    finally:
        os.remove(path)
    nodes: list[Node] = []
    for line in text.splitlines():  # a shared primitive has one id: the order tells them apart
        if label := re.match(r'\{ \d+ \[label ="([^"]+)"', line):
            name = label[1].split()[0]
            nodes.append(((names or {}).get(name, name), [], []))
        elif source := re.match(r'"([^"]+)" -> \d+', line):
            nodes[-1][1].append(source[1])
        elif result := re.match(r'\d+ -> "([^"]+)"', line):
            nodes[-1][2].append(result[1])
    return _count(nodes)


def step_arguments(decoder: Decoder, *, rows: int, capacity: int) -> tuple[Any, ...]:
    """Arguments of `Decoder.step`, of the right shapes and types.

    Nothing is computed; of a table in its file, the rows are read.

    Args:
        decoder: whose step it is.
        rows: generations in step, each with a cache of its own.
        capacity: positions of the full layers' stores.
    """
    c, dtype = decoder.model.config, decoder.model.dtype

    def segment(count: int, positions: int) -> tuple[mx.array, mx.array]:
        shape = (count, c.num_key_value_heads, positions, c.head_dim)
        return mx.zeros(shape, dtype), mx.zeros(shape, dtype)

    def frozen() -> list[tuple[mx.array, mx.array]]:
        return [segment(1, capacity if k == FULL else c.sliding_window) for k in c.layer_types]

    append = [segment(rows, ROWS) for _ in c.layer_types]
    token, weights = decoder.looked_up(mx.zeros((rows,), mx.int32))
    control, sampling = mx.zeros((rows, CONTROL), mx.int32), mx.zeros((rows, SAMPLING))
    allowed = decoder.allowed(rows)
    frozens = [frozen() for _ in range(rows)]
    return frozens, append, token, control, sampling, allowed, weights


def count_step(decoder: Decoder, *, rows: int, capacity: int) -> Counted:
    """Count the compiled decode step of our kernels; see `step_arguments`."""
    flat: Any = tree_flatten(step_arguments(decoder, rows=rows, capacity=capacity))
    names = [name for name, _ in flat]

    def call(*arrays: mx.array) -> list[mx.array]:
        tree = tree_unflatten(list(zip(names, arrays, strict=True)))
        chosen, append = decoder.step(*tree, filtered=False)
        return [*chosen, *(a for pair in append for a in pair)]

    return count_traced(call, [array for _, array in flat])


def _count(nodes: Sequence[Node]) -> Counted:
    depth: dict[Any, int] = defaultdict(int)
    made = {result for *_, results in nodes for result in results}
    read = {source for _, sources, _ in nodes for source in sources}
    for name, sources, results in nodes:
        step = min(1, launches(name, parts=len(sources)))  # parts do not wait for each other
        depth |= dict.fromkeys(results, step + max((depth[s] for s in sources), default=0))
    kernels = sum(launches(name, parts=len(sources)) for name, sources, _ in nodes)
    return Counted(kernels=kernels, depth=max(depth.values(), default=0), inputs=len(read - made))
