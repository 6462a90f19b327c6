"""Measurements: how they are made, what is in their record, and how it is shown."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
from bench_samples import M4_PRO, measured_on_a_mac
from click.testing import CliRunner
from tiny import TinyShape, write_checkpoint

from mlx_gptoss import bench as benchmark
from mlx_gptoss import machine
from mlx_gptoss._version import __version__
from mlx_gptoss.bench import OURS, PEER, Run, load_model, sample_prompt, summary
from mlx_gptoss.bench_plots import Curve, Point, over_depth
from mlx_gptoss.bench_record import file_name
from mlx_gptoss.bench_report import as_html
from mlx_gptoss.bench_runs import OurRunner, PeerRunner, named_arrays, peer_bytes
from mlx_gptoss.bench_text import as_csv, as_markdown, unlike
from mlx_gptoss.cli import main
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import MachineError
from mlx_gptoss.kernels.selection import all_kernels
from mlx_gptoss.plan import MemoryPlan, scratch_here

SMALL = TinyShape(layers=2, hidden=128, inter=96, q_heads=12, kv_heads=3, experts=12, vocab=640)


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
        depths=[140],
        batches=[1, 3],
        answer=3,
        repeats=2,
        compare=True,
    )


def planned(folder: Path, **asked: int) -> MemoryPlan:
    found = benchmark.open_checkpoint(folder)
    asked |= {"config": found.config, "packing": found.quantization, "scratch": scratch_here()}
    return MemoryPlan(**asked)


def test_the_record_is_complete(record):
    cases = [(r["depth"], r["batch"], r["engine"]) for r in record["results"]]
    assert cases == [*itertools.product([140], [1, 3], [OURS, PEER])]
    for result in record["results"]:
        for metric in benchmark.METRICS:
            runs = result[metric]["runs"]
            assert len(runs) == 2 and min(runs) > 0
            assert min(runs) <= result[metric]["median"] <= max(runs)
        assert result["peak_memory_bytes"] > record["model"]["nbytes"]
        share = result["decode_tok_per_s"]["median"] / result["limit_tok_per_s"]
        assert result["share_of_limit"] == share
        hidden = result["engine"] == PEER and result["batch"] > 1  # mlx-lm's batches
        assert hidden or result["dispatches"]["per_step"] > result["dispatches"]["in_a_chain"] > 20
        assert bool(result["dispatches"]) != hidden
    assert record["cold"]["load_s"] > 0 and record["cold"]["ttft_s"] > 0
    assert record["machine"]["cpu"] == "Apple M4 Pro"
    assert len(record["meanwhile"]["load_average"]) == 2
    assert {"mlx", "mlx-lm", "mlx-gptoss", "kernels"} <= set(record["software"])
    assert record["software"]["mlx-gptoss"].startswith(__version__)
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

            def run(self, prompts, answer, *, fed):
                order.append(f"{name}{len(prompts[0])}x{len(prompts)}")
                assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
                fed(len(prompts) * len(prompts[0]))
                self.count += 1
                speed = float(self.count)
                return Run(
                    prefill_tok_per_s=speed,
                    decode_tok_per_s=speed,
                    ttft_s=speed,
                    peak_memory_bytes=7,
                )

            def next_step(self):
                return None

        return Scripted

    monkeypatch.setattr(benchmark, "OurRunner", runner(OURS))
    monkeypatch.setattr(benchmark, "PeerRunner", runner(PEER))
    told: list[tuple[int, int]] = []
    record = benchmark.bench(
        "x",
        converted,
        machine=M4_PRO,
        depths=[9, 4],
        batches=[1, 2],
        answer=2,
        repeats=2,
        compare=True,
        progress=lambda _, done, total: told.append((done, total)),
    )
    turn = [f"{name}{case}" for case in ("9x1", "9x2", "4x1", "4x2") for name in (OURS, PEER)]
    assert order == [f"{OURS}9x1", *turn * 3]
    decode = [r["decode_tok_per_s"]["runs"] for r in record["results"]]
    assert decode[:3] == [[6.0, 10.0], [5.0, 9.0], [7.0, 11.0]]  # the first round is thrown away
    assert record["ratios"][0] == {
        "depth": 9,
        "batch": 1,
        **dict.fromkeys(benchmark.METRICS[:2], summary([6 / 5, 10 / 9])),
    }
    assert told == sorted(told) and told[0][0] == 9 and told[-1][0] == told[-1][1]


def test_what_does_not_fit_is_refused_before_it_is_loaded(converted):
    """On a Mac it would end in a restart."""
    tight = dataclasses.replace(M4_PRO, working_set_bytes=8_000_000)
    request = {"machine": tight, "depths": [8, 9000], "batches": [2], "answer": 3, "repeats": 1}
    with pytest.raises(
        MachineError,
        match=r"memory: mlx-gptoss at depth 9000 in batches of 2, with the weights, needs 0\.\d\d "
        r"GB, this machine lets 0.01 GB be used; measure less: --depths, --batch; or --embedding f",
    ):
        benchmark.bench("x", converted, **request)
    with pytest.raises(MachineError, match="batch: expected 1 to 16, got 17"):
        benchmark.bench("x", converted, **request | {"batches": [17]})
    with pytest.raises(
        MachineError, match=r"^depth 131070: expected at most 131069, so that an ans"
    ):
        benchmark.bench("x", converted, **request | {"depths": [131070]})


def test_what_the_peer_needs_is_planned_too(converted, monkeypatch):
    """Only our plan was looked at, and mlx-lm reads the prompts of all rows at once."""
    monkeypatch.setattr(benchmark, "load_model", lambda *_, **__: pytest.fail("loaded"))
    plan = planned(converted, context=603, batch=3)
    assert peer_bytes(plan) > plan.total_bytes
    tight = dataclasses.replace(M4_PRO, working_set_bytes=peer_bytes(plan) - 1)
    request = {"depths": [600], "batches": [3], "answer": 3, "repeats": 1, "machine": tight}
    with pytest.raises(
        MachineError, match=r"memory: mlx-lm at depth 600 in batches of 3.*; or leave out --compare"
    ):
        benchmark.bench("x", converted, compare=True, **request)
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        benchmark.bench("x", converted, **request)


@pytest.mark.parametrize("rows, depth", [(1, 700), (2, 256)])
def test_the_peak_of_the_peer_is_the_planned_one(converted, rows, depth):
    """Nearly all of it scratch here, whose coefficients are an upper bound for narrow models."""
    import mlx.core as mx

    model = load_model(converted)
    runner = PeerRunner(converted, model)
    prompts = [sample_prompt(model.config, depth + row)[row:] for row in range(rows)]
    mx.eval(model.arrays)
    before = mx.get_active_memory() - sum(array.nbytes for array in model.arrays)
    measured = runner.run(prompts, 3, fed=lambda _: None).peak_memory_bytes - before
    wanted = peer_bytes(planned(converted, context=depth + 3, batch=rows))
    assert 0.95 <= wanted / measured <= 1.2, f"planned {wanted}, measured {measured}"


def test_the_embedding_in_its_file(converted, tmp_path):
    """Measured so, said so, and kept beside the other record."""
    few = ["--depths", "140", "--answer", "3", "--repeats", "1", "--embedding", "file"]
    arguments = ["bench", str(converted), *few, "--format", "json", "--save", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    [saved] = tmp_path.iterdir()
    assert saved.name.endswith("_model-table-in-file.json")
    assert ", dense bf16, embedding in its file)" in as_markdown(found)
    assert " GB, embedding in its file</h3>" in as_html([found])
    other = found | {"settings": {"answer": 3}}  # as records were before they said it
    assert unlike(other, found) == ["place of the embedding: memory and file"]
    held = found["results"][0]["peak_memory_bytes"]
    in_memory = planned(converted, context=143).weights["embedding"]
    assert held < found["model"]["nbytes"] - in_memory + 20e6
    refused = CliRunner().invoke(main, [*arguments, "--compare", "mlx-lm"])
    assert refused.exit_code == 2
    assert "--compare: mlx-lm needs the table in memory, not --embedding file" in refused.stderr


def test_rows_decode_as_they_do_alone(converted):
    """What is measured is the model's work: each row's tokens are those it gives by itself."""
    runner = OurRunner(load_model(converted))
    prompts = [sample_prompt(runner._model.config, 150 + row)[row:] for row in range(3)]
    fed: list[int] = []
    together = [*runner.tokens(prompts, 6, fed=fed.append)]
    alone = [[*runner.tokens([prompt], 6, fed=lambda _: None)] for prompt in prompts]
    assert [[row[n] for row in together] for n in range(3)] == [[t for [t] in r] for r in alone]
    assert fed == sorted(fed) and {150, 300, 450} < set(fed)  # in chunks


@pytest.mark.parametrize("place", ["memory", "file"])
def test_kernels_are_counted_where_they_decode(converted, place):
    """6 in a sliding layer, 7 in a full one, 3 besides; each further row has its own attention.

    With the embedding in its file, counting failed wherever there are kernels.
    """
    import mlx.core as mx

    runner = OurRunner(model := load_model(converted, embedding=place))
    definitions, counted = model.kernels, []
    for rows in (1, 3):
        model.kernels = definitions
        runner._caches = [model.make_cache() for _ in range(rows)]
        for cache in runner._caches:
            model.next_logits(mx.zeros((1, 5), mx.int32), cache)
        model.kernels = all_kernels()
        counted.append(runner.next_step().kernels)
    assert counted[0] == 6 + 7 + 3
    assert counted[1] >= counted[0] + 2 * (1 + 2)


def test_text_forms(record):
    text = as_markdown(record)
    assert (
        "Apple M4 Pro, 14 CPU cores, 20 GPU cores, 48 GB, wired limit 40 GB, Darwin 26.2, "
        "AC Power, low-power mode, heat heavy to ?, load " in text
    )
    assert text.count("| mlx-lm |") == 2 and text.count("Ours over mlx-lm's") == 1
    rows = as_csv(record).splitlines()
    assert len(rows) == 5 and len({row.count(",") for row in rows}) == 1
    assert file_name(record) == "m4-pro_48g_tiny.json"
    linux = {"cpu": "Intel(R) Xeon(R) Processor", "memory_bytes": 25325268992}
    assert file_name(record | {"machine": linux}) == "intel-xeon_24g_tiny.json"
    unknown = {"cpu": None, "memory_bytes": None, "architecture": "riscv64"}
    assert file_name(record | {"machine": unknown}) == "riscv64_0g_tiny.json"


def test_the_command(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "read_machine", lambda: M4_PRO)
    few = ["--depths", "4,6", "--answer", "2", "--repeats", "2", "--format", "json"]
    arguments = ["bench", str(converted), *few, "--save", str(tmp_path / "results")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    saved = tmp_path / "results" / "m4-pro_48g_model.json"
    assert json.loads(saved.read_text()) == record
    assert result.stderr.endswith(f"saved {saved}\n")
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(main, ["bench", str(converted), *few, "--save", "--repeats", "1"])
    assert again.exit_code == 0
    assert (tmp_path / "benchmarks" / "results" / saved.name).is_file()
    assert CliRunner().invoke(main, arguments).stderr.endswith("over the one that was there\n")
    record = json.loads(saved.read_text())
    assert record["model"]["name"] == "model" and str(converted) not in saved.read_text()
    result = CliRunner().invoke(main, ["bench", "diff", str(saved), str(saved)])
    assert result.exit_code == 0 and result.stdout.count("within the spread") == 6
    assert result.stderr == ""
    other = record | {"settings": {"answer": 9}, "model": record["model"] | {"digest": "4f27c73d"}}
    (tmp_path / "b.json").write_text(json.dumps(other))
    result = CliRunner().invoke(main, ["bench", "diff", str(saved), str(tmp_path / "b.json")])
    weights = f"weights: model ({record['model']['digest'][:8]}) and model (4f27c73d)"
    assert result.stderr.splitlines() == [
        f"The records are unlike in {weights}",
        "The records are unlike in tokens of an answer: 2 and 9",
    ]
    both = ["bench", "diff", "--json", str(saved), str(tmp_path / "b.json")]
    assert len(json.loads(CliRunner().invoke(main, both).stdout)["unlike"]) == 2


def test_what_slows_a_mac_is_said_and_recorded(converted, monkeypatch):
    """Battery, low-power mode and swap: before the measurement, and in its record."""
    on_battery = dataclasses.replace(M4_PRO, power_source="Battery Power")
    monkeypatch.setattr(machine, "read_machine", lambda: on_battery)
    levels = itertools.chain(["warning"], itertools.repeat("critical"))
    monkeypatch.setattr(machine, "read_memory_pressure", lambda: next(levels))
    monkeypatch.setattr(benchmark, "read_memory_pressure", lambda: next(levels))
    few = ["--depths", "4", "--answer", "2", "--repeats", "1", "--format", "json"]
    result = CliRunner().invoke(main, ["bench", str(converted), *few])
    assert result.stderr.splitlines() == [
        "On battery or in low-power mode: this is slower than the machine.",
        "Memory is short here: close other apps, or what is measured is swap.",
    ]
    found = json.loads(result.stdout)
    assert found["meanwhile"]["memory_pressure"] == ["critical", "critical"]
    assert ", heat heavy to ?, memory pressure critical, load " in as_markdown(found)


def test_mistakes_are_found_before_anything_is_measured(converted, tmp_path, monkeypatch):
    """A folder that cannot be written cost the record, a missing mlx-lm the wait."""
    monkeypatch.setattr(benchmark, "bench", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "results")
    result = CliRunner().invoke(main, ["bench", str(converted), "--save", inside])
    assert result.exit_code == 1 and result.stderr == f"Error: {inside}: Not a directory\n"
    monkeypatch.setattr("os.access", lambda _, mode: mode == os.R_OK)
    result = CliRunner().invoke(main, ["bench", str(converted), "--save", str(tmp_path)])
    assert result.exit_code == 2 and f"'{tmp_path}' is not writable; see `" in result.stderr
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    result = CliRunner().invoke(main, ["bench", str(converted), "--compare", "mlx-lm"])
    assert result.exit_code == 1 and "mlx-lm is not installed here; run `pip" in result.stderr
    wrong = CliRunner().invoke(main, ["bench", str(converted), "--depths", "0,x"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith(
        "Error: --depths: expected numbers from 1, such as 1,4, got '0,x'"
    )
    wrong = CliRunner().invoke(main, ["bench", str(converted), "--batch", "1,,2"])
    assert wrong.exit_code == 2 and "--batch: expected numbers from 1" in wrong.stderr


def test_the_report_shows_measurements_beside_predictions(record):
    from xml.etree import ElementTree

    page = as_html([record, measured_on_a_mac(depth=1024, decode=51.5)])
    assert "2 records." in page and "&lt;20b&gt;" in page and "<20b>" not in page
    # by chip, by depth, and in its own two plots; prefill by length and decode alike
    assert page.count("mlx-gptoss, depth 1024, batch 1: 51.5 ± 0 tok/s") == 5
    assert page.count(" ± ") > 5 + 3 * 4 and page.count('class="real spread"') == 2 * 2 + 2 + 2
    assert "http" not in page.lower().replace('charset="utf-8"', "")  # nothing is fetched
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    plot = over_depth(
        [Curve(name="a chip", kind="guess", values=[(512, 40), (4096, 20)])],
        [Point(depth=1024, speed=30, spread=29, kind="real", label="", title="<x>")],
        label="made up",
    )
    assert plot.count('text-anchor="end"') == 2 and ">20</text>" in plot and ">50</text>" in plot
    assert '"270.0"' in plot and "&lt;x&gt;" in plot  # the bar ends at the plot's edge
    small = measured_on_a_mac(depth=1024, decode=51.5)
    small["machine"] |= {"cpu": "Apple M4 Max", "gpu_cores": 32, "memory_bytes": 36 * 2**30}
    page = as_html([small])  # M4 Max is sold with two bandwidths: the dot belongs to one of them
    assert page.count("mlx-gptoss, depth 1024, batch 1: 51.5 ± 0 tok/s") == 5
    other = as_html([measured_on_a_mac(depth=1024, decode=9, layers=2)])
    assert "depth 1024, batch 1" not in other.split("Every record")[0]  # of no published model
    assert "0 records." in as_html([])
