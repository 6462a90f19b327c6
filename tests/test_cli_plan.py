"""`mlx-gptoss plan`: verdicts in words, JSON and exit codes."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from tiny import write_checkpoint

from mlx_gptoss import machine, memory
from mlx_gptoss.cli import main
from mlx_gptoss.convert import convert_checkpoint


def plan(*arguments: str):
    return CliRunner().invoke(main, ["plan", *arguments])


def test_a_mac_that_is_large_enough():
    result = plan("20b", "--memory", "32G")
    assert result.exit_code == 0
    assert "a Mac with 32 GB: the GPU may use 22.9 GB: fits, up to 131072 tokens" in result.output
    assert "weights    13.8 GB" in result.output and "24.6 kB a token" in result.output


def test_one_that_is_not():
    result = plan("20b", "--memory", "16")
    assert result.exit_code == 1
    assert "a Mac with 16 GB: the GPU may use 11.5 GB: does not fit" in result.output
    assert "--dense q4 and sudo sysctl iogpu.wired_limit_mb=" in result.output


def test_the_embedding_in_its_file():
    """20b in q4 fits a Mac with 16 GB as macOS sets it up, if the table stays on disk."""
    asked = ("20b", "--memory", "16", "--dense", "q4", "--context", "4500")
    kept, left = plan(*asked), plan(*asked, "--embedding", "file")
    assert (kept.exit_code, left.exit_code) == (1, 0)
    assert "  --embedding file  (peak" in kept.output
    assert "embedding 325.8 MB (in its file)" in left.output
    facts = json.loads(plan(*asked, "--embedding", "file", "--json").output)
    parts = facts["weights_bytes"]
    assert facts["resident_bytes"] == sum(parts.values()) - parts["embedding"]
    assert list(facts["kv_bytes_by_context"]) == ["4096", "4500", "32768", "131072"]
    assert facts["kv_bytes_by_context"]["4500"] == facts["kv_bytes"]


def test_every_memory_size_of_a_chip_as_json():
    result = plan("openai/gpt-oss-120b", "--chip", "m4 max", "--context", "32768", "--json")
    assert result.exit_code == 0
    machines = {m["machine"]: m["verdict"] for m in json.loads(result.output)["machines"]}
    assert machines == {
        "Apple M4 Max with 36 GB": "does not fit",
        "Apple M4 Max with 48 GB": "does not fit",
        "Apple M4 Max with 64 GB": "does not fit",
        "Apple M4 Max with 128 GB": "fits",
    }


def test_a_folder_on_this_machine_as_it_was_converted(tmp_path):
    source = write_checkpoint(tmp_path / "source", layers=2)
    convert_checkpoint(source, tmp_path / "model", dense="q8")
    facts = json.loads(plan(str(tmp_path / "model"), "--json").output)
    dense = json.loads(plan(str(tmp_path / "model"), "--dense", "bf16", "--json").output)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sum(facts["weights_bytes"].values()) == index["metadata"]["total_size"]
    assert facts["weights_bytes"]["embedding"] == dense["weights_bytes"]["embedding"] * 8.5 / 16
    assert facts["machines"][0]["verdict"] == "fits"
    assert facts["context"] == 8192


def test_a_published_model_as_it_was_converted(tmp_path, isolated_home):
    """It was planned in bf16 whatever the store held."""
    store = isolated_home / ".cache" / "mlx-gptoss"
    store.mkdir(parents=True)
    source = write_checkpoint(tmp_path / "source", layers=2)
    convert_checkpoint(source, store / "gpt-oss-20b", dense="q8")
    found = [
        json.loads(plan(name, "--json").output) for name in ("20b", str(store / "gpt-oss-20b"))
    ]
    assert found[0]["weights_bytes"] == found[1]["weights_bytes"]
    asked = json.loads(plan("20b", "--dense", "bf16", "--json").output)
    assert asked["weights_bytes"]["embedding"] == 201088 * 2880 * 2


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_runtime_admits_what_the_plan_allows(tmp_path, batch):
    """Saved points were left out of the plan, and all prompts of a batch read at once."""
    source = write_checkpoint(tmp_path / "source", layers=3)
    convert_checkpoint(source, tmp_path / "model")
    asked = ("--context", "1500", "--batch", str(batch), "--json")
    facts = json.loads(plan(str(tmp_path / "model"), *asked).output)
    limit = 2 * facts["total_bytes"]
    admission = memory.memory_of(tmp_path / "model", limit_bytes=limit)
    assert admission is not None
    assert admission.free_bytes([1500] * batch) == limit - facts["total_bytes"]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--memory", "lots"], 2, "Error: --memory: expected a size such as 16G, got 'lots'; see"),
        (["--memory", "0G"], 2, "Error: --memory: expected a size such as 16G, got '0G'; see"),
        (["--chip", "M9"], 1, "Error: chip: expected one of M1, "),
        (
            ["--chip", "M4 Pro", "--memory", "32G"],
            1,
            "Error: --memory: M4 Pro has 24, 48, 64 GB; got '32G'",
        ),
        (["--context", "131073"], 1, "Error: context: expected 1 to 131072, got 131073"),
    ],
)
def test_mistakes_are_one_line(arguments, code, message):
    result = plan("20b", *arguments)
    assert result.exit_code == code
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_generate_refuses_what_does_not_fit(monkeypatch):
    """The numbers, one line, and before the model is loaded."""
    here = dataclasses.replace(machine.read_machine(), working_set_bytes=133_000_000)
    monkeypatch.setattr(memory, "read_machine", lambda: here)
    asked = ["generate", "-m", "demo", "Hi " * 3000, "--max-tokens", "1"]
    result = CliRunner().invoke(main, asked)
    unpacking, error = result.stderr.splitlines()
    assert result.exit_code == 1 and unpacking.startswith("Unpacking the demo")
    assert (
        error.startswith("Error: memory: ") and "prompt tokens with max_tokens=1 need 0.1" in error
    )
    assert "this machine lets 0.12 GiB be used, enough for" in error
    tight = dataclasses.replace(here, working_set_bytes=100_000_000)
    monkeypatch.setattr(memory, "read_machine", lambda: tight)
    refused = CliRunner().invoke(main, ["generate", "-m", "demo", "Hi", "--max-tokens", "1"])
    assert refused.exit_code == 1 and "with a context of 1024 tokens needs" in refused.stderr
    in_file = [*asked[:3], "Hi", "--max-tokens", "1", "--embedding", "file", "--seed", "1"]
    assert CliRunner().invoke(main, in_file).exit_code == 0
