"""Every kernel by its stem: what launches it, what it means, inputs to try it on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_gptoss.kernels import (
    attention,
    cases,
    definitions,
    experts,
    grouped,
    projections,
    prompt_cases,
    prompt_definitions,
    prompts,
    sampling,
)
from mlx_gptoss.kernels.inputs import Arguments, Inputs
from mlx_gptoss.matrix import Matrix

END = 512  # ids at either end of a vocabulary


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
        stem: name of the file `metal/<stem>.metal` and of the three functions below.
        launch: runs it, on Metal or in the emulator.
        define: the same call in plain MLX.
        case: arguments for both, out of a stream of random inputs.
        excerpt: the arguments of a definition that would take too long with all rows of a matrix.
        observe: what of its outputs is compared, given them and the arguments.
        dense: its matrices may be plain, q8 or q4.
    """

    stem: str
    launch: Callable[..., Any]
    define: Callable[..., Any]
    case: Callable[[Inputs], Arguments]
    excerpt: Callable[[Arguments], Arguments]
    observe: Callable[[list[mx.array], Arguments], list[mx.array]]
    dense: bool


def _whole(arguments: Arguments) -> Arguments:
    return arguments


def _rows(matrix: Matrix, ids: mx.array) -> Matrix:
    """Some rows of a dense matrix without bias."""
    parts = {"weight": matrix.weight, "scales": matrix.scales, "offsets": matrix.offsets}
    return replace(matrix, **{n: part[ids] for n, part in parts.items() if part is not None})


def _tokens(arguments: Arguments) -> Arguments:
    """The rows of the table that are asked for."""
    token = arguments["token"]
    found = {"token": mx.arange(token.size), "matrix": _rows(arguments["matrix"], token)}
    return arguments | found


def _ends(vocabulary: int) -> mx.array:
    """The ids of a short vocabulary, and the first and the last of a long one."""
    ids = mx.arange(vocabulary)
    return ids if vocabulary < 2 * END else mx.concatenate([ids[:END], ids[-END:]])


def _ends_of_vocabulary(arguments: Arguments) -> Arguments:
    matrix, allowed = arguments["matrix"], arguments["allowed"]
    ids = _ends(matrix.weight.shape[0])
    words = ids[::32] // 32  # of 32 ids
    return arguments | {"matrix": _rows(matrix, ids), "allowed": allowed[:, words]}


def _logits(outputs: list[mx.array], arguments: Arguments) -> list[mx.array]:
    """Logits of both ends, candidates of the first: their noise is drawn by their ids."""
    logits, best = outputs
    if (vocabulary := logits.shape[1]) < 2 * END:
        return outputs
    first = best[:, : END // 64]
    none = mx.arange(4) == 1  # the id of no candidate is the size of the vocabulary
    first = mx.where(none, mx.minimum(first, END), first)
    return [logits[:, _ends(vocabulary)], first]


def _all(outputs: list[mx.array], arguments: Arguments) -> list[mx.array]:
    return outputs


def _written_rows(outputs: list[mx.array], arguments: Arguments) -> list[mx.array]:
    """The append segment without the rows above the slot, which are undefined."""
    rows = int(arguments["control"][0, 2]) + 1
    return [outputs[0], *(segment[:, :, :rows] for segment in outputs[1:])]


def _softmax(outputs: list[mx.array], arguments: Arguments) -> list[mx.array]:
    """Each split's mean of values and log2 of its mass: the maximum it worked with is its own."""
    sums, ends = outputs
    top, total = ends[..., 0], ends[..., 1]
    return [sums / mx.maximum(total, 1e-30)[..., None], top + mx.log2(total)]


_WRAPPERS: dict[ModuleType, tuple[str, ...]] = {
    attention: (
        "attention_decode",
        "attention_reduce",
        "attention_window",
        "attention_window_prefill",
    ),
    experts: ("expert_dispatch", "experts_down", "experts_swiglu"),
    grouped: ("expert_groups", "experts_down_grouped", "experts_sum", "experts_swiglu_grouped"),
    prompts: (
        "extend_ring",
        "qkv_rope",
        "rms_norm",
        "route_prefill",
        "sum_pairs",
        "swiglu_pairs",
    ),
    projections: ("embed", "norm_qkv_rope", "out_residual", "route"),
    sampling: ("sample_filtered", "sample_token", "unembed"),
}
_DENSE = {"embed", "norm_qkv_rope", "out_residual", "route", "route_prefill", "unembed"}
_EXCERPTS = {"embed": _tokens, "unembed": _ends_of_vocabulary}
_OBSERVED = {"attention_decode": _softmax, "norm_qkv_rope": _written_rows, "unembed": _logits}


def _found(stem: str, *modules: ModuleType) -> Callable[..., Any]:
    (found,) = (getattr(module, stem) for module in modules if hasattr(module, stem))
    return found


KERNELS: Mapping[str, Kernel] = {
    stem: Kernel(
        stem=stem,
        launch=getattr(module, stem),
        define=_found(stem, definitions, prompt_definitions),
        case=_found(stem, cases, prompt_cases),
        excerpt=_EXCERPTS.get(stem, _whole),
        observe=_OBSERVED.get(stem, _all),
        dense=stem in _DENSE,
    )
    for module, stems in _WRAPPERS.items()
    for stem in stems
}
