"""Records of measurements: how far runs lie apart, how two compare, what is refused."""

import json

import pytest
from bench_samples import made_up, measured_on_a_mac
from click.testing import CliRunner

from mlx_gptoss import bench_record
from mlx_gptoss.bench import summary
from mlx_gptoss.bench_text import difference, read_record
from mlx_gptoss.cli import main
from mlx_gptoss.errors import BenchmarkError


def test_a_commit_of_another_project_is_not_ours(monkeypatch):
    """Installed into a folder that git knows, such as an app's own."""
    answers = {"ls-files": None, "describe": "1234567\n"}
    monkeypatch.setattr(bench_record, "run_command", lambda command: answers[command[3]])
    assert bench_record.commit() is None
    answers["ls-files"] = "_version.py\n"
    assert bench_record.commit() == "1234567"


def test_the_spread_is_how_far_runs_lie_apart():
    """Of made-up measurements, 19 of 20 pairs of runs are no further apart than it says."""
    import numpy as np

    runs = np.random.default_rng(5).normal(100, 3, (4000, 7))
    spreads = [summary(list(some[:5]))["spread"] for some in runs]
    assert 0.94 <= np.mean(np.abs(runs[:, 5] - runs[:, 6]) <= np.array(spreads)) <= 0.96
    assert summary([3.0]) == {
        "median": 3.0, "mean": 3.0, "sd": 0.0, "spread": None, "runs": [3.0]
    }  # fmt: skip


def test_difference_knows_noise_from_change():
    rows = difference(made_up(10, 11, 12), made_up(10.2, 11.2, 12.2))
    assert [row["significant"] for row in rows] == [False] * 3
    rows = difference(made_up(10), made_up(20))
    assert [row["significant"] for row in rows] == [False] * 3  # one run says nothing
    rows = difference(made_up(10, 11, 12), made_up(20, 21, 22))
    assert [(row["significant"], row["ratio"]) for row in rows] == [(True, 21 / 11)] * 3


def test_records_with_nothing_in_common():
    for other in (made_up(1, 2, depth=513), made_up(1, 2, batch=2)):
        with pytest.raises(BenchmarkError, match="no engine, depth and batch in common"):
            difference(made_up(1, 2), other)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file"),
        ("{", "expected the JSON of `bench --save`"),
        ("[1]", "expected a record of version 2, got None; measure again"),
        ('{"version": 99}', "expected a record of version 2, got 99; measure again"),
        ('{"version": 2}', "a field is missing or wrong: 'meanwhile'|'machine'"),
    ],
)
def test_damaged_records(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_record(path)


def test_the_report_command(tmp_path, monkeypatch):
    path, page = tmp_path / "a.json", tmp_path / "page.html"
    path.write_text(json.dumps(measured_on_a_mac(depth=2048, decode=40)))
    result = CliRunner().invoke(main, ["bench", "report", str(path), "-o", str(page)])
    assert result.exit_code == 0 and result.stdout.strip() == str(page)
    assert "depth 2048, batch 1: 40 ± 0 tok/s" in page.read_text()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["bench", "report"])
    assert result.exit_code == 1 and "benchmarks/results: no such folder here" in result.stderr
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "decode.json").write_text('{"benchmark": "decode"}')  # another program's
    path.rename(results / path.name)
    assert CliRunner().invoke(main, ["bench", "report"]).exit_code == 0
    assert "1 record." in (tmp_path / "bench.html").read_text()
