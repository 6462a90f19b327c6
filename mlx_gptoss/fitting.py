"""A plan held against what a machine has: does it fit, and what would make it fit.

Options are ranked by what they cost: first those that leave every answer as it is, then coarser
weights, the most exact first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from mlx_gptoss.chips import CHIPS, GIB, default_working_set_bytes
from mlx_gptoss.errors import MachineError
from mlx_gptoss.plan import (
    DENSE_FORMATS,
    MIN_CONTEXT,
    MemoryPlan,
    dense_quantization,
    max_context,
)

MIB = 2**20
IN_FILE = "--embedding file"
WAITS = "each token waits until the one before has reached the host"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A change that makes a request fit, what it costs, and the peak that then results."""

    change: str
    cost: str
    total_bytes: int


class Verdict(StrEnum):
    """What a limit says to a plan."""

    FITS = "fits"
    SHORTER = "fits with a shorter context"
    NO = "does not fit"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A plan held against a limit; `max_context` is 0 where not even the weights fit."""

    limit_bytes: int
    max_context: int
    verdict: Verdict
    options: tuple[Option, ...]


def require(needed_bytes: int, *, limit_bytes: int | None, what: str, instead: str) -> None:
    """Refuse what this machine cannot hold: on a Mac it would end in a restart.

    Args:
        needed_bytes: the planned peak.
        limit_bytes: what the GPU may use; None where it cannot be read, and nothing is refused.
        what: needs them, for the message.
        instead: what the user can do, for the message.

    Raises:
        MachineError: it does not fit.
    """
    if limit_bytes is not None and needed_bytes > limit_bytes:
        raise MachineError(
            f"memory: {what} needs {needed_bytes / 1e9:.2f} GB, this machine lets "
            f"{limit_bytes / 1e9:.2f} GB be used; {instead}"
        )


def judge(plan: MemoryPlan, *, limit_bytes: int, memory_bytes: int | None = None) -> Judgement:
    """Hold a plan against what the GPU may use.

    Args:
        plan: what is wanted.
        limit_bytes: what the GPU may use, `Machine.gpu_limit_bytes`.
        memory_bytes: of the whole Mac, whose limit can be raised; None where it cannot.

    Returns:
        The verdict; where it is not "fits", with the options that would, cheapest first.
    """
    longest = max_context(plan, limit_bytes)
    if plan.context <= longest:
        verdict = Verdict.FITS
    else:
        verdict = Verdict.SHORTER if longest >= MIN_CONTEXT else Verdict.NO
    options = () if verdict is Verdict.FITS else tuple(_options(plan, limit_bytes, memory_bytes))
    return Judgement(limit_bytes=limit_bytes, max_context=longest, verdict=verdict, options=options)


def _options(plan: MemoryPlan, limit: int, memory: int | None) -> Iterator[Option]:
    """Every change that suffices: first those that leave the answers as they are."""
    yield from _within(plan, limit, memory)
    for dense in DENSE_FORMATS[1:]:
        smaller = replace(plan, packing=dense_quantization(plan.config, dense))
        if smaller.total_bytes >= plan.total_bytes:
            continue
        change = f"--dense {dense}"
        cost = f"attention and embeddings in {dense[1:]} bits: not lossless; convert again"
        if smaller.total_bytes <= limit:
            yield Option(change=change, cost=cost, total_bytes=smaller.total_bytes)
            return
        for more in _within(smaller, limit, memory):
            both = f"{change} and {more.change}"
            yield replace(more, change=both, cost=f"{cost}; {more.cost}")
    if memory is not None and (enough := _smallest_mac_gib(plan)):
        yield Option(
            change=f"a Mac with {enough} GB", cost="as it is", total_bytes=plan.total_bytes
        )


def _within(plan: MemoryPlan, limit: int, memory: int | None) -> Iterator[Option]:
    """What suffices for one format of the weights: the embedding in its file, a limit, a context.

    Where a higher limit or a shorter context does not suffice alone, both are tried with the
    embedding in its file.
    """
    in_file = replace(plan, embedding="file")
    if plan.embedding == "memory" and in_file.total_bytes <= limit:
        yield Option(change=IN_FILE, cost=WAITS, total_bytes=in_file.total_bytes)
    for narrow in (_raised(memory), _shorter(limit)):
        if found := narrow(plan):
            yield found
        elif found := narrow(in_file):
            both, cost = f"{IN_FILE} and {found.change}", f"{WAITS}; {found.cost}"
            yield replace(found, change=both, cost=cost)


def _raised(memory: int | None) -> Callable[[MemoryPlan], Option | None]:
    """A limit that leaves an eighth of the memory, at least 4 GiB, to macOS."""

    def option(plan: MemoryPlan) -> Option | None:
        needed = -(-plan.total_bytes // MIB)
        if memory is None or needed * MIB > memory - max(memory // 8, 4 * GIB):
            return None
        left = (memory - needed * MIB) / GIB
        return Option(
            change=f"sudo sysctl iogpu.wired_limit_mb={needed}",
            cost=f"until the next restart; leaves {left:.1f} GiB to everything else",
            total_bytes=plan.total_bytes,
        )

    return option


def _shorter(limit: int) -> Callable[[MemoryPlan], Option | None]:
    """The longest context, if it is one to talk in."""

    def option(plan: MemoryPlan) -> Option | None:
        longest = min(max_context(plan, limit), plan.context)
        if longest < MIN_CONTEXT:
            return None
        return Option(
            change=f"--context {longest}",
            cost="shorter conversations",
            total_bytes=replace(plan, context=longest).total_bytes,
        )

    return option


def _smallest_mac_gib(plan: MemoryPlan) -> int | None:
    sizes = sorted({gib for chip in CHIPS for gib in chip.memory_gib})
    fits = (gib for gib in sizes if default_working_set_bytes(gib * GIB) >= plan.total_bytes)
    return next(fits, None)
