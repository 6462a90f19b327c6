"""What a machine says of itself, in the formats that macOS prints; and Apple's chips."""

import json
import platform

import pytest

from mlx_gptoss import machine
from mlx_gptoss.chips import CHIPS, GIB, default_working_set_bytes, find_chip
from mlx_gptoss.errors import MachineError

M4_PRO = {
    ("sysctl", "-n", "iogpu.wired_limit_mb"): "0\n",
    ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M4 Pro\n",
    ("sysctl", "-n", "hw.model"): "Mac16,8\n",
    ("sysctl", "-n", "hw.physicalcpu"): "14\n",
    ("sysctl", "-n", "hw.memsize"): "25769803776\n",
    ("sw_vers", "-productVersion"): "26.2\n",
    ("system_profiler", "SPDisplaysDataType", "-json"): json.dumps(
        {
            "SPDisplaysDataType": [
                {
                    "_name": "kHW_AppleM4ProItem",
                    "spdisplays_mtlgpufamilysupport": "spdisplays_metal4",
                    "sppci_bus": "spdisplays_builtin",
                    "sppci_cores": "16",
                    "sppci_model": "Apple M4 Pro",
                }
            ]
        }
    ),
    ("pmset", "-g", "batt"): (
        "Now drawing from 'Battery Power'\n"
        " -InternalBattery-0 (id=22806627)\t80%; discharging; 5:21 remaining present: true\n"
    ),
    ("pmset", "-g"): (
        "System-wide power settings:\nCurrently in use:\n standby              1\n"
        " powernap             1\n lowpowermode         1\n sleep                1\n"
    ),
    ("pmset", "-g", "therm"): (
        "Note: No thermal warning level has been recorded\n"
        "Note: No performance warning level has been recorded\n"
        "Note: No CPU power status has been recorded\n"
    ),
}


@pytest.fixture
def on_a_mac(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine, "_metal_info", dict)


def test_a_mac(on_a_mac):
    found = machine.read_machine(M4_PRO.get)
    assert found == machine.Machine(
        system="Darwin",
        architecture="arm64",
        os_version="26.2",
        cpu="Apple M4 Pro",
        cpu_cores=14,
        model="Mac16,8",
        gpu_cores=16,
        memory_bytes=24 * GIB,
        power_source="Battery Power",
        low_power_mode=True,
        thermal_pressure="nominal",
    )
    assert found.chip is not None and found.chip.bandwidth_gb_per_s == 273
    assert found.gpu_limit_bytes == 16 * GIB


def test_metal_wins_over_the_limit_set_by_hand_and_that_over_the_default(on_a_mac, monkeypatch):
    raised = {**M4_PRO, ("sysctl", "-n", "iogpu.wired_limit_mb"): "20480\n"}
    assert machine.read_machine(raised.get).gpu_limit_bytes == 20 * GIB
    metal = {"max_recommended_working_set_size": 19 * GIB, "architecture": "applegpu_g16s"}
    monkeypatch.setattr(machine, "_metal_info", lambda: metal)
    found = machine.read_machine(raised.get)
    assert (found.gpu_limit_bytes, found.gpu_architecture) == (19 * GIB, "applegpu_g16s")


@pytest.mark.parametrize("answer", [None, "", "\n", "no such key\n", "{}", "[]", "null", "{"])
def test_nothing_readable_is_none_and_never_an_error(on_a_mac, answer):
    found = machine.read_machine(lambda command: answer)
    assert (found.memory_bytes, found.gpu_cores, found.power_source) == (None, None, None)
    assert (found.chip, found.gpu_limit_bytes, found.low_power_mode) == (None, None, None)


@pytest.mark.parametrize(
    "output, pressure",
    [
        ("CPU_Scheduler_Limit\t= 100\nCPU_Speed_Limit \t= 78\n", "speed limited to 78 %"),
        ("2026-08-20 05:08:37 -0700 CPU Power notify\n\tCPU_Speed_Limit \t= 100\n", "nominal"),
        ("Note: Thermal warning level 1 recorded\n", "Note: Thermal warning level 1 recorded"),
    ],
)
def test_thermal_pressure(on_a_mac, output, pressure):
    outputs = {**M4_PRO, ("pmset", "-g", "therm"): output}
    assert machine.read_machine(outputs.get).thermal_pressure == pressure


@pytest.mark.parametrize(
    "output, pressure",
    [
        ("com.apple.system.thermalpressurelevel 0\n", "nominal"),
        ("com.apple.system.thermalpressurelevel 2\n", "heavy"),
        ("com.apple.system.thermalpressurelevel 7\n", "level 7"),
        ("notifyutil: no such key\n", "nominal"),  # pmset knows
    ],
)
def test_thermal_pressure_as_thermald_publishes_it(on_a_mac, output, pressure):
    level = ("notifyutil", "-g", "com.apple.system.thermalpressurelevel")
    assert machine.read_machine({**M4_PRO, level: output}.get).thermal_pressure == pressure


@pytest.mark.parametrize(
    "output, pressure",
    [
        ("1\n", "normal"),
        ("2\n", "warning"),
        ("4\n", "critical"),
        ("3\n", "level 3"),
        ("", None),
        (None, None),
    ],
)
def test_memory_pressure(output, pressure):
    level = ("sysctl", "-n", "kern.memorystatus_vm_pressure_level")
    assert machine.read_memory_pressure({level: output}.get) == pressure


@pytest.mark.parametrize("mode, low", [("0", False), ("1", True), ("2", False)])
def test_power_modes_of_newer_machines(on_a_mac, mode, low):
    outputs = {**M4_PRO, ("pmset", "-g"): f"Currently in use:\n powermode            {mode}\n"}
    assert machine.read_machine(outputs.get).low_power_mode is low


def test_this_machine():
    found = machine.read_machine()
    assert found.system == platform.system()
    assert found.gpu_limit_bytes is not None and found.gpu_limit_bytes > 2**28


def test_commands_that_cannot_run():
    assert machine.run_command(("no-such-program-here",)) is None
    assert machine.run_command(("false",)) is None
    assert machine.run_command(("echo", "yes")) == "yes\n"


def test_every_chip_is_found_by_its_name_cores_and_memory():
    for chip in CHIPS:
        for cores in chip.gpu_cores:
            assert find_chip(f"Apple {chip.name}", gpu_cores=cores) == chip
        if chip.name == "M3 Max":
            assert find_chip("m3 MAX", memory_bytes=96 * GIB).bandwidth_gb_per_s == 300
    assert {chip.generation for chip in CHIPS} == {1, 2, 3, 4, 5}


def test_unknown_chip():
    with pytest.raises(MachineError, match=r"chip: expected one of M1, M1 Pro.*; got 'M9'"):
        find_chip("M9")


@pytest.mark.parametrize("gib, limit_mib", [(16, 10922), (24, 16384), (32, 21845), (64, 49152)])
def test_default_limits_are_those_that_macs_report(gib, limit_mib):
    assert default_working_set_bytes(gib * GIB) // 2**20 == limit_mib
