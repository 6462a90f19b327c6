"""The kernels' memory traffic: under the targets, and no worse than the committed counters."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import pytest

from benchmarks.traffic import AT_32K, GOLDENS, MODEL, Row, golden_cases, measure
from benchmarks.traffic_prefill import ours, run_steel, steel
from mlx_gptoss.kernels.agreement import excess
from mlx_gptoss.kernels.inputs import Inputs
from mlx_gptoss.kernels.registry import KERNELS

GOLDEN = {name: Row(**row) for name, row in json.loads(GOLDENS.read_text()).items()}
COUNTERS = ("threadgroup_bytes", "distinct_sectors_ratio", "instruction_sectors_ratio",
            "requested_ratio", "streamed_ratio", "simd_per_kib")  # fmt: skip


def test_every_kernel_has_a_golden() -> None:
    """In each form of its matrices."""
    assert set(GOLDEN) == set(golden_cases())
    counted = {(stem, dense) for stem, dense, _ in golden_cases().values()}
    assert counted >= {(stem, "plain") for stem in KERNELS}
    packed = {(s, form) for s, kernel in KERNELS.items() for form in ("q8", "q4") if kernel.dense}
    assert counted >= packed


@pytest.mark.parametrize("name", golden_cases())
def test_no_counter_grows(name: str) -> None:
    """After an intended change: `python benchmarks/traffic.py --write`, and say why it grew."""
    stem, dense, sizes = golden_cases()[name]
    found, golden = asdict(measure(stem, sizes, dense=dense)), asdict(GOLDEN[name])
    grown = {n: (golden[n], found[n]) for n in COUNTERS if found[n] > golden[n] * 1.001}
    assert not grown, f"{name}: committed, found: {grown}"


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("stem", ["norm_qkv_rope", "out_residual", "unembed"])
def test_rows_share_their_weights(stem: str, rows: int) -> None:
    """One reading of the matrix serves up to 16 rows."""
    assert GOLDEN[f"{stem} q8, {rows} rows"].streamed_ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("stem", ["experts_swiglu_grouped", "experts_down_grouped"])
def test_a_block_reads_its_expert_once(stem: str) -> None:
    lines = [name for name in GOLDEN if name.startswith(stem)]
    assert len(lines) == 4
    assert {GOLDEN[name].streamed_ratio for name in lines} == {1.0}


@pytest.mark.parametrize("model", ["20b", "120b"])
@pytest.mark.parametrize("stem", ["experts_swiglu", "experts_down"])
def test_targets_of_the_expert_kernels(stem: str, model: str) -> None:
    row = GOLDEN[f"{stem} plain, {model}"]
    assert row.distinct_sectors_ratio <= 1.25
    assert row.instruction_sectors_ratio <= 2.0
    assert row.streamed_ratio == 1.0


def test_keys_and_values_are_read_once_at_32k() -> None:
    """A few splits stand for all: the ratio is of the keys in them."""
    sizes = replace(AT_32K, kv_heads=1, q_heads=8)
    row = measure("attention_decode", sizes, dense="plain")
    assert row.streamed_ratio <= 1.05
    assert row.distinct_sectors_ratio <= 1.05


def test_a_chunk_of_sliding_attention_beside_mlx() -> None:
    """Fewer than half the reads and no more products than MLX's kernel in its best form."""
    sizes = replace(MODEL, tokens=512)
    kernel, mlx = ours(sizes), steel(sizes, block=32)
    assert kernel.distinct_ratio < mlx.distinct_ratio / 2
    assert kernel.instruction_ratio < mlx.instruction_ratio / 2
    assert kernel.products_ratio < 1.0625 < mlx.products_ratio
    assert kernel.threadgroup_kib < mlx.threadgroup_kib
    assert kernel.simd < mlx.simd


@pytest.mark.parametrize("block", [32, 64])
def test_what_is_counted_of_mlx_is_sliding_attention(block: int) -> None:
    """All of MLX's launch on a small chunk gives what ours means."""
    sizes = replace(MODEL, tokens=64, q_heads=6, kv_heads=2, window=96)
    kernel = KERNELS["attention_window_prefill"]
    given = kernel.case(Inputs(sizes, dtype=mx.bfloat16)) | {"start": None}
    given |= {name: mx.nan_to_num(given[name]) for name in ("keys", "values")}
    out, _ = run_steel(given, block=block, threadgroups=None)
    want = kernel.define(**given).astype(mx.float32)
    got = mx.array(out.array()).reshape(want.shape).astype(mx.bfloat16)
    assert excess(got, want) <= 1
