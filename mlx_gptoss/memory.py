"""Admission: whether a turn's keys and values fit beside the weights, before it starts.

Counts with `plan`, against what the GPU may use. A turn reserves the longest context it may reach,
so what was admitted cannot run out of memory later.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.errors import MachineError
from mlx_gptoss.machine import read_machine
from mlx_gptoss.plan import MIN_CONTEXT, MOST_SAVED, MemoryPlan, max_context, scratch_here
from mlx_gptoss.table import EmbeddingPlace

GIB = 2**30


class Memory:
    """The bytes of one model on one machine.

    Args:
        plan: Of the model; its context does not matter.
        limit_bytes: What weights, caches and scratch may take together.

    Attributes:
        longest: The longest context, in tokens, that fits when nothing else runs.

    Raises:
        MachineError: Not even a short conversation fits.
    """

    def __init__(self, plan: MemoryPlan, *, limit_bytes: int):
        self._plan, self.limit_bytes = plan, limit_bytes
        self._weights_bytes = plan.resident_bytes
        self.longest = max_context(plan, limit_bytes)
        least = min(MIN_CONTEXT, plan.config.max_position_embeddings)
        if self.longest < least:
            needed = replace(plan, context=least).total_bytes
            raise MachineError(
                f"memory: the model with a context of {least} tokens needs {needed / GIB:.2f} GiB, "
                f"this machine lets {limit_bytes / GIB:.2f} GiB be used; see `mlx-gptoss plan`"
            )

    def grant(self, prompt_tokens: int, max_tokens: int | None) -> tuple[int, int]:
        """The context to reserve for a turn, and the most tokens of its answer.

        Args:
            prompt_tokens: Of the prompt.
            max_tokens: Of the answer; None takes what there is.

        Raises:
            MachineError: It does not fit, even alone.
        """
        most = self._plan.config.max_position_embeddings
        wanted = min(most, prompt_tokens + (1 if max_tokens is None else max_tokens))
        if wanted > self.longest:
            needed = replace(self._plan, context=wanted).total_bytes
            raise MachineError(
                f"memory: {prompt_tokens} prompt tokens with max_tokens={max_tokens} need "
                f"{needed / GIB:.2f} GiB, this machine lets {self.limit_bytes / GIB:.2f} GiB be "
                f"used, enough for {self.longest} tokens in all; lower max_tokens or shorten the "
                "conversation"
            )
        if max_tokens is None:
            return self.longest, max(1, self.longest - prompt_tokens)
        return wanted, max_tokens

    def free_bytes(self, contexts: list[int]) -> int:
        """What is left beside turns that reserved these contexts; negative if they do not fit."""
        plans = [replace(self._plan, context=context) for context in contexts]
        turns = sum(self.turn_bytes(context) for context in contexts)
        return self.limit_bytes - self._weights_bytes - _scratch_bytes(plans) - turns

    def turn_bytes(self, context: int) -> int:
        """What is reserved for a turn's cache, and for the places it can go back to."""
        plan = replace(self._plan, context=context)
        return plan.kv_bytes + plan.snapshots * plan.snapshot_bytes


def _scratch_bytes(plans: Sequence[MemoryPlan]) -> int:
    """Of turns at once: in a round all of them decode, or one is fed while the others do."""
    decode = sum(plan.decode_bytes for plan in plans)
    return max([decode, *(decode - plan.decode_bytes + plan.prefill_bytes for plan in plans)])


def memory_of(
    folder: Path, *, limit_bytes: int | None, embedding: EmbeddingPlace = "memory"
) -> Memory | None:
    """Admission for a model folder; None where the machine's memory cannot be read.

    Args:
        folder: Of a converted model.
        limit_bytes: None asks the machine.
        embedding: See `load_model`.

    Raises:
        ConfigError: See `open_checkpoint`.
        CheckpointError: See `open_checkpoint`.
        MachineError: The model does not fit.
    """
    limit = read_machine().gpu_limit_bytes if limit_bytes is None else limit_bytes
    if limit is None:
        return None
    checkpoint = open_checkpoint(folder)
    plan = MemoryPlan(
        config=checkpoint.config,
        packing=checkpoint.quantization,
        context=1,
        snapshots=MOST_SAVED,
        embedding=embedding,
        scratch=scratch_here(),
    )
    return Memory(plan, limit_bytes=limit)
