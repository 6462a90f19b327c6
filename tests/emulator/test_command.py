"""`python -m mlx_gptoss.metal.emulator` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.metal.emulator.__main__ import main
from tests.emulator.row_sum import SOURCE

BOUND = ["x[5,1000]", "y[5]", "n=1000", "--grid", "640", "--threadgroup", "128"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "row_sum.metal"
    path.write_text(SOURCE.replace('#line 1 "row_sum.metal"\n', ""))
    return str(path)


def test_a_clean_kernel(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "row_sum<float>", *BOUND, "--strict"]) == 0
    out = capsys.readouterr().out
    assert "row_sum<float>, forward order: 5 of 5 threadgroups" in out
    assert "row_sum<float>, reverse order: 5 of 5 threadgroups" in out
    assert "threadgroup memory 16 bytes" in out
    assert "x: 20000 bytes requested, 625 sectors and 253 lines touched, 625 distinct" in out
    assert "row_sum.metal:10" in out


def test_json_sampling_and_ptx(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--json", "--threadgroups", "2", "--order", "forward"]
    assert main([file, "row_sum<bfloat>", *BOUND, *more]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["threadgroups_run"] == 2
    assert record["buffer_traffic"]["x"]["bytes_requested"] == 2 * 1000 * 2
    assert main([file, "row_sum<half>", *BOUND, "--ptx"]) == 0
    assert "stack 0 bytes" in capsys.readouterr().out


def test_faults_exit_with_1(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "row_sum<float>", "x[5,999]", *BOUND[1:]]) == 1
    assert (
        "FAULT row_sum.metal:10: out-of-bounds in kernel 'row_sum<float>'"
        in capsys.readouterr().out
    )


def test_atomics_need_a_buffer_of_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parent / "metal" / "scan.metal")
    outputs = ["x[512]", "sums[512]", "back[512]", "steps[512]"]
    size = ["--grid", "512", "--threadgroup", "256"]
    assert main([file, "scan", *outputs, "total[1]=0", *size]) == 0
    capsys.readouterr()
    assert main([file, "scan", *outputs, *size]) == 1
    wanted = (
        "FAULT scan.metal:32: invalid-access in kernel 'scan': null pointer: no buffer is bound"
    )
    assert wanted in capsys.readouterr().out


def test_buffers_from_files_and_values(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 1000), np.float32))
    assert main([file, "row_sum<float>", f"x=@{tmp_path}/x.npy", *BOUND[1:]]) == 0
    assert main([file, "row_sum<float>", "x[5,1000]=2.5", *BOUND[1:]]) == 0
    capsys.readouterr()
    for buffer, message in [
        ("x", "buffer 'x': expected name[shape], name=value or name=@file.npy"),
        ("z[3]", "buffer 'z[3]': the kernel has x, y, n"),
        ("x=@none.npy", "none.npy: not a .npy file"),
    ]:
        assert main([file, "row_sum<float>", buffer, *BOUND[1:]]) == 1
        assert message in capsys.readouterr().err


def test_constants_and_includes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc" / "scale.h").write_text("constant float scale [[function_constant(0)]];\n")
    path = tmp_path / "k.metal"
    path.write_text(
        '#include <metal_stdlib>\n#include "scale.h"\n'
        "kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n"
        "  y[i] = scale;\n}\n"
    )
    arguments = [str(path), "k", "y[4]", "--grid", "4"]
    assert main(arguments) == 1
    assert "k.metal:2: included file 'scale.h' not found" in capsys.readouterr().err
    assert main([*arguments, "--include", f"{tmp_path}/inc", "--constant", "scale=2.5"]) == 0
    assert main([str(tmp_path / "none.metal"), "k"]) == 1
    assert "none.metal: cannot read Metal source: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "0"], "'0' is not X, X,Y or X,Y,Z"),
        (["--constant", "a=b"], "'a=b' is not NAME=VALUE"),
        (["--order", "random"], "invalid choice: 'random'"),
    ],
)
def test_usage_mistakes_exit_with_2(
    arguments: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([file, "row_sum<float>", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
