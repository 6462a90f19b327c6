"""Prefix caches in files: the same bits, whatever happens to the disk or to a process."""

import errno
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cache_writer
import mlx.core as mx
import numpy as np
import pytest
from cache_writer import IDENTITY
from click.testing import CliRunner
from given import HEADER, new_model
from tiny import TinyShape, write_checkpoint
from weights import tiny_model

from mlx_gptoss import cache_files, cache_identity
from mlx_gptoss.cache import FullCache, ModelCache
from mlx_gptoss.cache_files import Content
from mlx_gptoss.cache_folder import CacheFolder, Saved
from mlx_gptoss.cache_identity import identity_of
from mlx_gptoss.cli import main
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import CacheError
from mlx_gptoss.harmony.ledger import Prompt
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.manifest import MANIFEST
from mlx_gptoss.model import Model
from mlx_gptoss.prefix_cache import PrefixCache, Slot

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [(7 * n * n + n) % 1024 for n in range(340)]
HEAD, STABLE, END = 150, 290, 299  # past the window of 128, all of them


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def any_model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(TinyShape(layers=2), dtype=request.param)


@pytest.fixture(scope="module")
def model() -> Model:
    return new_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "caches"


def prefixes_of(model: Model, folder: Path, **options: Any) -> PrefixCache:
    files = CacheFolder(folder, identity=IDENTITY, **options)
    return PrefixCache(model.make_cache, budget_bytes=2**30, files=files)


def prompt_of(tokens: Sequence[int], stable: int = STABLE) -> Prompt:
    return Prompt(tokens=tuple(tokens), ends=(), stable=stable)


def hold_turn(
    model: Model, prefixes: PrefixCache, tokens: Sequence[int], *, answer: int = END - STABLE - 2
) -> Slot:
    """Feed what is left of a prompt that ends behind `STABLE`, and some tokens one by one."""
    end = len(tokens) - answer
    slot = prefixes.take(prompt_of(tokens[:end], end - 2), head=HEAD)
    for mark in (*slot.marks, end):
        if piece := tokens[slot.cache.offset : mark]:
            model.hidden(mx.array([piece]), slot.cache)
            mx.eval(slot.cache.arrays)
            slot.note(tokens)
            if mark == HEAD:
                prefixes.share(slot)
    for token in tokens[end:]:
        mx.eval(model.next_logits(mx.array([[token]]), slot.cache))
    slot.note(tokens)
    prefixes.give_back(slot)
    return slot


def files_in(folder: Path) -> list[Path]:
    """The least recently used first."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize(("length", "new"), [(END, 1), (END, 5), (STABLE, 5), (HEAD, 5)])
def test_a_file_goes_on_with_the_bits_of_the_cache_it_was_made_from(
    any_model: Model, folder: Path, length: int, new: int
) -> None:
    """Where the turn ended, at its question, and at the instructions, in an idle slot's own way."""
    prefixes = prefixes_of(any_model, folder)
    slot = hold_turn(any_model, prefixes, TOKENS[:END])
    assert slot.ledger.positions == (HEAD, STABLE)
    prefixes.close()
    slot.go_to(length, slot.ledger.states.get(length))
    assert slot.cache.offset == length
    other = (TOKENS[length] + 1) % 1024  # another branch, unless the turn goes on
    following = [other if length < END else TOKENS[END], *TOKENS[END + 1 : END + new]]
    prompt = prompt_of([*TOKENS[:length], *following])
    loaded = prefixes_of(any_model, folder).take(prompt, head=HEAD)
    assert loaded.cache.offset == len(loaded.ledger.tokens) == length
    assert loaded.ledger.tokens == TOKENS[:length]
    assert loaded.ledger.positions == tuple(p for p in (HEAD, STABLE) if p <= length)
    tokens = mx.array([following])
    for _ in range(3):
        here, there = (any_model.next_logits(tokens, c.cache) for c in (slot, loaded))
        assert mx.array_equal(here, there)
        tokens = tokens[:, :1]
    for back in (slot, loaded):
        back.go_to(HEAD, back.ledger.states[HEAD])
    here, there = (any_model.next_logits(tokens, c.cache) for c in (slot, loaded))
    assert mx.array_equal(here, there), "further back, from memory"


def test_a_question_asked_in_other_words_keeps_the_file_of_the_first(
    model: Model, folder: Path
) -> None:
    prefixes = prefixes_of(model, folder)
    other = [*TOKENS[: END + 5], *range(20)]  # goes back to behind the first question
    for tokens in (TOKENS[:END], TOKENS[: END + 20], other):
        hold_turn(model, prefixes, tokens)
        assert prefixes._files is not None
        prefixes._files.flush()
    prefixes.close()
    assert len(files_in(folder)) == 3, "the instructions, and both conversations"
    loaded = prefixes_of(model, folder).take(prompt_of(TOKENS), head=HEAD)
    assert loaded.cache.offset == END + 20


def test_a_file_is_read_only_as_far_as_it_is_needed(model: Model, folder: Path) -> None:
    """Another conversation's memory is that of its own tokens, not of the file's."""
    prefixes = prefixes_of(model, folder)
    hold_turn(model, prefixes, TOKENS[:END])
    prefixes.close()
    head, conversation = sorted(files_in(folder), key=lambda path: path.stat().st_size)
    head.unlink()
    slot = prefixes_of(model, folder).take(prompt_of([*TOKENS[:HEAD], 5, 6, 7]), head=HEAD)
    [full] = [layer for layer in slot.cache if isinstance(layer, FullCache)]
    assert full.snapshot().frozen[0].shape[2] == HEAD == slot.cache.offset
    assert slot.saved is None and slot.ledger.positions == (HEAD,)
    other = hold_turn(model, prefixes_of(model, folder), [*TOKENS[:HEAD], *range(80)])
    assert other.saved is not None
    wait_for(lambda: len(files_in(folder)) == 3)
    assert conversation.exists(), "it is another conversation's"


def wait_for(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def overwrite(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(new)


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


DAMAGES = {
    "another token": lambda path: overwrite(path, header_end(path) + 4 * (END + 30), b"\x01"),
    "another position": lambda path: overwrite(
        path, header_end(path) + 4 * END, b"\xff\xff\xff\xff"
    ),
    "keys": lambda path: overwrite(path, -1, b"\x55"),
    "a name": lambda path: overwrite(path, path.read_bytes().index(b"full."), b"gull."),
    "another type": lambda path: overwrite(path, path.read_bytes().index(b'"I32"'), b'"U32"'),
    "its header": lambda path: overwrite(path, 20, b"}"),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1000),
    "cut in its header": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "another file": lambda path: shutil.copy(cache_of_weights(), path),
}


def cache_of_weights() -> Path:
    path = Path(os.environ["HOME"]) / "weights.safetensors"
    mx.save_safetensors(str(path), {"weights": mx.zeros((3, 4))})
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_once_and_removed(
    model: Model, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = prefixes_of(model, folder)
    hold_turn(model, prefixes, TOKENS[:END])
    prefixes.close()
    head, path = sorted(files_in(folder), key=lambda path: path.stat().st_size)
    DAMAGES[damage](path)
    prefixes = prefixes_of(model, folder)
    for _ in range(2):
        slot = prefixes.take(prompt_of(TOKENS), head=HEAD)
        assert slot.cache.offset == HEAD, "from the other file"
    assert files_in(folder) == [head]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(
        f"a cached conversation is removed and computed anew: {path}: "
    )


def states_of(cache: ModelCache) -> list[np.ndarray]:
    return [np.array(array.astype(mx.float32)) for array in cache.arrays]


def content_of(model: Model, number: int, count: int = 200) -> tuple[list[int], Content]:
    """The tokens of a conversation that begins like no other, and its keys and values."""
    tokens = [number, *TOKENS[:count]]
    slot = Slot(model.make_cache())
    model.hidden(mx.array([tokens]), slot.cache)
    slot.note(tokens)
    return tokens, slot.content()


def load(folder: CacheFolder, model: Model, tokens: Sequence[int]) -> tuple[int, ModelCache]:
    cache = model.make_cache()
    found = folder.load([*tokens, 1], cache, more_than=0)
    return found.length if found else 0, cache


def test_the_folder_is_bounded_and_the_least_recently_used_go(model: Model, folder: Path) -> None:
    contents = [content_of(model, number) for number in range(5)]
    size = contents[0][1].nbytes
    folder.mkdir()
    mine = [folder / name for name in ("mine.safetensors", "film.part", ".film.part")]
    for path in mine:
        path.write_bytes(b"x" * 10 * size)  # neither counted nor removed
    files = CacheFolder(folder, identity=IDENTITY, budget_bytes=3 * size + size // 2)
    for tokens, content in contents[:3]:
        files.save(content)
        files.flush()
        assert load(files, model, tokens)[0] == len(tokens)
        time.sleep(0.02)  # files' times have steps
    assert load(files, model, contents[0][0])[0], "used again, so the second is the oldest"
    other = CacheFolder(folder, identity="f" * 16, budget_bytes=3 * size + size // 2)
    other.save(contents[3][1])
    other.flush()

    def found() -> list[int]:
        return [n for n, (tokens, _) in enumerate(contents) if load(files, model, tokens)[0]]

    assert found() == [0, 2] and load(other, model, contents[3][0])[0], "it is of another model"
    time.sleep(0.02)
    assert load(files, model, contents[0][0])[0]
    other.save(contents[4][1])
    other.close()
    assert found() == [0]
    files.close()
    assert len(list(folder.iterdir())) == 3 + 3 and all(path.exists() for path in mine)


def test_the_number_of_files_is_bounded(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_gptoss.cache_folder.MOST_FILES", 2)
    files = CacheFolder(folder, identity=IDENTITY)
    (folder / f".mlx-gptoss-{IDENTITY * 2}.part").touch()  # left behind on a disk without locks
    for number in range(4):
        files.save(content_of(model, number)[1])
    files.close()
    assert len(files_in(folder)) == len(list(folder.iterdir())) == 2


def test_what_is_larger_than_the_folder_is_not_kept(
    model: Model, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, content = content_of(model, 1)
    files = CacheFolder(folder, identity=IDENTITY, budget_bytes=content.nbytes - 1)
    before = Saved()
    for _ in range(2):
        assert files.save(content, replaces=before) is before
    files.close()
    assert not files_in(folder)
    assert [r.message for r in caplog.records] == [
        f"{folder}: a conversation of {content.nbytes} bytes is not kept there: "
        f"expected at most {content.nbytes - 1}"
    ]


def test_a_full_disk_is_told_once_and_harms_nothing(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = prefixes_of(model, folder)
    hold_turn(model, prefixes, TOKENS[:END])
    wait_for(lambda: len(files_in(folder)) == 2)
    pieces = Content.pieces

    def fill_up(content: Content) -> Iterator[memoryview]:
        for _, piece in zip(range(5), pieces(content), strict=False):
            yield piece
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Content, "pieces", fill_up)
        for end in (END + 5, END + 10):
            slot = hold_turn(model, prefixes, TOKENS[:end], answer=1)
            assert slot.cache.offset == end
        prefixes._files.flush()  # type: ignore[union-attr]
    assert [r.message for r in caplog.records] == [
        f"{folder}: a conversation is not kept there: No space left on device"
    ]
    assert len(list(folder.iterdir())) == 2, "those of before, and nothing half-written"
    hold_turn(model, prefixes, TOKENS[: END + 15], answer=1)
    prefixes.close()
    assert len(files_in(folder)) == 2, "the conversation's file was replaced in the end"
    assert prefixes_of(model, folder).take(prompt_of(TOKENS), head=0).cache.offset == END + 15


def test_only_the_last_state_of_a_conversation_is_written(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk is slow; what waits counts as memory, and is waited for if that is short."""
    written, slow = [], threading.Event()
    write = cache_files.write

    def slowly(*given: Any) -> Path:
        slow.wait(60)
        written.append(len(given[2].tokens))
        return write(*given)

    monkeypatch.setattr("mlx_gptoss.cache_folder.write", slowly)
    prefixes = prefixes_of(model, folder)
    for end in (END, END + 5, END + 10):
        slot = hold_turn(model, prefixes, TOKENS[:end], answer=1)
    files = prefixes._files
    assert files is not None and files.waiting_bytes > slot.nbytes / 2
    room = partial(prefixes.make_room, [1], turn_bytes=0)
    room(budget_bytes=2**30)
    assert not written, "there is room for all of it"
    threading.Timer(0.2, slow.set).start()
    room(budget_bytes=0)
    assert written == [HEAD, END + 10] and files.waiting_bytes == 0
    prefixes.close()
    assert len(files_in(folder)) == 2


def test_what_waits_to_be_written_stays_as_it_was(model: Model, folder: Path) -> None:
    """Although its conversation goes back meanwhile, and over it."""
    slot = hold_turn(model, prefixes_of(model, folder), TOKENS[:END])
    content = slot.content()
    before = [bytes(piece) for piece in content.pieces()]
    slot.go_to(STABLE, slot.ledger.states[STABLE])
    for piece in (TOKENS[:30], [7]):
        model.hidden(mx.array([piece]), slot.cache)
        mx.eval(slot.cache.arrays)
    assert [bytes(piece) for piece in content.pieces()] == before
    assert [bytes(piece) for piece in slot.content().pieces()] != before


def test_others_cannot_read_what_was_said(model: Model, folder: Path) -> None:
    before = os.umask(0)
    try:
        files = CacheFolder(folder, identity=IDENTITY)
        files.save(content_of(model, 1)[1])
        files.close()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in files_in(folder)] == [0o600]


def test_a_folder_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheError, match="file: expected a folder for caches, or a place to make"):
        CacheFolder(tmp_path / "file", identity=IDENTITY)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CacheError, match="expected a folder that can be written, got one that"):
        CacheFolder(tmp_path, identity=IDENTITY)
    assert (tmp_path / "file").read_text() == "mine"


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


def fed(model: Model, tokens: Sequence[int]) -> ModelCache:
    cache = model.make_cache()
    model.hidden(mx.array([tokens]), cache)
    return cache


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
        found = files.load([number] * cache_writer.TOKENS + [1], cache, more_than=0)
        assert found is not None and found.length == cache_writer.TOKENS
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
