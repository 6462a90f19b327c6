"""Address spaces: what erasing them hides, the strict compilation finds at its line."""

import mlx.core as mx
import pytest

from mlx_gptoss.metal.emulator import CompileError, check_strict, emulate
from tests.emulator.row_sum import SOURCE
from tests.emulator.test_standin import HEADER, call

HELPER = "inline float first(const device float* p) { return p[0]; }\n"


def mutate(line: str) -> str:
    """SOURCE with a statement in line 9, where the kernel's body begins."""
    assert "float sum = 0;" in SOURCE
    source = SOURCE.replace("float sum = 0;", f"float sum = 0; {line}")
    return source.replace("using namespace metal;", f"using namespace metal; {HELPER[:-1]}")


def test_accepts_correct_kernels() -> None:
    check_strict(SOURCE, "row_sum<float>")
    check_strict(mutate("sum += first(y); threadgroup float* p = part;"), "row_sum<half>")


@pytest.mark.parametrize(
    "line",
    [
        "device float* p = part;",
        "threadgroup float* p = y;",
        "thread float* p = y;",
        "float* p = y;",
        "device T* p = x;",
        "n = 3;",
        "sum += first(part);",
        "sum += first(&sum);",
    ],
)
def test_rejects_wrong_spaces(line: str) -> None:
    with pytest.raises(CompileError, match=r"row_sum.metal:9:\d+: error: "):
        check_strict(mutate(line), "row_sum<float>")


def test_takes_what_mlx_generated() -> None:
    with emulate() as session:
        call()
    ((function, text),) = session.sources.items()
    assert "rms" in function
    check_strict(text)
    wrong = HEADER.replace("threadgroup float* part", "device float* part")
    with emulate() as session:
        call(wrong)  # the emulator erases address spaces and cannot tell
    with pytest.raises(CompileError, match="no matching function for call to 'rms'"):
        check_strict(next(iter(session.sources.values())))


def test_a_small_input_is_constant() -> None:
    """MLX passes inputs of less than 8 elements as `constant`: `device` would not compile."""
    wrong = HEADER.replace("typename T, typename E", "typename T").replace(
        "E eps", "const device float* eps"
    )
    with emulate() as session:
        call(wrong, dtype=mx.float16)
    with pytest.raises(CompileError, match="no matching function for call to 'rms'"):
        check_strict(next(iter(session.sources.values())))
