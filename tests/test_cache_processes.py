"""Prefix caches in files, of several users: two at once, one killed, one with another model."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cache_writer
import mlx.core as mx
import numpy as np
import pytest
from cache_folders import (
    ROOT,
    content_of,
    fed,
    files_in,
    fill,
    load,
    states_of,
    wait_for,
)
from cache_writer import IDENTITY
from click.testing import CliRunner
from given import HEADER, new_model
from tiny import write_checkpoint

from mlx_gptoss import cache_identity
from mlx_gptoss.cache import FullCache, ModelCache
from mlx_gptoss.cache_folder import CacheFolder
from mlx_gptoss.cache_identity import identity_of
from mlx_gptoss.cli import main
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.manifest import MANIFEST
from mlx_gptoss.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return new_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "caches"


def test_two_users_at_once_get_whole_caches_or_none(
    model: Model, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One writes and evicts while the other reads; they share nothing but the folder."""
    contents = [content_of(model, number) for number in range(6)]
    truth = [(tokens, states_of(fed(model, tokens))) for tokens, _ in contents]
    budget = 3 * contents[0][1].nbytes + 100
    writer = CacheFolder(folder, identity=IDENTITY, budget_bytes=budget)
    done = threading.Event()

    def work() -> None:
        for number in range(30):
            writer.save(contents[number * 5 % 6][1])
            writer.flush()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    reader = CacheFolder(folder, identity=IDENTITY, budget_bytes=budget)
    hits = 0
    while not done.is_set() or hits == 0:
        for tokens, arrays in truth:
            length, cache = load(reader, model, tokens)
            if length:
                hits += 1
                assert length == len(tokens)
                for array, right in zip(states_of(cache), arrays, strict=True):
                    assert np.array_equal(array[:, :, :length], right[:, :, :length])
    thread.join()
    writer.close()
    assert not caplog.records and hits
    assert sum(path.stat().st_size for path in files_in(folder)) <= budget


def test_a_kill_while_a_file_is_written_loses_at_most_that_file(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, reported, left_over = random.Random(5), [-1], 0
    for delay_s in (0, 0, 0.005, 0.02):
        arguments = [sys.executable, cache_writer.__file__, str(folder), str(reported[-1] + 2)]
        with subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "."},
        ) as child:
            assert child.stdout is not None
            reported += [int(child.stdout.readline()) for _ in range(rng.randrange(1, 4))]
            wait_for(lambda: any(folder.glob(".mlx-gptoss-*.part")))
            time.sleep(rng.uniform(0, delay_s))
            child.send_signal(signal.SIGKILL)
            reported += map(int, child.stdout.read().split())
        left_over += len(list(folder.glob(".mlx-gptoss-*.part")))
    assert left_over, "some kills came in the middle of a file"
    files = CacheFolder(folder, identity=IDENTITY)
    assert not list(folder.glob(".mlx-gptoss-*.part")) and not caplog.records
    assert len(files_in(folder)) <= len(reported) - 1 + 4
    for number in reported[1:]:
        cache = ModelCache([FullCache((1, 2, 64), mx.float32)], [0])
        prompt = [number] * cache_writer.TOKENS + [1]
        assert fill(files, cache, prompt) == cache_writer.TOKENS
        truth = cache_writer.content(number).arrays.values()
        for array, (_, right) in zip(cache.arrays, truth, strict=False):
            assert np.array_equal(np.array(array.view(mx.uint8)), np.array(right))
    assert not caplog.records


def test_the_identity_is_of_everything_that_numbers_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    convert_checkpoint(write_checkpoint(tmp_path / "source", layers=2), folder)
    model: Any = SimpleNamespace(dtype=mx.float32, kernels=KernelSet.of({}))
    first = identity_of(folder, model)
    assert identity_of(folder, model) == first and len(first) == 16
    seen = {first}

    def differs() -> None:
        identity = identity_of(folder, model)
        assert identity not in seen
        seen.add(identity)

    model.dtype = mx.bfloat16
    differs()
    model.kernels = KernelSet.of({"unembed": "it differs"})
    differs()
    monkeypatch.setattr(mx, "__version__", "0.99")
    differs()
    monkeypatch.setattr(cache_identity, "__version__", "9")
    differs()
    monkeypatch.setattr(cache_identity, "FORMAT", 99)
    differs()
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text() + " ")
    differs()
    manifest.unlink()
    differs()
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    differs()
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    differs()


def test_generate_and_chat_go_on_from_the_same_folder(folder: Path) -> None:
    options = ["--cache-dir", str(folder), "--max-tokens", "2"]
    runner = CliRunner()
    first = runner.invoke(main, ["generate", "Hello!", *options])
    assert first.exit_code == 0 and "cached" not in first.stderr
    again = subprocess.run(  # the identity must be the same in another process
        [sys.executable, "-m", "mlx_gptoss", "generate", "Hello!", *options],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    chat = runner.invoke(main, ["chat", *options], input="Hello!\n")
    assert chat.exit_code == 0
    for result in (again, chat):
        told = re.search(r"prompt (\d+) tok \((\d+) cached\)", result.stderr)
        assert told and int(told[1]) - int(told[2]) == HEADER
    wrong = runner.invoke(main, ["generate", "Hello!", "--cache-dir", __file__])
    assert wrong.exit_code == 2 and "'--cache-dir'" in wrong.stderr
