"""Every kernel by its stem: what launches it, what it means, inputs to try it on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    sampling,
)
from mlx_gptoss.kernels.cases import Arguments, Inputs


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
        stem: name of the file `metal/<stem>.metal` and of the three functions below.
        launch: runs it, on Metal or in the emulator.
        define: the same call in plain MLX.
        case: arguments for both, out of a stream of random inputs.
        observe: what of its outputs has a meaning, given them and the arguments.
        dense: its matrices may be plain, q8 or q4.
    """

    stem: str
    launch: Callable[..., Any]
    define: Callable[..., Any]
    case: Callable[[Inputs], Arguments]
    observe: Callable[[list[mx.array], Arguments], list[mx.array]]
    dense: bool


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
    projections: ("embed", "norm_qkv_rope", "out_residual", "route"),
    sampling: ("sample_filtered", "sample_token", "unembed"),
}
_DENSE = {"embed", "norm_qkv_rope", "out_residual", "route", "unembed"}
_OBSERVED = {"attention_decode": _softmax, "norm_qkv_rope": _written_rows}

KERNELS: Mapping[str, Kernel] = {
    stem: Kernel(
        stem=stem,
        launch=getattr(module, stem),
        define=getattr(definitions, stem),
        case=getattr(cases, stem),
        observe=_OBSERVED.get(stem, _all),
        dense=stem in _DENSE,
    )
    for module, stems in _WRAPPERS.items()
    for stem in stems
}
