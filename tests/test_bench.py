"""Measurements: what is in a record, how records compare, and what limits they are held against."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import TinyShape, write_checkpoint

from mlx_gptoss import bench as benchmark
from mlx_gptoss import machine
from mlx_gptoss.bench import OURS, PEER, Run, file_name
from mlx_gptoss.bench_report import as_html
from mlx_gptoss.bench_runs import named_arrays
from mlx_gptoss.bench_text import as_csv, as_markdown, difference, read_record
from mlx_gptoss.chips import CHIPS, find_chip
from mlx_gptoss.cli import main
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import BenchmarkError
from mlx_gptoss.machine import Machine
from mlx_gptoss.plan import dense_quantization
from mlx_gptoss.roofline import bytes_per_token, limit_tok_per_s, predicted_tok_per_s

SMALL = TinyShape(layers=2, hidden=128, inter=96, q_heads=6, kv_heads=3, experts=9, vocab=640)
M4_PRO = Machine(
    system="Darwin",
    architecture="arm64",
    os_version="26.2",
    cpu="Apple M4 Pro",
    gpu_cores=20,
    memory_bytes=48 * 2**30,
    power_source="AC Power",
    thermal_pressure="nominal",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    convert_checkpoint(write_checkpoint(folder / "source", shape=SMALL), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def record(converted):
    return benchmark.bench(
        "tiny",
        converted,
        machine=M4_PRO,
        depths=[5, 140],
        answer=3,
        repeats=2,
        compare=True,
    )


def test_the_record_is_complete(record):
    assert [(r["engine"], r["depth"]) for r in record["results"]] == [
        (OURS, 5),
        (PEER, 5),
        (OURS, 140),
        (PEER, 140),
    ]
    for result in record["results"]:
        for metric in benchmark.METRICS:
            runs = result[metric]["runs"]
            assert len(runs) == 2 and min(runs) > 0
            assert min(runs) <= result[metric]["median"] <= max(runs)
        assert result["peak_memory_bytes"] > record["model"]["nbytes"]
        share = result["decode_tok_per_s"]["median"] / result["limit_tok_per_s"]
        assert result["share_of_limit"] == share
    assert record["cold"]["load_s"] > 0 and record["cold"]["ttft_s"] > 0
    assert record["machine"]["cpu"] == "Apple M4 Pro"
    assert {"mlx", "mlx-lm", "mlx-gptoss", "kernels"} <= set(record["software"])
    assert len(record["model"]["digest"]) == 64
    json.dumps(record)


def test_the_peer_has_the_same_weights_and_answers_alike(converted):
    """mlx-lm on our arrays continues a prompt as it does when it loads the folder itself."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model = benchmark.load_model(converted)
    ours = benchmark.PeerRunner(converted, model)
    theirs, _ = load_model(converted)
    prompt = mx.array(benchmark.sample_prompt(model.config, 20))
    tokens = [
        [int(token) for token, _ in generate_step(prompt, peer, max_tokens=5)]
        for peer in (ours._model, theirs)
    ]
    assert tokens[0] == tokens[1]
    assert ours._model.parameters()["model"]["norm"]["weight"] is model.norm


@pytest.mark.parametrize("dense", ["bf16", "q4"])
def test_named_arrays_are_the_files(tmp_path, dense):
    import mlx.core as mx

    source = write_checkpoint(tmp_path / "source", shape=SMALL)
    convert_checkpoint(source, tmp_path / "model", dense=dense)
    stored = benchmark.open_checkpoint(tmp_path / "model").load()
    named = named_arrays(benchmark.load_model(tmp_path / "model"))
    assert named.keys() == stored.keys()
    assert all(mx.array_equal(named[name], stored[name]) for name in named)


def test_engines_run_in_turn(converted, monkeypatch):
    """A B A B, the first round thrown away."""
    order: list[str] = []

    def runner(name: str):
        class Scripted:
            def __init__(self, *_):
                self.name, self.count = name, 0

            def run(self, prompt, answer):
                order.append(f"{name}{len(prompt)}")
                self.count += 1
                speed = float(self.count)
                return Run(
                    prefill_tok_per_s=speed,
                    decode_tok_per_s=speed,
                    ttft_s=speed,
                    peak_memory_bytes=7,
                )

        return Scripted

    monkeypatch.setattr(benchmark, "OurRunner", runner(OURS))
    monkeypatch.setattr(benchmark, "PeerRunner", runner(PEER))
    ours = {"machine": M4_PRO, "depths": [9, 4], "answer": 2, "repeats": 2, "compare": True}
    record = benchmark.bench("x", converted, **ours)
    a, b = OURS, PEER
    assert order == [f"{a}9", *[f"{a}9", f"{b}9"] * 3, *[f"{a}4", f"{b}4"] * 3]
    decode = [r["decode_tok_per_s"]["runs"] for r in record["results"]]
    assert decode == [[3.0, 4.0], [2.0, 3.0], [6.0, 7.0], [5.0, 6.0]]
    assert record["ratios"][0] == {
        "depth": 9,
        "prefill_tok_per_s": 3.5 / 2.5,
        "decode_tok_per_s": 3.5 / 2.5,
    }


def test_text_forms(record):
    text = as_markdown(record)
    assert "Apple M4 Pro, 20 GPU cores, 48 GB, Darwin 26.2, AC Power, heat nominal" in text
    assert text.count("| mlx-lm |") == 2 and "ours over mlx-lm" in text
    rows = as_csv(record).splitlines()
    assert len(rows) == 5 and len({row.count(",") for row in rows}) == 1
    assert file_name(record) == "bench_m4-pro_48g_tiny.json"


def metric(*runs: float) -> dict:
    import statistics

    return {
        "median": statistics.median(runs),
        "mean": statistics.mean(runs),
        "sd": statistics.stdev(runs),
        "runs": list(runs),
    }


def made_up(*runs: float, depth: int = 512) -> dict:
    result = {name: metric(*runs) for name in benchmark.METRICS}
    return {"version": 1, "results": [{"engine": OURS, "depth": depth, **result}]}


def test_difference_knows_noise_from_change():
    rows = difference(made_up(10, 11, 12), made_up(10.2, 11.2, 12.2))
    assert [row["significant"] for row in rows] == [False] * 3
    rows = difference(made_up(10, 11, 12), made_up(20, 21, 22))
    assert [(row["significant"], row["ratio"]) for row in rows] == [(True, 21 / 11)] * 3


def test_records_with_nothing_in_common():
    with pytest.raises(BenchmarkError, match="no engine and depth in common"):
        difference(made_up(1, 2), made_up(1, 2, depth=513))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file"),
        ("{", "expected the JSON of `bench --save`"),
        ("[1]", "expected a record of version 1, got None; measure again"),
        ('{"version": 99}', "expected a record of version 1, got 99; measure again"),
    ],
)
def test_damaged_records(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_record(path)


def test_bytes_of_a_token_by_hand():
    """20b in bf16 reads 3.71 GB a token: 4 of 32 experts, and everything else but the embedding."""
    packing = dense_quantization(GPT_OSS_20B, "bf16")
    weights, kv = bytes_per_token(GPT_OSS_20B, packing, depth=1024)
    assert weights == pytest.approx(3.708e9, rel=1e-3)
    assert kv == 12 * 2048 * 1024 + 12 * 2048 * 128
    q8 = dense_quantization(GPT_OSS_120B, "q8")
    assert bytes_per_token(GPT_OSS_120B, q8, depth=1)[0] == pytest.approx(3.565e9, rel=1e-3)


def test_predictions_stay_below_limits_and_grow_with_the_chip():
    packing = dense_quantization(GPT_OSS_20B, "bf16")
    for chip in CHIPS:
        speeds = [predicted_tok_per_s(GPT_OSS_20B, packing, chip, depth=d) for d in (64, 8192)]
        limits = [limit_tok_per_s(GPT_OSS_20B, packing, chip, depth=d) for d in (64, 8192)]
        assert speeds[1] < speeds[0] < limits[0] and speeds[1] < limits[1]
        assert speeds[0] > 0.4 * limits[0]
    small, large = (
        predicted_tok_per_s(GPT_OSS_20B, packing, find_chip(name), depth=1024)
        for name in ("M4", "M4 Max")
    )
    assert 3 < large / small < 546 / 120


def test_the_command(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "read_machine", lambda: M4_PRO)
    few = ["--depths", "4,6", "--answer", "2", "--repeats", "2", "--format", "json"]
    arguments = ["bench", str(converted), *few, "--save", str(tmp_path / "results")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    saved = tmp_path / "results" / "bench_m4-pro_48g_model.json"
    assert json.loads(saved.read_text()) == record
    assert f"saved {saved}" in result.stderr
    assert record["model"]["name"] == "model" and str(converted) not in saved.read_text()
    result = CliRunner().invoke(main, ["bench", "diff", str(saved), str(saved)])
    assert result.exit_code == 0 and result.stdout.count("within the spread") == 6
    wrong = CliRunner().invoke(main, ["bench", str(converted), "--depths", "0,x"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("Error: --depths: expected lengths such as 512,2048, got '0,x'")


def measured_on_a_mac(*, depth: int, decode: float, layers: int = 24, experts: int = 32) -> dict:
    """A made-up record of the 20b on an M4 Pro."""
    result = made_up(decode, decode, depth=depth)["results"][0]
    result |= {"share_of_limit": 0.7, "peak_memory_bytes": 15e9}
    return {
        "version": 1,
        "date": "2026-11-21T20:00:00+00:00",
        "machine": {"cpu": "Apple M4 Pro", "architecture": "arm64"},
        "model": {
            "name": "<20b>",
            "layers": layers,
            "hidden": 2880,
            "experts": experts,
            "dense": "bf16",
        },
        "results": [result],
    }


def test_the_report_shows_measurements_beside_predictions(record):
    from xml.etree import ElementTree

    mine = measured_on_a_mac(depth=1024, decode=51.5)
    page = as_html([record, mine])
    assert "2 records." in page and "&lt;20b&gt;" in page and "<20b>" not in page
    assert page.count("mlx-gptoss, depth 1024: 51.5 tok/s") == 2  # by chip and by depth
    assert "http" not in page.lower().replace('charset="utf-8"', "")  # nothing is fetched
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    assert "depth 1024" not in as_html([measured_on_a_mac(depth=1024, decode=9, layers=2)]).split(
        "Everything"
    )[0].replace("depth 1024, tokens/s", "")
    assert "0 records." in as_html([])


def test_the_report_command(tmp_path):
    path, page = tmp_path / "a.json", tmp_path / "page.html"
    path.write_text(json.dumps(measured_on_a_mac(depth=2048, decode=40)))
    result = CliRunner().invoke(main, ["bench", "report", str(path), "-o", str(page)])
    assert result.exit_code == 0 and result.stdout.strip() == str(page)
    assert "depth 2048: 40 tok/s" in page.read_text()
