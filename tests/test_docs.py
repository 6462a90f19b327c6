"""The documents say what is so: files exist, commands parse, figures are those of the records."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_gptoss import errors
from mlx_gptoss.cli import main
from mlx_gptoss.table import PLACES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "AGENTS.md"]
ALL_TEXT = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
ENGINES = ("ours", "mlx_lm")
ENVIRONMENT = {"MLX_GPTOSS_HOME", "MLX_GPTOSS_MODEL"}


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def tree() -> dict[str, str]:
    """Paths of the README's layout tree, with what it says of each."""
    [block] = [b for b in blocks(README, "text") if b.startswith("mlx_gptoss/")]
    entries, parents = {}, [""]
    for line in block.splitlines():
        indent, name, role = re.fullmatch(r"( *)(\S+) +(.+)", line).groups()  # type: ignore[union-attr]
        del parents[len(indent) // 2 + 1 :]
        path = parents[-1] + name
        entries[path.rstrip("/")] = role
        if name.endswith("/"):
            parents.append(path)
    return entries


def tracked() -> list[str]:
    """Files git knows or would add; a copy without git has no say."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project is unknown")
    return [line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_the_tree_is_on_disk_and_complete() -> None:
    said = tree()
    assert [path for path in said if not (ROOT / path).exists()] == []
    top = {line.partition("/")[0] for line in tracked() if not line.startswith(".")}
    assert {path for path in said if "/" not in path} == top
    folders = {line.rpartition("/")[0] for line in tracked() if line.startswith("mlx_gptoss/")}
    subpackages = {path for path in folders if path.count("/") == 1} | {
        f"mlx_gptoss/{path.name}" for path in (ROOT / "mlx_gptoss").iterdir() if path.is_symlink()
    }
    assert subpackages <= set(said)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_named_exists(document: str) -> None:
    text = re.sub(
        r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    for name in re.findall(r"`([\w.*/-]+)`", text):
        if "/" in name and not name.startswith(("openai/", "original/")):
            assert list(ROOT.glob(name.rstrip("/"))), f"{document} names {name}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), f"{document} links {link}"


def commands() -> list[str]:
    """Every line of the documents that runs `mlx-gptoss`, comments taken off."""
    lines = re.findall(r"^    .*?(mlx-gptoss .*)$", ALL_TEXT, re.MULTILINE)
    inline = re.findall(r"`(mlx-gptoss [^`]+)`", ALL_TEXT)
    return sorted({re.sub(r" +#.*| *>.*", "", line) for line in [*lines, *inline]})


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    if name.startswith("-"):
        return
    command = main.commands[name]
    if isinstance(command, click.Group):  # `bench MODEL` means `bench run MODEL`
        known = arguments and arguments[0] in command.commands
        command = command.commands[arguments.pop(0) if known else "run"]
    whole = click.Context(main, **main.context_settings)  # else its help is -h no more
    with click.Context(command, info_name=name, parent=whole) as context:
        parser = command.make_parser(context)
        options, rest, _ = parser.parse_args([a for a in arguments if a not in ("-h", "--help")])
    wanted = [p for p in command.params if isinstance(p, click.Argument)]
    assert len(rest) <= len(wanted) or not arguments, line
    assert options is not None


def programs() -> list[str]:
    """Every Python program that a page says how to run: a file, or a module of ours."""
    pages = [(ROOT / line).read_text() for line in tracked() if line.endswith(".md")]
    found = re.findall(
        r"python (-m (?:benchmarks|tests|mlx_gptoss)\S*|\S+\.py)\b", "\n".join(pages)
    )
    assert len(found) > 15
    return sorted({name.replace(".", "/") + ".py" if "-m " in name else name for name in found})


def test_every_program_that_is_told_to_be_run_exists() -> None:
    for name in programs():
        path = ROOT / name.removeprefix("-m ")
        inside = [path, path.with_suffix("") / "__main__.py", ROOT / "tests/examples" / name]
        assert any(place.is_file() for place in inside), name


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def golden(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests/goldens" / name).read_text())


def speedups(name: str, results: Iterable[str] | None = None) -> str:
    """How many times faster ours is, of some results of a record."""
    found = record(name)["results"]
    return ", ".join(f"{found[n]['wall_s']['speedup']['median']:.1f}" for n in results or found)


def measured() -> Iterator[str]:
    """What the README says of times and memory, made anew from the records that it names."""
    harmony, schemas = record("harmony_linux.json"), record("schemas_linux.json")["outcomes"]
    ours, peer = (harmony[name]["cpu"]["median"] for name in ("parse", "parse, openai-harmony"))
    yield f"| {ours:.1f} us | openai-harmony, in Rust: {peer:.1f} us |"
    yield f"| {schemas['valid']}, {schemas['cut']}, {schemas.get('invalid', 0)} |"
    for dtype in ("bfloat16", "float32"):
        both = (speedups(f"{name}_mini_linux.json", [dtype]) for name in ("decode", "prefill"))
        yield f"| {', '.join(both)} | 1 |"
    yield f"| {speedups('sampling_linux.json')} | 1 |"
    plans = {
        (run["model"], run["embedding"]): run for run in record("plan_vs_peak_linux.json")["runs"]
    }
    for place in PLACES:
        both = (plans[model, place] for model in ("demo", "mini"))
        ratios = (run["planned_bytes"] / run["peak_bytes"] for run in both)
        yield f"| {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
    saved = plans["mini", "memory"]["peak_bytes"] - plans["mini", "file"]["peak_bytes"]
    yield f"; {saved / 1e9:.2f} GB |"
    tries = record("reproduce_linux.json")["tries"].values()
    spreads = sorted(100 * one["spread"] for runs in tries for one in runs)
    yield f" {spreads[0]:.0f} to {spreads[-1]:.0f} % "
    agree = [sum(one["agree"] for one in runs) for runs in tries]
    yield f"| {min(agree)} of {len(next(iter(tries)))} |"
    together = record("batch_linux.json")["results"]["demo"]["8"]["wall_s"]["over_one"]["median"]
    yield f"over those of one | {together:.1f} |"
    [conversion] = record("convert_full20b.json")["rows"]
    peak, ratio = (conversion[n] for n in ("peak_gib_above_interpreter", "convert_over_copy"))
    yield f"| {peak['median']:.2f} GiB; {ratio['median']:.2f} |"
    rounding = (record(f"convert_{name}.json")["rows"] for name in ("finetune", "mini_q8_q4"))
    ratios = sorted(row["convert_over_copy"]["median"] for rows in rounding for row in rows)
    yield f"takes {ratios[0]:.0f} to {ratios[-1]:.0f} times a plain copy"
    [demo] = [
        result["decode_tok_per_s"]["median"]
        for result in record("intel-xeon_24g_demo.json")["results"]
        if (result["engine"], result["depth"], result["batch"]) == ("mlx-gptoss", 64, 1)
    ]
    yield f"the demo decodes {demo:.0f} tokens a second"


def counted() -> Iterator[str]:
    """What it says of kernels, bytes and instructions."""
    card, larger = (record(f"decode_card_{model}_q8.json") for model in ("20b", "120b"))
    ours, peers = ([c[who]["kernels_per_token"] for c in (card, larger)] for who in ENGINES)
    yield f"| {ours[0]}, {ours[1]} | mlx-lm: {peers[0]}, {peers[1]:,} |"
    ours, peers = ([c["kernels_per_chunk_of_512"][who] for c in (card, larger)] for who in ENGINES)
    yield f"| {ours[0]}, {ours[1]} | mlx-lm: {peers[0]:,}, {peers[1]:,} |"
    step = card["steps_of_turns"]["8"]
    kernels, megabytes = step["kernels_per_step"], step["bytes_per_token"]["1024"] / 1e6
    yield f"| {kernels}, {step['dependent_dispatches']}, {megabytes:,.0f} |"
    guided = record("guided_linux.json")
    median, slow = guided["masks"]["median_ms"], guided["masks"]["p99_ms"]
    yield f"| {guided['kernels']['whole']}; {median:.2f} ms, {slow:.2f} ms |"
    [experts] = [
        line["mb"]
        for line in record("batch_card.json")["rows"]
        if (line["model"], line["operation"], line["rows"]) == ("20b", "experts", 8)
    ]
    yield f"| {experts['grouped']:.0f}, {experts['rows']:.0f} | MLX's kernel: {experts['mlx']:.0f} "
    counts = golden("instructions.json")["kernels"]
    gate, down, key = (counts[n] for n in ("experts_swiglu", "experts_down", "attention_decode"))
    ptx, apple = (f"{gate[count]:.0f}, {down[count]:.0f}" for count in ("ptx", "apple"))
    yield f"| {ptx}; {apple}; {gate['budget']} |"
    yield f"| {key['ptx']:,.0f}; {key['apple']:,.0f}; {key['budget']:,} |"


def of_goldens() -> Iterator[str]:
    """What it says of figures that the tests hold the code to."""
    parity = golden("parity.json")
    difference = parity["short"]["mlx-lm float32"]["max_difference"]
    yield f"| mlx-lm {parity['versions']['mlx_lm']}: {difference:.2f} |"
    late = parity["long"]["mlx-lm float32, by position"]["4096-6000"]["top1"]
    yield f"| 100 % | mlx-lm: {100 * late:.0f} % |"
    theirs, peers = (parity["short"][f"{who} bfloat16"]["kl"] for who in ("transformers", "mlx-lm"))
    yield f"| yes | mlx-lm: {peers / theirs:.1f} times theirs |"
    for model in ("20b", "120b"):
        rows = (f"{stem} plain, {model}" for stem in ("experts_swiglu", "experts_down"))
        gate, down = (golden("traffic.json")[row]["distinct_sectors_ratio"] for row in rows)
        yield f"{model}: {gate:.2f}, {down:.2f}"


@pytest.mark.parametrize("figure", [*measured(), *counted(), *of_goldens()])
def test_figures_are_those_of_the_records(figure: str) -> None:
    assert figure in README, "a record was made anew: say so in the README"


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^    |`)make (\w+)", ALL_TEXT, re.MULTILINE)))
)
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_the_variables_that_are_read_are_the_ones_told() -> None:
    folders = ("mlx_gptoss", "convert", "metal")
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read = set(re.findall(r'"(MLX_GPTOSS_\w+)"', "\n".join(sources)))
    assert read == ENVIRONMENT, "a third variable is one too many"
    assert set(re.findall(r"MLX_GPTOSS_\w+", README)) == read


def test_the_log_has_the_newest_first() -> None:
    log = (ROOT / "benchmarks/LOG.md").read_text()
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d) ", log, re.MULTILINE)
    assert len(dates) > 10
    assert dates == sorted(dates, reverse=True)


def test_the_tree_of_errors_is_complete() -> None:
    assert errors.__doc__
    told = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert set(told) == {error.__name__ for error in errors.GptOssError.__subclasses__()}


@pytest.mark.parametrize(("document", "limit"), [("README.md", 250), ("AGENTS.md", 60)])
def test_documents_stay_short(document: str, limit: int) -> None:
    assert len((ROOT / document).read_text().splitlines()) <= limit


@pytest.mark.slow
def test_the_python_example_runs() -> None:
    [example] = blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "TextDelta(text='" in done.stdout and "Paris" in done.stdout.splitlines()[-1]
    assert "decode_tok_per_s=" in done.stdout


@pytest.mark.slow
def test_the_demo_of_the_makefile_answers() -> None:
    [line] = re.findall(r"^demo:.*\n\t\$\(VENV\)/bin/mlx-gptoss (.+)$", MAKEFILE, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_gptoss", *shlex.split(line), "--temperature", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "| stop" in done.stderr
