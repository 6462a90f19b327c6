"""The plan's bytes: against arithmetic, against converted files, and against what MLX allocated."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TinyShape, write_checkpoint
from weights import tiny_model

from mlx_gptoss.chips import GIB, default_working_set_bytes
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import MachineError
from mlx_gptoss.fitting import Verdict, judge
from mlx_gptoss.plan import (
    DENSE_FORMATS,
    ON_CPU,
    MemoryPlan,
    capacity,
    dense_quantization,
    max_context,
)

ROOT = Path(__file__).resolve().parent.parent
MEDIUM = TinyShape(
    layers=2, hidden=320, inter=288, q_heads=10, kv_heads=2, experts=64, chosen=3, vocab=32768
)

# Runs in a process of its own, so that the peak is this model's alone.
MEASURE = """
import json, sys
import mlx.core as mx
from mlx_gptoss.engine import Engine
from mlx_gptoss.model import load_model
from mlx_gptoss.sampling import SamplingParams
mx.set_default_device(mx.cpu)
folder, place, prompt, answer, chunk = *sys.argv[1:3], *map(int, sys.argv[3:])
model = load_model(folder, embedding=place)
engine = Engine(model, prefill_chunk=chunk, chunk_target_s=float('inf'))
tokens = [7 * i % 32768 for i in range(prompt)]
sampling = SamplingParams(temperature=0)
with engine.generate(tokens, sampling=sampling, max_tokens=answer) as generation:
    count = len(list(generation))
print(json.dumps({"peak": mx.get_peak_memory(), "kv": generation.cache.nbytes, "count": count}))
"""


def planned(config=GPT_OSS_20B, dense="bf16", context=8192, **changes) -> MemoryPlan:
    return MemoryPlan(
        config=config, packing=dense_quantization(config, dense), context=context, **changes
    )


@pytest.mark.parametrize("layers, experts", [(24, 32), (36, 128)])
@pytest.mark.parametrize("dense, bits", [("bf16", 16), ("q8", 8.5), ("q4", 4.5)])
def test_weights_of_the_published_models_by_hand(layers, experts, dense, bits):
    """Affine groups of 64 have a 16-bit scale and offset: 8.5 and 4.5 bits a weight."""
    config = {24: GPT_OSS_20B, 36: GPT_OSS_120B}[layers]
    weights = planned(config, dense).weights
    matrix, width = 2880 * 2880, 64 * 64 + 2 * 8 * 64
    expert = 3 * matrix * 4.25 / 8 + 3 * 2880 * 2
    attention = 2880 * (width + 64 * 64) * bits / 8 + 2 * (width + 2880 + 64)
    assert weights == {
        "experts": layers * experts * expert,
        "attention": layers * attention,
        "router": layers * experts * 2881 * 2,
        "norms": (2 * layers + 1) * 2880 * 2,
        "embedding": 201088 * 2880 * bits / 8,
        "unembedding": 201088 * 2880 * bits / 8,
    }


def test_published_sizes():
    """As other programs report them: 13.76 and 65.25 GB, 24.6 and 36.9 kB of K,V a token."""
    small, large = planned(GPT_OSS_20B), planned(GPT_OSS_120B)
    assert round(sum(small.weights.values()) / 1e9, 2) == 13.76
    assert round(sum(large.weights.values()) / 1e9, 2) == 65.25
    assert (small.kv_bytes_per_token, large.kv_bytes_per_token) == (24576, 36864)
    assert (small.snapshot_bytes, large.snapshot_bytes) == (12 * 262144, 18 * 262144)
    assert planned(batch=3).kv_bytes == 3 * small.kv_bytes


@pytest.mark.parametrize("dense", DENSE_FORMATS)
def test_weights_equal_the_converted_files(tmp_path, dense):
    source = write_checkpoint(tmp_path / "source", layers=3)
    convert_checkpoint(source, tmp_path / "model", dense=dense)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    config = tiny_model(TinyShape(layers=3)).config
    plan = planned(config, dense)
    assert sum(plan.weights.values()) == index["metadata"]["total_size"]


@pytest.mark.parametrize("chunk", [64, 100, 512, 4000])
def test_capacity_follows_the_cache(chunk):
    import mlx.core as mx

    from mlx_gptoss.cache import FullCache

    cache, positions = FullCache((1, 1, 4), mx.bfloat16), 0
    for _ in range(9):
        cache.extend(*[mx.zeros((1, 1, chunk, 4), mx.bfloat16)] * 2)
        positions += chunk
        plan = capacity(positions, chunk) + 128
        assert cache.nbytes == plan * 2 * 4 * 2, f"{positions} positions"


@pytest.mark.parametrize(
    "dense, place, prompt, chunk",
    [("bf16", "memory", 512, 128), ("bf16", "file", 512, 128), ("q8", "memory", 384, 128)],
)
def test_the_peak_is_the_planned_one(tmp_path, dense, place, prompt, chunk):
    """Within 5 % of what MLX says it held at most, weights, caches and scratch together."""
    source = write_checkpoint(tmp_path / "source", shape=MEDIUM)
    convert_checkpoint(source, tmp_path / "model", dense=dense, verify=False)
    asked = [tmp_path / "model", place, str(prompt), "9", str(chunk)]
    command = [sys.executable, "-c", MEASURE, *asked]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)
    config = tiny_model(MEDIUM).config
    where = {"chunk": chunk, "embedding": place, "scratch": ON_CPU}
    plan = planned(config, dense, context=prompt, **where)
    assert measured["count"] == 9
    assert measured["kv"] == plan.kv_bytes
    error = plan.total_bytes / measured["peak"] - 1
    assert abs(error) <= 0.05, f"planned {plan.total_bytes}, measured {measured['peak']}"


def test_max_context_is_the_last_that_fits():
    plan = planned(dense="q8")
    longest = max_context(plan, 13_000_000_000)
    assert replace(plan, context=longest).total_bytes <= 13_000_000_000
    assert replace(plan, context=longest + 1).total_bytes > 13_000_000_000
    assert max_context(plan, 10**9) == 0
    assert max_context(plan, 10**12) == 131072


def mac(plan: MemoryPlan, gib: int):
    memory = gib * GIB
    return judge(plan, limit_bytes=default_working_set_bytes(memory), memory_bytes=memory)


def test_a_mac_that_is_large_enough():
    judged = mac(planned(), 32)
    assert (judged.verdict, judged.max_context, judged.options) == (Verdict.FITS, 131072, ())


def test_options_are_ranked_and_sufficient():
    """16 GB do not hold 20b by default: first what keeps the answers, then coarser formats."""
    judged = mac(planned(), 16)
    assert judged.verdict == Verdict.NO
    changes = [option.change for option in judged.options]
    assert [change.split(" iogpu")[0] for change in changes] == [
        "--dense q8 and sudo sysctl",
        "--dense q4 and sudo sysctl",
        "--dense q4 and --embedding file and --context 5376",
        "a Mac with 24 GB",
    ]
    small = planned(dense="q4", context=5376, embedding="file")
    assert small.total_bytes <= default_working_set_bytes(16 * GIB)
    assert judged.options[2].total_bytes == small.total_bytes
    for option, dense in zip(judged.options, ("q8", "q4"), strict=False):
        raised = int(option.change.rpartition("=")[2]) * 2**20
        assert planned(dense=dense).total_bytes <= raised <= 12 * GIB
    judged = mac(planned(context=131072), 24)
    assert judged.verdict == Verdict.SHORTER
    changes = [option.change for option in judged.options]
    assert changes[0] == "--embedding file"
    assert changes[1].startswith("sudo sysctl iogpu.wired_limit_mb=")
    assert changes[2] == f"--context {judged.max_context}"
    assert changes[3] == "--dense q8" and len(changes) == 4
    in_file = planned(context=131072, embedding="file")
    assert planned(context=131072).total_bytes - in_file.total_bytes == 201088 * 2880 * 2
    assert judged.options[0].total_bytes == in_file.total_bytes
    assert mac(in_file, 24).verdict == Verdict.FITS
    limit = default_working_set_bytes(24 * GIB)
    assert planned(dense="q8", context=131072).total_bytes <= limit


def test_where_the_limit_cannot_be_raised():
    judged = judge(planned(), limit_bytes=8 * GIB)
    assert judged.verdict == Verdict.NO and judged.options == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": 0}, "context: expected 1 to 131072, got 0"),
        ({"context": 131073}, "context: expected 1 to 131072, got 131073"),
        ({"batch": 0}, "batch: expected 1 to 16, got 0"),
        ({"chunk": 0}, "chunk: expected 1 to 131072, got 0"),
        ({"snapshots": -1}, "snapshots: expected 0 to 1048576, got -1"),
    ],
)
def test_impossible_requests(change, message):
    with pytest.raises(MachineError, match=message):
        planned(**change)


def test_no_such_place_of_the_embedding():
    with pytest.raises(MachineError, match="embedding: expected one of memory, file; got 'disk'"):
        planned(embedding="disk")


def test_unknown_format():
    with pytest.raises(MachineError, match="dense: expected one of bf16, q8, q4; got 'q5'"):
        dense_quantization(GPT_OSS_20B, "q5")
