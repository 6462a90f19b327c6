"""`mlx-gptoss info`: what a model folder holds."""

import json
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.console import Progress, size

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint import Checkpoint


@click.command()
@click.argument("model")
@click.option("--hashes", is_flag=True, help="Check every file against the manifest's sha256.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def info(*, model: str, hashes: bool, as_json: bool, quiet: bool) -> None:
    """Describe MODEL: demo, 20b, 120b, a folder or a hub id."""
    from mlx_gptoss.checkpoint import open_checkpoint
    from mlx_gptoss.library import find_model
    from mlx_gptoss.model_info import check_hashes

    checkpoint = open_checkpoint(find_model(model))
    intact = None
    if hashes:
        intact = check_hashes(checkpoint, progress=Progress(quiet=quiet).bytes)
    facts = _facts(checkpoint, intact)
    click.echo(json.dumps(facts, indent=2) if as_json else _text(checkpoint, facts))


def _facts(checkpoint: "Checkpoint", intact: tuple[str, ...] | None) -> dict[str, Any]:
    """Everything `info` knows, as one JSON object."""
    from mlx_gptoss.model_info import parts

    manifest = checkpoint.manifest and {
        key: value for key, value in checkpoint.manifest.items() if key != "tensors"
    }
    return {
        "folder": str(checkpoint.folder),
        "config": checkpoint.config.to_json(),
        "parts": {
            name: {"bytes": part.nbytes, "stored_as": list(part.stored_as)}
            for name, part in parts(checkpoint).items()
        },
        "total_bytes": checkpoint.nbytes,
        "manifest": manifest,
        "intact_files": None if intact is None else list(intact),
    }


def _text(checkpoint: "Checkpoint", facts: dict[str, Any]) -> str:
    c = checkpoint.config
    sliding = sum(kind == "sliding_attention" for kind in c.layer_types)
    lines = [
        f"folder      {checkpoint.folder}",
        f"layers      {c.num_hidden_layers}: {sliding} with a window of {c.sliding_window}, "
        f"{c.num_hidden_layers - sliding} full",
        f"width       {c.hidden_size}, {c.num_attention_heads} query and {c.num_key_value_heads} "
        f"K,V heads of {c.head_dim}",
        f"experts     {c.num_local_experts} of width {c.intermediate_size}, "
        f"{c.num_experts_per_tok} chosen",
        f"vocabulary  {c.vocab_size}",
        f"context     {c.max_position_embeddings}",
        f"weights     {size(facts['total_bytes'])}",
    ]
    for name, part in facts["parts"].items():
        lines.append(f"  {name:<12}{size(part['bytes']):>10}  {', '.join(part['stored_as'])}")
    return "\n".join([*lines, _origin(facts["manifest"]), *_hash_lines(facts["intact_files"])])


def _origin(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "origin      another tool: no manifest"
    source = manifest["source"]
    proven = "verified" if manifest["verified"] is not None else "not verified"
    return (
        f"origin      {source['folder']} ({source['layout']}), dense weights "
        f"{manifest['options']['dense']}, by {manifest['converter']}, {proven}"
    )


def _hash_lines(intact: list[str] | None) -> list[str]:
    return [] if intact is None else [f"hashes      {len(intact)} files, all as converted"]
