"""What one decoded token costs before any Mac is asked: kernels, dependent steps, bytes.

    python benchmarks/decode_card.py --model 20b          or 120b; --dense bf16|q8|q4
    python benchmarks/decode_card.py --model 20b --write  also keep it in benchmarks/results

The step is traced with the real sizes and weights that are never computed, and its graph counted:
kernels are the primitives that launch one, dependent dispatches the longest chain of them. mlx-lm's
step is traced and counted in the same run; its K and V count as often as its kernel reads them,
once for each query head (traffic.py).

Steps of several turns are in the card, too, see batch_steps.py.

Tokens/s are PREDICTIONS of a model fitted to published figures of other engines on Macs, not
measurements. A token takes

    weights / (0.79 bandwidth) + K,V / (share bandwidth) + chain * 7.25 us * (1.1 - 0.1 generation)

with share 0.45 for ours, a guess, and 0.79 for mlx-lm. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.batch_steps import BATCHES, batch_weight_bytes, count_batch  # noqa: E402
from benchmarks.graph import (  # noqa: E402
    CHUNK,
    WIDTH,
    chunk_counts,
    mlx_lm_chunk_counts,
    mlx_lm_counts,
    mlx_lm_host_ms,
    stand_in_kernels,
)
from mlx_gptoss.checkpoint import expected_tensors  # noqa: E402
from mlx_gptoss.chips import CHIPS  # noqa: E402
from mlx_gptoss.config import FULL, GPT_OSS_20B, GPT_OSS_120B, ModelConfig  # noqa: E402
from mlx_gptoss.decode import Decoder  # noqa: E402
from mlx_gptoss.decode_state import ROWS  # noqa: E402
from mlx_gptoss.dispatches import Counted, count_step, step_arguments  # noqa: E402
from mlx_gptoss.kernels.selection import all_definitions, all_kernels  # noqa: E402
from mlx_gptoss.model import Model  # noqa: E402
from mlx_gptoss.plan import DENSE_FORMATS, dense_quantization, weight_bytes  # noqa: E402

MODELS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
RESULTS = ROOT / "benchmarks" / "results"
OUTSIDE_LAYERS = 3  # embed, unembed, sample_token
WEIGHT_SHARE, OUR_KV_SHARE, EPOCH_S = 0.79, 0.45, 7.25e-6  # see above
HEADS_PER_KV_HEAD = 8
CONTEXTS = (1024, 8192, 32768, 131072)
DTYPES = {"BF16": mx.bfloat16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}


def shell_model(config: ModelConfig, dense: str) -> Model:
    """A model whose weights have shapes and types and are never computed."""
    packing = dense_quantization(config, dense)
    weights = {
        name: mx.zeros(spec.shape, DTYPES[spec.dtype])
        for name, spec in expected_tensors(config, packing).items()
    }
    return Model(config, weights, quantization=packing)


def count_ours(config: ModelConfig, dense: str) -> Counted:
    """Count the traced step."""
    decoder = Decoder(
        shell_model(config, dense), kernels=all_kernels(), allowed=mx.ones((config.vocab_size,))
    )
    return count_step(decoder, rows=1, capacity=8192)


def count_chunks(config: ModelConfig, dense: str) -> dict[str, int]:
    """Kernels launched for the first chunk of a prompt, ours with and without kernels of our own.

    The widths are cut: the graph does not depend on them.
    """
    small = replace(config, hidden_size=WIDTH, intermediate_size=WIDTH, vocab_size=1024)
    model = shell_model(small, dense)
    return {
        "ours": chunk_counts(model, all_kernels()).kernels,
        "ours_without_kernels": chunk_counts(model, all_definitions("for comparison")).kernels,
        "mlx_lm": mlx_lm_chunk_counts(config, dense).kernels,
    }


def token_bytes(config: ModelConfig, dense: str) -> dict[str, int]:
    """Bytes of weights that one token reads, by part."""
    parts = dict.fromkeys(
        ("attention", "router", "experts", "embedding", "unembedding", "norms"), 0
    )
    for name, spec in expected_tensors(config, dense_quantization(config, dense)).items():
        if ".experts." in name:
            parts["experts"] += spec.nbytes * config.num_experts_per_tok // config.num_local_experts
        elif "embed_tokens" in name:
            parts["embedding"] += spec.nbytes // config.vocab_size
        else:
            part = next((p for p in ("lm_head", "router", "self_attn") if p in name), "norms")
            parts[{"lm_head": "unembedding", "self_attn": "attention"}.get(part, part)] += (
                spec.nbytes
            )
    return parts


def kv_bytes(config: ModelConfig, context: int) -> dict[str, int]:
    """Bytes of K and V that one token reads at a context, and the copy of append rows."""
    row = 2 * config.num_key_value_heads * config.head_dim * 2
    full = sum(kind == FULL for kind in config.layer_types)
    sliding = config.num_hidden_layers - full
    window = min(context, config.sliding_window)
    copied = config.num_hidden_layers * row * ROWS  # on average half are read and half written
    return {"full": full * context * row, "sliding": sliding * window * row, "append": copied}


def replay_ms(config: ModelConfig, dense: str) -> dict[str, float]:
    """Host CPU time to replay a compiled step of as many primitives and arrays as ours.

    Metal's kernels cannot run here, so `mx.depends`, which costs nothing on any device, stands for
    each of them; building and freeing the graph is what remains.
    """
    decoder = Decoder(
        shell_model(config, dense),
        kernels=stand_in_kernels(),
        allowed=mx.ones((config.vocab_size,)),
    )
    arguments = step_arguments(decoder, rows=1, capacity=8192)
    compiled = mx.compile(partial(decoder.step, filtered=False))
    compiled(*arguments)
    times = []
    for _ in range(60):
        started = time.thread_time()
        result = compiled(*arguments)
        times.append(1e3 * (time.thread_time() - started))
        del result
    times = sorted(times[10:])
    return {"median": round(statistics.median(times), 3), "p90": round(times[44], 3)}


def count_batches(config: ModelConfig, dense: str) -> dict[int, dict[str, Any]]:
    """Steps of several turns, each with a cache of its own: kernels, chain and bytes."""
    two, four = (
        shell_model(
            replace(
                config,
                num_hidden_layers=layers,
                layer_types=config.layer_types[:layers],
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                vocab_size=1024,
            ),
            dense,
        )
        for layers in (2, 4)
    )
    found = {}
    for rows in BATCHES:
        counted = count_batch(two, four, layers=config.num_hidden_layers, rows=rows)
        weights = batch_weight_bytes(config, dense, rows) / rows
        found[rows] = {
            "kernels_per_step": counted.kernels,
            "dependent_dispatches": counted.depth,
            "bytes_per_token": {
                context: round(weights + sum(kv_bytes(config, context).values()))
                for context in CONTEXTS
            },
        }
    return found


def predictions(config: ModelConfig, dense: str, context: int, depths: dict[str, int]) -> list[Any]:
    """Predicted tokens/s of the chips that hold the model and the context, both engines."""
    packing = dense_quantization(config, dense)
    weights, kv = sum(token_bytes(config, dense).values()), kv_bytes(config, context)
    resident = sum(weight_bytes(config, packing).values()) + kv["full"]
    at_full_bandwidth = {
        "ours": sum(kv.values()) / OUR_KV_SHARE,
        "mlx_lm": HEADS_PER_KV_HEAD * (kv["full"] + kv["sliding"]) / WEIGHT_SHARE,
    }
    rows = []
    for chip in CHIPS:
        if max(chip.memory_gib) * 2**30 * 0.75 < resident:
            continue
        speeds = {}
        for engine, reads in at_full_bandwidth.items():
            bandwidth = chip.bandwidth_gb_per_s * 1e9
            epoch_s = EPOCH_S * (1 - 0.1 * (chip.generation - 1))
            token_s = (weights / WEIGHT_SHARE + reads) / bandwidth + depths[engine] * epoch_s
            speeds[engine] = round(1 / token_s, 1)
        rows.append({"chip": chip.name, "gpu_cores": max(chip.gpu_cores), **speeds})
    return rows


def card(name: str, dense: str) -> dict[str, Any]:
    """All figures of one model."""
    config = MODELS[name]
    ours, peer = count_ours(config, dense), mlx_lm_counts(config, dense)
    depths, layers = {"ours": ours.depth, "mlx_lm": peer.depth}, config.num_hidden_layers
    parts = token_bytes(config, dense)
    kv = {context: kv_bytes(config, context) for context in CONTEXTS}
    weights = sum(parts.values())
    peer_reads = {c: HEADS_PER_KV_HEAD * (k["full"] + k["sliding"]) for c, k in kv.items()}
    return {
        "model": name,
        "dense": dense,
        "ours": {
            "kernels_per_token": ours.kernels,
            "dependent_dispatches_per_layer": (ours.depth - OUTSIDE_LAYERS) / layers,
            "input_arrays": ours.inputs,
            "bytes_per_token": {c: weights + sum(k.values()) for c, k in kv.items()},
            "host_replay_cpu_ms": replay_ms(config, dense),
        },
        "mlx_lm": {
            "kernels_per_token": peer.kernels,
            "dependent_dispatches_per_layer": round(peer.depth / layers, 2),
            "bytes_per_token": {c: weights + read for c, read in peer_reads.items()},
            "host_build_cpu_ms": mlx_lm_host_ms(config, dense),
        },
        f"kernels_per_chunk_of_{CHUNK}": count_chunks(config, dense),
        "steps_of_turns": count_batches(config, dense),
        "weight_bytes_per_token": parts,
        "kv_bytes_per_token": kv,
        "predicted_tok_per_s": {c: predictions(config, dense, c, depths) for c in CONTEXTS},
        "machine": platform.machine(),
        "versions": {package: version(package) for package in ("mlx", "mlx-lm")},
    }


def show(found: dict[str, Any]) -> None:
    """The card as text."""
    ours, peer = found["ours"], found["mlx_lm"]
    print(f"gpt-oss-{found['model']}, {found['dense']} dense weights, one decoded token")
    print(f"{'':34}{'ours':>12}{'mlx-lm':>12}")
    for key in ("kernels_per_token", "dependent_dispatches_per_layer"):
        print(f"{key:34}{ours[key]:>12}{peer[key]:>12}")
    host = ours["host_replay_cpu_ms"]["median"], peer["host_build_cpu_ms"]
    print(f"{'host: graph of a token, CPU ms':34}{host[0]:>12}{host[1]:>12}")
    for context in CONTEXTS:
        sizes = (engine["bytes_per_token"][context] / 1e6 for engine in (ours, peer))
        print(f"{f'MB at context {context}':34}" + "".join(f"{size:>12.0f}" for size in sizes))
    chunk = found[f"kernels_per_chunk_of_{CHUNK}"]
    print(f"kernels for the first {CHUNK} tokens of a prompt: {chunk}")
    print(f"{'a step of turns':18}{'kernels':>9}{'chain':>7}   MB per token and context")
    for rows, step in found["steps_of_turns"].items():
        sizes = "".join(f"{size / 1e6:>9.0f}" for size in step["bytes_per_token"].values())
        print(f"{rows:>18}{step['kernels_per_step']:>9}{step['dependent_dispatches']:>7}{sizes}")
    weights = ", ".join(f"{n} {b / 1e6:.1f}" for n, b in found["weight_bytes_per_token"].items())
    print(f"weights of a token, MB: {weights}")
    print("\nPREDICTED tokens/s, ours / mlx-lm; nothing here was measured on a Mac")
    print(f"{'':20}" + "".join(f"{context:>18}" for context in CONTEXTS))
    table: dict[str, dict[int, str]] = {}
    for context, rows in found["predicted_tok_per_s"].items():
        for row in rows:
            chip = f"{row['chip']} {row['gpu_cores']} cores"
            table.setdefault(chip, {})[context] = f"{row['ours']} / {row['mlx_lm']}"
    for chip, cells in table.items():
        print(f"{chip:20}" + "".join(f"{cells.get(context, '-'):>18}" for context in CONTEXTS))


def main() -> None:
    """Print the card and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="20b")
    parser.add_argument("--dense", choices=DENSE_FORMATS, default="q8")
    parser.add_argument("--write", action="store_true", help="keep the card in benchmarks/results")
    options = parser.parse_args()
    found = card(options.model, options.dense)
    show(found)
    print(json.dumps(found))
    if options.write:
        path = RESULTS / f"decode_card_{options.model}_{options.dense}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
