"""Which kernels run: those that have agreed with their definition on this very machine.

The check launches each kernel as the model will (`trials`), with the model's own weights: what is
compiled is what will run, and a second copy of the weights would not fit. Without a model they are
random, in each form that dense matrices may have, and the largest are cut. Its outcome is kept in a
file, under a key made of the machine, the OS, MLX and the kernels' sources, so it runs once. A
kernel that raises or differs is replaced by its definition, and the reason is kept.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from mlx_gptoss._version import __version__
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.errors import KernelError
from mlx_gptoss.kernels.agreement import MOST_EXCESS, compare
from mlx_gptoss.kernels.grouped import GROUPED, SINGLE
from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes, Weights
from mlx_gptoss.kernels.launch import source_text
from mlx_gptoss.kernels.matrix import AFFINE_GROUP
from mlx_gptoss.kernels.registry import KERNELS, Kernel
from mlx_gptoss.kernels.trials import ROWS, cut_sizes, trials
from mlx_gptoss.matrix import Matrix

log = logging.getLogger("mlx_gptoss")

Choice = Literal["auto", "on", "off"]
FLOAT16_LARGEST = 65504  # experts_swiglu keeps 16-bit inputs as float16
FAILED = "it failed"
NO_METAL = "this machine has no Metal device"
# What differs is tried with other numbers: where two tokens or experts are equal but for rounding,
# a right kernel may choose the other one, in about one of 100 checks.
SEEDS = (0, 1)

Source = Callable[..., Inputs]  # of sizes and a seed: where the weights of a check come from


@dataclass(frozen=True)
class KernelSet:
    """What to call for each stem.

    Attributes:
        functions: the kernel's launch or its definition.
        fallbacks: why a stem runs its definition; the others run their kernel.
    """

    functions: Mapping[str, Callable[..., Any]]
    fallbacks: Mapping[str, str]

    @property
    def used(self) -> tuple[str, ...]:
        """Stems that run their kernel."""
        return tuple(stem for stem in self.functions if stem not in self.fallbacks)

    @property
    def groups_experts(self) -> bool:
        """Whether experts may be read in groups: where a step of one row runs kernels, too.

        Else a row would have other bits alone than in a batch; and as definitions groups gain
        nothing.
        """
        return not any(stem in self.fallbacks for stem in (*SINGLE, *GROUPED))

    def __getattr__(self, stem: str) -> Callable[..., Any]:
        try:
            return self.functions[stem]
        except KeyError:
            raise AttributeError(f"no kernel {stem!r}") from None

    @classmethod
    def of(cls, fallbacks: Mapping[str, str]) -> "KernelSet":
        """The set in which the stems of `fallbacks` run their definition."""
        functions = {
            stem: kernel.define if stem in fallbacks else kernel.launch
            for stem, kernel in KERNELS.items()
        }
        return cls(functions, dict(fallbacks))


def all_kernels() -> KernelSet:
    """Every kernel, unchecked: for the emulator, and for counting a traced graph."""
    return KernelSet.of({})


def all_definitions(reason: str) -> KernelSet:
    """No kernel at all."""
    return KernelSet.of(dict.fromkeys(KERNELS, reason))


def choose_kernels(
    choice: Choice,
    sizes: Sizes,
    *,
    dtype: mx.Dtype,
    dense: Sequence[str],
    layers: Sequence[Weights],
    expert_input_bound: float,
    record: Path | None,
) -> KernelSet:
    """The kernels for a model on this machine.

    Args:
        choice: "off" none; "auto" those that agree, with one warning for the others; "on" all, or
            an error.
        sizes: of the model, see `sizes_of`.
        dtype: of activations.
        dense: every form in which dense matrices of the model are stored, see `dense_form`.
        layers: the weights to check with, of one layer for each form; none where there is no model.
        expert_input_bound: what the experts' inputs cannot exceed, given the norm before them.
        record: file of earlier outcomes; None checks every time.

    Raises:
        KernelError: "on", and a kernel cannot be used.
    """
    if choice == "off":
        return all_definitions('kernels="off"')
    if not mx.metal.is_available():
        if choice == "on":
            raise KernelError(f'kernels="on": {NO_METAL}; use "auto" or "off"')
        return all_definitions(NO_METAL)
    fallbacks = checked(sizes, dtype=dtype, dense=dense, layers=layers, record=record)
    fallbacks |= unread(dense)
    if dtype != mx.float32 and expert_input_bound >= FLOAT16_LARGEST:
        reason = f"its inputs may reach {expert_input_bound:.0f}, which is beyond float16"
        fallbacks = {**fallbacks, "experts_swiglu": reason, "experts_swiglu_grouped": reason}
    chosen = KernelSet.of(fallbacks)
    if chosen.fallbacks:
        text = "; ".join(f"{stem}: {why}" for stem, why in chosen.fallbacks.items())
        if record is not None and FAILED in text:  # for want of memory, perhaps
            text += f" (delete {record} to try again)"
        if choice == "on":
            raise KernelError(f'kernels="on": {text}; use "auto" to run these without a kernel')
        log.warning("kernels that run as plain MLX here: %s", text)
    return chosen


def unread(dense: Sequence[str]) -> dict[str, str]:
    """Stems that do not read every one of these forms of dense matrices, with the reason."""
    others = sorted(set(dense) - set(get_args(Dense)))
    reason = f"it does not read {', '.join(others)}"
    return {stem: reason for stem, kernel in KERNELS.items() if kernel.dense and others}


def dense_form(matrix: Matrix) -> str:
    """How a dense matrix is stored: "plain", "q8", "q4", or in words what no kernel reads."""
    if matrix.mode is None:
        return "plain"
    if (matrix.mode, matrix.group_size) == ("affine", AFFINE_GROUP) and matrix.bits in (4, 8):
        return f"q{matrix.bits}"
    return f"{matrix.mode} weights of {matrix.bits} bits in groups of {matrix.group_size}"


def sizes_of(config: ModelConfig) -> Sizes:
    """The sizes of a model, near the end of its context."""
    return replace(
        Sizes(),
        hidden=config.hidden_size,
        inter=config.intermediate_size,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        experts=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        vocab=config.vocab_size,
        window=config.sliding_window,
        capacity=config.max_position_embeddings,
        base=max(0, config.max_position_embeddings - ROWS),
        rows=ROWS,
    )


def checked(
    sizes: Sizes,
    *,
    dtype: mx.Dtype,
    dense: Sequence[str],
    layers: Sequence[Weights],
    record: Path | None,
) -> dict[str, str]:
    """Stems that cannot be used, with reasons, from the record or from running the check.

    Args:
        sizes: as `choose_kernels` takes them, and so the rest.
        dtype: of activations.
        dense: forms.
        layers: weights; without any, the outcome of a check that had some is preferred.
        record: file of earlier outcomes.
    """
    own, random = (
        _fingerprint(sizes, dtype, dense, weights) for weights in ("of a model", "random")
    )
    known = _read(record)
    for key in (own,) if layers else (own, random):
        if key in known:
            return known[key]
    log.info("Trying %d kernels against their definitions, once on this machine.", len(KERNELS))
    sources = _sources(dtype, dense, layers)
    reasons = {}
    for stem, kernel in KERNELS.items():
        tried = sizes if layers else cut_sizes(stem, sizes)
        if why := disagreement(kernel, tried, sources=sources):
            reasons[stem] = why
    if record is not None:
        _write(record, {**known, own if layers else random: reasons})
    return reasons


def _sources(dtype: mx.Dtype, dense: Sequence[str], layers: Sequence[Weights]) -> list[Source]:
    if layers:
        return [partial(Inputs, dtype=dtype, weights=one) for one in layers]
    forms: list[Dense] = [form for form in get_args(Dense) if form in dense]
    return [partial(Inputs, dtype=dtype, dense=form) for form in forms or ["plain"]]


def disagreement(kernel: Kernel, sizes: Sizes, *, sources: Sequence[Source]) -> str:
    """Why a kernel cannot be used here; empty if it can.

    Args:
        kernel: to be tried.
        sizes: of the model, or cut.
        sources: of inputs, one for each form of dense matrices.
    """
    worst = 0.0
    for seed in SEEDS:
        try:
            worst = max(
                excess
                for source in (sources if kernel.dense else sources[:1])
                for asked in trials(kernel.stem, sizes)
                for excess in compare(kernel, kernel.case(source(asked, seed=seed)))
            )
        except Exception as error:  # whatever Metal's compiler or driver says: it costs a warning
            return f"{FAILED}: {_told(error)}"
        if worst <= MOST_EXCESS:
            return ""
    return f"it differs by {worst:.3g} times the tolerance"


def _told(error: Exception) -> str:
    """The first line of an error, and of a compiler's the first that says what is wrong."""
    first, *rest = str(error).splitlines() or [type(error).__name__]
    return " ".join([first, *[line.strip() for line in rest if "error:" in line][:1]])


def _fingerprint(sizes: Sizes, dtype: mx.Dtype, dense: Sequence[str], weights: str) -> str:
    device = mx.device_info() if mx.metal.is_available() else {}
    mlx_version = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
    parts = [platform.platform(), platform.machine(), str(device), mlx_version, __version__]
    parts += [str(sizes), str(dtype), *sorted(dense), weights]
    parts += [source_text(stem) for stem in KERNELS]
    ours = files("mlx_gptoss.kernels")
    if ours.is_dir():  # not in a frozen app, where the version stands for them
        modules = sorted(ours.iterdir(), key=lambda file: file.name)
        parts += [file.read_text("utf-8") for file in modules if file.name.endswith(".py")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(record: Path | None) -> dict[str, dict[str, str]]:
    """Earlier outcomes; none if the file is missing or damaged: the check simply runs again."""
    try:
        found = json.loads(record.read_text(encoding="utf-8")) if record else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(record: Path, outcomes: Mapping[str, Mapping[str, str]]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_suffix(".new")
        temporary.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        log.warning("%s: cannot keep the outcome of the kernel check: %s", record, error)
