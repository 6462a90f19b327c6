"""Launching a kernel: results in every mode, counters checked by hand, wrong arguments."""

import json
from typing import Any

import numpy as np
import pytest

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import Buffer, Kernel, KernelFault, Mode
from tests.emulator.row_sum import COLUMNS, ROWS, SOURCE, X, run


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("mode", list(Mode))
def test_results(mode: Mode, order: str) -> None:
    y, report = run(mode=mode, order=order)
    np.testing.assert_allclose(y, X.sum(1), rtol=0, atol=2e-5)
    assert not report.findings
    assert report.threadgroups_run == report.threadgroups_total == ROWS


def test_counters_are_what_the_kernel_does() -> None:
    """Every figure follows from the source: 8 loads per simdgroup, the last of 104 threads."""
    _, report = run()
    total = report.totals()
    traffic = report.traffic("x")
    assert traffic.bytes_requested == X.nbytes
    assert traffic.lanes == X.size
    assert traffic.instruction_sectors == traffic.distinct_sectors == X.nbytes // 32
    assert traffic.instructions == ROWS * (7 * 4 + 4)  # 104 threads reach the last column: 4 parts
    assert total.simd_operations == ROWS * 4
    assert total.threadgroup_barriers == ROWS
    assert total.threadgroup_store_bytes == total.threadgroup_load_bytes == ROWS * 4 * 4
    assert total.store_bytes == report.stored_bytes["y"] == ROWS * 4
    assert report.threadgroup_bytes == 16
    assert report.lines["row_sum.metal", 10].load_bytes == X.nbytes
    assert report.lines["row_sum.metal", 11].simd_operations == ROWS * 4
    assert report.lines["row_sum.metal", 13].threadgroup_barriers == ROWS


def test_table_and_json_tell_the_same() -> None:
    _, report = run()
    lines = report.table().splitlines()
    row = next(line.split() for line in lines if line.startswith("row_sum.metal:10 "))
    record = json.loads(report.to_json())
    counts = next(x for x in record["lines"] if x["file"] == "row_sum.metal" and x["line"] == 10)
    heads = lines[0].removeprefix("source line").split()
    assert row[1 : 1 + 4] == [
        str(counts[k]) for k in ("loads", "load_bytes", "load_sectors", "load_lines128")
    ]
    assert len(heads) == len(row) - 1
    assert lines[-1].split()[2] == str(record["totals"]["load_bytes"])


def test_sampled_threadgroups_count_in_proportion() -> None:
    _, whole = run()
    _, sample = run(threadgroups=2)
    assert (sample.threadgroups_run, sample.threadgroups_total) == (2, ROWS)
    per_row = whole.traffic("x").bytes_requested // ROWS
    assert sample.traffic("x").bytes_requested == 2 * per_row


def test_uneven_grid_has_a_small_last_threadgroup() -> None:
    source = """
    kernel void where(device uint* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                      uint n [[threads_per_threadgroup]],
                      uint d [[dispatch_threads_per_threadgroup]],
                      uint s [[simdgroups_per_threadgroup]]) { y[i] = n * 10000 + d * 100 + s; }
    """
    y = Buffer.empty((70,), "uint32")
    Kernel(source, "where")({"y": y}, grid=(70, 1, 1), threadgroup=(48, 1, 1))
    assert y.array().tolist() == [484802] * 48 + [224801] * 22


def test_dynamic_threadgroup_memory_and_function_constants() -> None:
    source = """
    constant bool twice [[function_constant(0)]];
    kernel void swap(const device int* x [[buffer(0)]], device int* y [[buffer(1)]],
                     threadgroup int* shared [[threadgroup(0)]],
                     uint i [[thread_index_in_threadgroup]]) {
      shared[i] = x[i];
      threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      y[i] = shared[39 - i] * (twice ? 2 : 1);
    }
    """
    source = source.replace("threadgroup_barrier", "metal::threadgroup_barrier")
    x = np.arange(40, dtype=np.int32)
    for twice in (False, True):
        y = Buffer.empty((40,), "int32")
        kernel = Kernel(source, "swap", constants={"twice": twice})
        size = {"grid": (40, 1, 1), "threadgroup": (40, 1, 1)}
        kernel({0: Buffer.of(x), 1: y}, threadgroup_bytes={0: 160}, **size)
        assert (y.array() == x[::-1] * (1 + twice)).all()
    with pytest.raises(EmulatorError, match=r"argument 'shared' \(0\) has no size: give"):
        kernel({0: Buffer.of(x), 1: y}, **size)
    with pytest.raises(EmulatorError, match=r"no threadgroup argument 1; it has shared \(0\)"):
        kernel({0: Buffer.of(x), 1: y}, threadgroup_bytes={0: 160, 1: 4}, **size)
    with pytest.raises(EmulatorError, match=r"function constant 'twice', which has no value"):
        Kernel(source, "swap")
    with pytest.raises(EmulatorError, match="no function constant thrice; the source has twice"):
        Kernel(source, "swap", constants={"thrice": 1})


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        (
            {"x": Buffer.of(X.astype(np.float16))},
            r"buffer 'x' \(0\): expected float32, got float16",
        ),
        (
            {"n": Buffer.of(np.array([1, 2], np.uint32))},
            r"'n' \(2\): expected one value of 4 bytes, got 8",
        ),
        ({"n": Buffer.of(np.array(1, np.int32))}, r"'n' \(2\): expected uint32, got int32"),
        ({"z": Buffer.of(X)}, r"has no buffer 'z'; it has x \(0\), y \(1\), n \(2\)"),
    ],
)
def test_wrong_buffers(buffers: dict, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run(buffers=buffers)


def test_a_buffer_too_small_is_named_in_both_modes() -> None:
    small = {"x": Buffer.of(X[:, :-1])}
    with pytest.raises(
        KernelFault,
        match=r"sum.metal:10: .* load of 4 bytes at byte 19980 of buffer 'x', which has 19980",
    ):
        run(buffers=small)
    far = {"n": Buffer.of(np.array(COLUMNS * 40, np.uint32))}
    with pytest.raises(KernelFault, match=r"row_sum.metal:10: out-of-bounds .* of buffer 'x'"):
        run(buffers=far, mode=Mode.PLAIN)


def test_unbound_buffer_and_wrong_arguments() -> None:
    kernel = Kernel(SOURCE, "row_sum<float>")
    sizes = {"grid": (128, 1, 1), "threadgroup": (128, 1, 1)}
    with pytest.raises(KernelFault, match="null pointer: no buffer is bound there"):
        kernel({"y": Buffer.empty((1,), "float32"), "n": Buffer.of(np.uint32(3))}, **sizes)
    with pytest.raises(ValueError, match="order 'sideways': expected 'forward' or 'reverse'"):
        run(order="sideways")
    with pytest.raises(ValueError, match="threadgroups=0: expected at least 1"):
        run(threadgroups=0)
    with pytest.raises(ValueError, match="check 'luck' cannot be allowed; these can: uninit"):
        run(allow=["luck"])
    with pytest.raises(ValueError, match="check 'out-of-bounds' cannot be allowed"):
        run(allow=["out-of-bounds"])
    with pytest.raises(ValueError, match=r"grid \(0, 1, 1\), threadgroup .*: sizes start at 1"):
        run(grid=(0, 1, 1))
    with pytest.raises(EmulatorError, match="kernel 'col_sum' not found; the source has row_sum"):
        Kernel(SOURCE, "col_sum")
    with pytest.raises(ValueError, match="no buffer 'z'; there are x, y, n"):
        run()[1].traffic("z")
    with pytest.raises(ValueError, match="buffer of dtype 'float64': Metal has bool"):
        Buffer.of(np.zeros(3))


def test_a_read_only_buffer_may_be_bound_to_a_writable_parameter() -> None:
    y = Buffer.of(np.zeros(ROWS, np.float32), read_only=True)
    with pytest.raises(KernelFault, match=r"row_sum.metal:14: read-only .* 'y'"):
        run(buffers={"y": y})


def test_a_thread_has_a_limited_stack() -> None:
    source = """#line 1 "deep.metal"
    kernel void deep(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
      volatile int large[40000];
      large[i] = 3;
      y[i] = large[i];
    }"""
    with pytest.raises(
        KernelFault, match=r"kernel .deep.: the thread needs more than 114688 bytes of stack"
    ):
        Kernel(source, "deep")(
            {"y": Buffer.empty((1,), "int32")}, grid=(1, 1, 1), threadgroup=(1, 1, 1)
        )


def test_allowed_divergence_goes_on_and_is_no_finding() -> None:
    """Lanes that returned before a barrier, and halves that take different simd operations."""
    source = """
    kernel void part(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
      if (i >= 48) return;
      int n = i % 32 < 16 ? metal::simd_sum(1) : metal::simd_max(7);
      metal::threadgroup_barrier(metal::mem_flags::mem_none);
      y[i] = n;
    }"""
    y = Buffer.empty((48,), "int32")
    size = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
    kernel = Kernel(source, "part")
    with pytest.raises(KernelFault, match=r"divergent-simd .* reached by lanes 0000ffff"):
        kernel({"y": y}, **size)
    report = kernel({"y": y}, allow=["divergent-simd", "divergent-barrier"], **size)
    assert not report.findings
    assert y.array().tolist() == [16] * 16 + [7] * 16 + [16] * 16


@pytest.mark.parametrize(
    ("stride", "sectors", "lines", "conflicts"),
    [(1, 4, 1, 0), (2, 8, 2, 1), (8, 32, 8, 7), (33, 32, 32, 0)],
)
def test_strides_cost_sectors_lines_and_banks(
    stride: int, sectors: int, lines: int, conflicts: int
) -> None:
    """32 lanes, 4 bytes each, `stride` words apart, in device and in threadgroup memory."""
    source = f"""#line 1 "stride.metal"
    kernel void strided(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {{
      threadgroup float shared[{32 * 33}];
      shared[i * {stride}] = x[i * {stride}];
      y[i] = shared[i * {stride}];
    }}"""
    x = Buffer.of(np.zeros(32 * 33, np.float32))
    size = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
    report = Kernel(source, "strided")({"x": x, "y": Buffer.empty((32,), "float32")}, **size)
    load = report.lines["stride.metal", 4]
    assert (load.loads, load.load_bytes, load.load_lanes) == (1, 128, 32)
    assert (load.load_sectors, load.load_lines128) == (sectors, lines)
    assert report.traffic("x").distinct_sectors == sectors
    assert load.bank_conflicts == conflicts
    total = report.totals()
    assert (total.store_bytes, total.store_sectors, total.store_lines128) == (128, 4, 1)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("access", "found"),
    [
        (
            "y[i] = *(device const float*)(x + 4 * i + 1);",
            r"of 'x' is no multiple of 4, as .*float",
        ),
        (
            "float4 v = *(device const float4*)(x + 4); y[i] = v.w;",
            r"byte 4 of 'x' is no multiple of 16",
        ),
    ],
)
def test_a_misaligned_access_ends_the_launch(access: str, found: str, order: Any) -> None:
    """Gone on with, it crashed: the compiler may have made an instruction that needs alignment."""
    source = f"""#line 1 "k.metal"
kernel void k(device const char* x, device float* y, uint i [[thread_position_in_grid]]) {{
  {access}
}}
"""
    buffers = {"x": Buffer.of(np.zeros(260, np.int8)), "y": Buffer.empty((64,), "float32")}
    with pytest.raises(KernelFault, match=rf"k.metal:2: misaligned in kernel 'k': .*{found}") as e:
        Kernel(source, "k")(buffers, grid=(64, 1, 1), threadgroup=(64, 1, 1), order=order)
    assert [(f.check, f.buffer) for f in e.value.report.findings] == [("misaligned", "x")]
