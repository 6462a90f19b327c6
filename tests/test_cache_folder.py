"""Prefix caches in files: the same bits, whatever happens to the disk."""

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cache_folders import (
    END,
    HEAD,
    STABLE,
    TOKENS,
    content_of,
    files_in,
    header_end,
    hold_turn,
    load,
    overwrite,
    prefixes_of,
    prompt_of,
    take,
    wait_for,
)
from cache_writer import IDENTITY
from given import new_model
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss import cache_files
from mlx_gptoss.cache import FullCache
from mlx_gptoss.cache_files import Content
from mlx_gptoss.cache_folder import CacheFolder, Saved
from mlx_gptoss.errors import CacheError
from mlx_gptoss.model import Model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def any_model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(TinyShape(layers=2), dtype=request.param)


@pytest.fixture(scope="module")
def model() -> Model:
    return new_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "caches"


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
    loaded = take(prefixes_of(any_model, folder), prompt)
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
    loaded = take(prefixes_of(model, folder), prompt_of(TOKENS))
    assert loaded.cache.offset == END + 20


def test_a_file_is_read_only_as_far_as_it_is_needed(model: Model, folder: Path) -> None:
    """Another conversation's memory is that of its own tokens, not of the file's."""
    prefixes = prefixes_of(model, folder)
    hold_turn(model, prefixes, TOKENS[:END])
    prefixes.close()
    head, conversation = sorted(files_in(folder), key=lambda path: path.stat().st_size)
    head.unlink()
    slot = take(prefixes_of(model, folder), prompt_of([*TOKENS[:HEAD], 5, 6, 7]))
    [full] = [layer for layer in slot.cache if isinstance(layer, FullCache)]
    assert full.snapshot().frozen[0].shape[2] == HEAD == slot.cache.offset
    assert slot.saved is None and slot.ledger.positions == (HEAD,)
    other = hold_turn(model, prefixes_of(model, folder), [*TOKENS[:HEAD], *range(80)])
    assert other.saved is not None
    wait_for(lambda: len(files_in(folder)) == 3)
    assert conversation.exists(), "it is another conversation's"


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
        slot = take(prefixes, prompt_of(TOKENS))
        assert slot.cache.offset == HEAD, "from the other file"
    assert files_in(folder) == [head]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(
        f"a cached conversation is removed and computed anew: {path}: "
    )


def test_a_file_of_other_layers_is_told_and_removed(
    model: Model, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole by its hash, as somebody else may have written it."""
    prefixes = prefixes_of(model, folder)
    hold_turn(model, prefixes, TOKENS[:END])
    prefixes.close()
    path = max(files_in(folder), key=lambda path: path.stat().st_size)
    DAMAGES["a name"](path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    path = path.rename(path.with_stem(f"{path.stem.partition('-')[0]}-{digest}"))
    slot = take(prefixes_of(model, folder), prompt_of(TOKENS))
    assert slot.cache.offset == HEAD
    assert not path.exists()
    [record] = caplog.records
    assert f"{path}: expected the tensors full.1.keys" in record.message


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
    assert take(prefixes_of(model, folder), prompt_of(TOKENS), head=0).cache.offset == END + 15


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
