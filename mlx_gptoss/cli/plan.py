"""`mlx-gptoss plan`: will it fit, before anything is downloaded or loaded."""

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.console import size

if TYPE_CHECKING:
    from mlx_gptoss.fitting import Judgement
    from mlx_gptoss.plan import MemoryPlan
    from mlx_gptoss.table import EmbeddingPlace

DEFAULT_CONTEXT = 8192
CONTEXTS = (4096, 32768, 131072)  # for which keys and values are shown


@click.command()
@click.argument("model")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    show_default=f"{DEFAULT_CONTEXT}",
    help="Tokens of prompt and answer together.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="B",
    help="Conversations at a time, each of this context.",
)
@click.option(
    "--dense",
    type=click.Choice(["bf16", "q8", "q4"]),
    show_default="as converted; bf16",
    help="Format of attention and embeddings, as in `convert`.",
)
@click.option(
    "--embedding",
    type=click.Choice(["memory", "file"]),
    default="memory",
    show_default=True,
    help="Where its table stays, as in `generate`.",
)
@click.option("--memory", metavar="SIZE", help="Plan for a Mac with this memory, such as 16G.")
@click.option("--chip", metavar="NAME", help="Plan for every memory size of a chip: 'M4 Pro'.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def plan(
    *,
    model: str,
    context: int | None,
    batch: int,
    dense: str | None,
    embedding: "EmbeddingPlace",
    memory: str | None,
    chip: str | None,
    as_json: bool,
) -> None:
    """Say whether MODEL (demo, 20b, 120b or a folder) fits, and what would make it fit.

    20b and 120b need no files: their sizes are known. Exit 1 if it fits nowhere that was asked for.
    """
    from mlx_gptoss.fitting import Verdict, judge
    from mlx_gptoss.plan import MOST_SAVED, ON_CPU, ON_METAL, MemoryPlan

    config, packing = _sizes(model, dense)
    machines = _machines(memory, chip)
    wanted = MemoryPlan(
        config=config,
        packing=packing,
        context=context or min(DEFAULT_CONTEXT, config.max_position_embeddings),
        batch=batch,
        snapshots=MOST_SAVED,
        embedding=embedding,
        scratch=ON_METAL if all(mac for _, _, _, mac in machines) else ON_CPU,
    )
    judged = [
        (label, judge(wanted, limit_bytes=limit, memory_bytes=memory_bytes if mac else None))
        for label, memory_bytes, limit, mac in machines
    ]
    click.echo(_json(model, wanted, judged) if as_json else _text(model, wanted, judged))
    if all(judgement.verdict != Verdict.FITS for _, judgement in judged):
        raise SystemExit(1)


def _sizes(model: str, dense: str | None) -> tuple[Any, Any]:
    """Config and packing: of a converted model what it holds, else what converting would give."""
    from mlx_gptoss.checkpoint import open_checkpoint
    from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
    from mlx_gptoss.library import converted_folder, find_model, published_name
    from mlx_gptoss.manifest import MANIFEST
    from mlx_gptoss.plan import dense_quantization

    short = published_name(model)
    if short and (dense or not (converted_folder(short) / MANIFEST).is_file()):
        config = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}[short]
        return config, dense_quantization(config, dense or "bf16")
    checkpoint = open_checkpoint(find_model(model))
    if dense is None:
        return checkpoint.config, checkpoint.quantization
    return checkpoint.config, dense_quantization(checkpoint.config, dense)


def _machines(memory: str | None, chip: str | None) -> list[tuple[str, int, int, bool]]:
    """What to plan for: label, memory, GPU limit, and whether it is a Mac."""
    from mlx_gptoss.chips import GIB, default_working_set_bytes, find_chip
    from mlx_gptoss.errors import MachineError
    from mlx_gptoss.machine import read_machine

    if memory is None and chip is None:
        here = read_machine()
        if here.memory_bytes is None or here.gpu_limit_bytes is None:
            raise MachineError("this machine's memory cannot be read; name one: --memory 16G")
        label = f"this machine ({here.cpu or here.architecture})"
        return [(label, here.memory_bytes, here.gpu_limit_bytes, here.system == "Darwin")]
    row = None if chip is None else find_chip(chip)
    if memory is not None:
        sizes = [_parse_size(memory)]
        row = row and find_chip(row.name, memory_bytes=sizes[0])
        if row and chip and sizes[0] // GIB not in _memory_sizes(row.name):
            sold = ", ".join(map(str, _memory_sizes(row.name)))
            raise MachineError(f"--memory: {row.name} has {sold} GB; got {memory!r}")
    else:
        assert row is not None
        sizes = [gib * GIB for gib in _memory_sizes(row.name)]
    name = "a Mac" if row is None else f"Apple {row.name}"
    return [(f"{name} with {n / GIB:g} GB", n, default_working_set_bytes(n), True) for n in sizes]


def _memory_sizes(name: str) -> list[int]:
    """Every size that a chip is sold with, over its rows."""
    from mlx_gptoss.chips import CHIPS

    return sorted({gib for chip in CHIPS if chip.name == name for gib in chip.memory_gib})


def _parse_size(text: str) -> int:
    """Bytes of "16G", "16GB" or "16": what Apple sells as gigabytes are units of 2**30."""
    from mlx_gptoss.chips import GIB

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", text.strip().lower())
    if not found or float(found[1]) == 0:
        raise click.UsageError(f"--memory: expected a size such as 16G, got {text!r}")
    return int(float(found[1]) * GIB)


def _json(model: str, wanted: "MemoryPlan", judged: "list[tuple[str, Judgement]]") -> str:
    return json.dumps(
        {
            "model": model,
            "context": wanted.context,
            "batch": wanted.batch,
            "chunk": wanted.chunk,
            "weights_bytes": wanted.weights,
            "embedding": wanted.embedding,
            "resident_bytes": wanted.resident_bytes,
            "kv_bytes": wanted.kv_bytes,
            "kv_bytes_per_token": wanted.kv_bytes_per_token,
            "kv_bytes_by_context": _kv_by_context(wanted),
            "snapshots": wanted.snapshots,
            "snapshot_bytes": wanted.snapshot_bytes,
            "prefill_bytes": wanted.prefill_bytes,
            "decode_bytes": wanted.decode_bytes,
            "total_bytes": wanted.total_bytes,
            "machines": [
                {
                    "machine": label,
                    "limit_bytes": judgement.limit_bytes,
                    "verdict": judgement.verdict,
                    "max_context": judgement.max_context,
                    "options": [vars(option) for option in judgement.options],
                }
                for label, judgement in judged
            ],
        },
        indent=2,
    )


def _kv_by_context(wanted: "MemoryPlan") -> dict[int, int]:
    """Bytes of keys and values at some contexts, with the one that is asked for."""
    most = wanted.config.max_position_embeddings
    contexts = sorted({n for n in CONTEXTS if n <= most} | {wanted.context})
    return {n: replace(wanted, context=n).kv_bytes for n in contexts}


def _text(model: str, wanted: "MemoryPlan", judged: "list[tuple[str, Judgement]]") -> str:
    left_out = {"embedding"} if wanted.embedding == "file" else set[str]()
    parts = ", ".join(
        f"{name} {size(nbytes)}" + (" (in its file)" if name in left_out else "")
        for name, nbytes in wanted.weights.items()
    )
    kv = ", ".join(f"{n}: {size(nbytes)}" for n, nbytes in _kv_by_context(wanted).items())
    scratch = max(wanted.prefill_bytes, wanted.decode_bytes)
    lines = [
        f"{model}: context {wanted.context}, batch {wanted.batch}",
        f"weights  {size(wanted.resident_bytes):>9}  {parts}",
        f"K,V      {size(wanted.kv_bytes):>9}  {size(wanted.kv_bytes_per_token)} a token, and "
        f"{size(wanted.snapshot_bytes)} of windows",
        f"{'':19}by context: {kv}",
        f"saved    {size(wanted.snapshots * wanted.snapshot_bytes):>9}  "
        f"{wanted.snapshots} points that a conversation can go back to",
        f"scratch  {size(scratch):>9}  estimate, for prompt chunks of {wanted.chunk} tokens",
        f"peak     {size(wanted.total_bytes):>9}",
    ]
    for label, judgement in judged:
        limit = size(judgement.limit_bytes)
        lines.append(f"{label}: the GPU may use {limit}: {_verdict(judgement)}")
        for option in judgement.options:
            lines.append(f"  {option.change}  (peak {size(option.total_bytes)})")
            lines.append(f"      {option.cost}")
    return "\n".join(lines)


def _verdict(judgement: "Judgement") -> str:
    from mlx_gptoss.fitting import Verdict

    if judgement.verdict is Verdict.NO:
        return judgement.verdict
    return f"{judgement.verdict}, up to {judgement.max_context} tokens"
