"""A machine, and records of measurements that nobody made."""

import dataclasses

from mlx_gptoss.bench import METRICS, OURS, VERSION, summary
from mlx_gptoss.machine import Machine

M4_PRO = Machine(
    system="Darwin",
    architecture="arm64",
    os_version="26.2",
    cpu="Apple M4 Pro",
    cpu_cores=14,
    gpu_cores=20,
    memory_bytes=48 * 2**30,
    wired_limit_bytes=40 * 2**30,
    power_source="AC Power",
    low_power_mode=True,
    thermal_pressure="heavy",
)


def made_up(*runs: float, depth: int = 512, batch: int = 1) -> dict:
    result = {name: summary(runs) for name in METRICS}
    case = {"engine": OURS, "depth": depth, "batch": batch}
    return {"version": VERSION, "results": [{**case, **result}]}


def measured_on_a_mac(*, depth: int, decode: float, layers: int = 24, experts: int = 32) -> dict:
    """A made-up record of the 20b on an M4 Pro."""
    result = made_up(decode, decode, depth=depth)["results"][0]
    result |= {"share_of_limit": 0.7, "limit_tok_per_s": 73.0, "peak_memory_bytes": 15e9}
    model = {"name": "<20b>", "digest": None, "layers": layers, "hidden": 2880, "experts": experts}
    return {
        "benchmark": "bench",
        "version": 2,
        "date": "2026-11-21T20:00:00+00:00",
        "machine": dataclasses.asdict(M4_PRO),
        "meanwhile": {"load_average": [1.0, 2.0], "thermal_pressure_after": "heavy"},
        "software": {"mlx": "0.32.4"},
        "settings": {"answer": 64},
        "model": model | {"dense": "bf16", "nbytes": 13_800_000_000},
        "results": [result | {"dispatches": {"per_step": 159, "in_a_chain": 159}}],
    }
