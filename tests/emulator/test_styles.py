"""Kernels as other projects write them, through the command's own way in."""

from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import Buffer, Kernel, check_strict, read_metal
from mlx_gptoss.metal.emulator.__main__ import main
from mlx_gptoss.metal.emulator.launch import Order

FILE = Path(__file__).parent / "metal" / "styles.metal"
ROWS, COLUMNS = 3, 20


@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize(("name", "dtype", "step"), [
    ("tinted_f32", "float32", 1), ("tinted_f16", "float16", 1), ("tinted_last", "float32", 2),
])  # fmt: skip
def test_styles_of_other_projects(name: str, dtype: str, step: int, first: int) -> None:
    x = np.random.default_rng(4).standard_normal((ROWS, COLUMNS, 3)).astype(np.float32)
    tint = np.array([0.5, -2, 3], np.float32)
    sizes = np.concatenate([np.array([COLUMNS], np.int32).view(np.uint8), tint.view(np.uint8)])
    y = Buffer.empty((ROWS, COLUMNS), dtype)
    constants = {} if first == 1 else {"skipped": first}
    Kernel(read_metal(FILE), name, constants=constants)(
        {"sizes": Buffer.of(sizes, dtype=""), "x": Buffer.of(x), "y": y},
        grid=(COLUMNS, ROWS, 1), threadgroup=(COLUMNS, 1, 1), threadgroup_bytes={0: 4 * COLUMNS},
    )  # fmt: skip
    wanted = np.roll(x @ tint + x[..., step] + 2.5, -first, axis=1)
    error = 2e-2 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(y.array(), wanted, rtol=0, atol=error)


HISTOGRAM = """
#include <metal_stdlib>
using namespace metal;
kernel void histogram(device const uchar* image, device atomic_uint* bins, constant uint& count,
                      uint i [[thread_position_in_grid]],
                      uint t [[thread_position_in_threadgroup]]) {
  threadgroup atomic_uint local[64];
  CLEAR
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i < count) atomic_fetch_add_explicit(&local[image[i] % 64], 1, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&bins[t], atomic_load_explicit(&local[t], memory_order_relaxed),
                            memory_order_relaxed);
}
"""
CLEAR = "atomic_store_explicit(&local[t], 0u, memory_order_relaxed);"


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_an_atomic_store_may_be_the_first_write(order: Order) -> None:
    """It was reported as a read of what nobody wrote: a false alarm in every histogram."""
    image = np.random.default_rng(1).integers(0, 256, 100, np.uint8)
    given = {"image": Buffer.of(image), "count": Buffer.of(np.array([100], np.uint32))}
    bins = Buffer.of(np.zeros(64, np.uint32))

    def run(clear: str) -> None:
        kernel = Kernel(HISTOGRAM.replace("CLEAR", clear), "histogram")
        kernel({**given, "bins": bins}, grid=(128, 1, 1), threadgroup=(64, 1, 1), order=order)

    run(CLEAR)
    np.testing.assert_array_equal(bins.array(), np.bincount(image % 64, minlength=64))
    with pytest.raises(EmulatorError, match="uninitialised-read"):
        run("")


def test_strict_knows_host_names() -> None:
    source = """
    template <typename T>
    kernel void k(device T* y, uint i [[thread_position_in_grid]]) { y[i] = 1; }
    template [[host_name("k_f32")]] kernel void k<float>(device float*, uint);
    """
    check_strict(source, "k_f32")


def test_threadgroup_arguments_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "sizes.npy", np.array([COLUMNS, 0, 0, 0], np.int32).view(np.uint8))
    given = [str(FILE), "tinted_f32", f"sizes=@{tmp_path}/sizes.npy", "x[60,3]", "y[60]"]
    given += ["--grid", "20,3", "--threadgroup", "20"]
    assert main([*given, "--threadgroup-bytes", "0=80"]) == 0
    assert "threadgroup memory 80 bytes" in capsys.readouterr().out
    assert main([*given, "--threadgroup-bytes", "0=76"]) == 1
    assert "styles.metal:20: out-of-bounds" in capsys.readouterr().out
    assert main(given) == 1
    wanted = "threadgroup argument 'memory' (0) has no size: give `threadgroup_bytes`, on the"
    assert wanted in capsys.readouterr().err
    assert main([str(FILE), "tinted_f64"]) == 1
    wanted = "'tinted_f64' not found; the source has tinted, tinted_f16, tinted_f32, tinted_last"
    assert wanted in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--threadgroup-bytes", "80"])
    assert "'80' is not INDEX=BYTES" in capsys.readouterr().err
