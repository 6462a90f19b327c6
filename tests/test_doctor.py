"""The diagnosis: one line of advice a problem, and an end whatever goes wrong."""

import json
import platform
from dataclasses import replace

import pytest
from click.testing import CliRunner
from tiny import write_checkpoint

from mlx_gptoss import doctor
from mlx_gptoss.chips import GIB
from mlx_gptoss.cli import main
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.doctor import Finding, Status, diagnose
from mlx_gptoss.kernels import selection
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.machine import Machine

MAC = Machine(
    system="Darwin",
    architecture="arm64",
    os_version="26.2",
    cpu="Apple M5 Max",
    model="Mac17,7",
    gpu_cores=40,
    memory_bytes=64 * GIB,
    working_set_bytes=48 * GIB,
    gpu_architecture="applegpu_g17s",
    power_source="AC Power",
    low_power_mode=False,
    thermal_pressure="nominal",
)


@pytest.fixture
def metal(monkeypatch, tmp_path):
    """MLX as if on a Mac; returns the file that stands for its Metal library."""
    import mlx.core as mx

    monkeypatch.setattr(selection, "checked", lambda *_, **__: {})  # every kernel agrees
    library = tmp_path / "mlx.metallib"
    library.write_bytes(b"MTLB" + b"x" * 5000 + b"steel_gemm_fused_nax_nt" + b"y" * 99)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_metal_library", lambda: library)
    return library


def find(machine: Machine, name: str, **options) -> Finding:
    return next(finding for finding in diagnose(machine, **options) if finding.name == name)


def test_a_mac_in_order(metal):
    findings = {finding.name: finding for finding in diagnose(MAC)}
    assert findings["machine"].value == "Apple M5 Max, 40 GPU cores, 64 GB, 614 GB/s"
    assert findings["memory"].value == "the GPU may use 51.5 GB: 20b fits, up to 131072 tokens"
    assert findings["matrix units"].value.startswith("used")
    assert findings["power"].value == "AC Power, heat nominal"
    bad = [f for f in findings.values() if f.status is not Status.OK]
    assert [f.name for f in bad if f.name not in ("model", "disk")] == []


@pytest.mark.parametrize(
    "change, name, status, advice",
    [
        ({"architecture": "x86_64"}, "machine", "problem", "install Python for arm64"),
        ({"cpu": "Apple M9"}, "machine", "note", "not in our table"),
        ({"os_version": "13.6.1"}, "system", "problem", "update to macOS 14 or newer"),
        ({"os_version": "26.1"}, "matrix units", "note", "update macOS"),
        ({"working_set_bytes": 11 * 10**9, "memory_bytes": 16 * GIB}, "memory", "note", "--dense"),
        ({"working_set_bytes": None, "memory_bytes": None}, "memory", "note", "--memory 16G"),
        ({"low_power_mode": True}, "power", "note", "low-power mode is on"),
        ({"power_source": "Battery Power"}, "power", "note", "plug in"),
        ({"thermal_pressure": "speed limited to 70 %"}, "power", "note", "let it cool"),
        ({"system": "Linux", "cpu": None}, "machine", "note", "no Mac"),
    ],
)
def test_advice(metal, change, name, status, advice):
    finding = find(replace(MAC, **change), name)
    assert finding.status == status
    assert finding.advice is not None and advice in finding.advice and "\n" not in finding.advice


def test_a_build_of_mlx_without_matrix_units(metal):
    metal.write_bytes(b"MTLB" + b"steel_gemm_fused_nt" * 100)
    assert "pip install mlx" in (find(MAC, "matrix units").advice or "")


def test_a_gpu_without_matrix_units_reads_no_library(metal):
    metal.unlink()
    finding = find(replace(MAC, gpu_architecture="applegpu_g16s"), "matrix units")
    assert (finding.status, finding.advice) == (Status.OK, None)


def test_mlx_without_metal_on_a_mac():
    assert "pip install --force-reinstall mlx" in (find(MAC, "mlx").advice or "")


def test_a_check_that_fails_does_not_end_the_others(metal, monkeypatch):
    def broken():
        raise ZeroDivisionError("no disk")

    monkeypatch.setattr(doctor, "_disk", broken)
    metal.unlink()
    findings = {finding.name: finding for finding in diagnose(MAC)}
    assert findings["disk"].value == "could not be checked: ZeroDivisionError: no disk"
    assert findings["mlx"].value.startswith("could not be checked: FileNotFoundError")
    assert "model" in findings


def test_models_of_the_store_and_of_the_hub_cache(tmp_path, isolated_home):
    source = write_checkpoint(tmp_path / "source", layers=2)
    store, hub = isolated_home / ".cache" / "mlx-gptoss", tmp_path / "hub"
    for folder in (store, hub):
        folder.mkdir(parents=True)
    convert_checkpoint(source, store / "gpt-oss-20b")
    snapshots = hub / "models--mlx-community--gpt-oss-20b-MXFP4-Q8" / "snapshots"
    snapshots.mkdir(parents=True)
    convert_checkpoint(source, snapshots / "abc")
    (snapshots / "abc" / "mlx_gptoss.json").unlink()
    write_checkpoint(hub / "models--openai--gpt-oss-20b" / "snapshots" / "def", layers=2)
    (hub / "models--someone--gpt-oss-broken" / "snapshots" / "0").mkdir(parents=True)
    (store / "emulator").mkdir()
    (hub / "models--someone--llama" / "snapshots" / "1").mkdir(parents=True)
    found = [f for f in diagnose(MAC, hub_cache=hub) if f.name == "model"]
    assert [f.value.split(":")[0] for f in found] == [
        "gpt-oss-20b",
        "mlx-community/gpt-oss-20b-MXFP4-Q8",
        "openai/gpt-oss-20b",
        "someone/gpt-oss-broken",
    ]
    assert found[0].value.endswith("converted by us")
    assert found[1].value.endswith("another tool: no hashes")
    assert "run `mlx-gptoss convert" in (found[2].advice or "")
    assert "mlx-gptoss download someone/gpt-oss-broken" in (found[3].advice or "")


def test_no_model_yet(tmp_path):
    assert "mlx-gptoss download 20b" in (find(MAC, "model", hub_cache=tmp_path).advice or "")


def test_the_command_here():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    facts = json.loads(result.output)
    assert facts["machine"]["system"] == platform.system()
    assert {"machine", "system", "mlx", "memory", "kernels", "disk", "model"} <= {
        finding["name"] for finding in facts["findings"]
    }
    text = CliRunner().invoke(main, ["doctor"])
    assert text.exit_code == result.exit_code
    assert "kernels" in text.output and "\x1b" not in text.output


def test_a_problem_is_exit_1(monkeypatch):
    problem = [Finding(name="x", value="y", status=Status.PROBLEM, advice="z")]
    monkeypatch.setattr(doctor, "diagnose", lambda machine: problem)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1 and "PROBLEM x" in result.output


def test_kernels_are_named_with_their_reasons(metal, monkeypatch):
    reasons = {"route": "it failed: no library", "embed": "it differs by 9 times the tolerance"}
    monkeypatch.setattr(selection, "checked", lambda *_, **__: reasons)
    found = [f for f in diagnose(MAC) if f.name == "kernels"]
    used = ", ".join(stem for stem in KERNELS if stem not in reasons)
    assert [f.value for f in found] == [
        f"{len(KERNELS) - 2} of {len(KERNELS)} are used: {used}",
        "route runs as plain MLX: it failed: no library",
        "embed runs as plain MLX: it differs by 9 times the tolerance",
    ]
    assert all(f.advice and "report this line" in f.advice for f in found[1:])
