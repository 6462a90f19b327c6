"""Downloads: every byte proven, nothing fetched twice, every fault survived or named."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_repository import (
    FILES,
    FIRST,
    REPO,
    SECOND,
    WANTED,
    expect_copy,
    get,
    serving,
)
from hub_server import COMMIT, HubServer, git_sha1, sha256
from huggingface_hub import constants

from mlx_gptoss import transfer
from mlx_gptoss.errors import DownloadError
from mlx_gptoss.hub import PUBLISHED
from mlx_gptoss.hub_cache import HubCache, find_snapshot


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as running:
        yield running


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*.incomplete")]


def test_a_download_brings_safetensors_and_json_and_nothing_else(
    server: HubServer, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    result = get(server, tmp_path, progress=lambda *event: seen.append(event))
    expect_copy(result.folder, WANTED)
    size = sum(len(FILES[name]) for name in WANTED)
    assert (result.revision, set(result.files)) == (COMMIT, WANTED)
    assert (result.total_bytes, result.fetched_bytes) == (size, size)
    assert seen[-1] == ("download", size, size)
    assert leftovers(tmp_path) == []


def test_the_original_layout_comes_on_request(server: HubServer, tmp_path: Path) -> None:
    result = get(server, tmp_path, original=True)
    expect_copy(result.folder, WANTED | {"original/config.json", "original/model.safetensors"})


def test_huggingface_hub_finds_our_files_and_we_find_its(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cache for every tool: the layout is proven by the library that defined it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    theirs = huggingface_hub.hf_hub_download(
        REPO, FIRST, cache_dir=tmp_path, endpoint=server.endpoint, token=False
    )
    before = len(server.gets(FIRST))
    result = get(server, tmp_path)
    assert len(server.gets(FIRST)) == before, "a cached file was fetched again"
    assert result.fetched_bytes == sum(len(FILES[n]) for n in WANTED - {FIRST})
    assert Path(theirs) == result.folder / FIRST
    found = huggingface_hub.snapshot_download(REPO, cache_dir=tmp_path, local_files_only=True)
    assert Path(found) == result.folder
    cached = huggingface_hub.try_to_load_from_cache(REPO, SECOND, cache_dir=tmp_path)
    assert cached == str(result.folder / SECOND)


def test_a_second_download_fetches_nothing_but_the_listing(
    server: HubServer, tmp_path: Path
) -> None:
    get(server, tmp_path)
    server.requests.clear()
    seen: list[str] = []
    again = get(server, tmp_path, progress=lambda phase, *_: seen.append(phase))
    assert again.fetched_bytes == 0 and set(seen) == {"verify"}
    assert [path for _, path, _ in server.requests] == [f"/api/models/{REPO}/revision/main"]


def test_broken_connections_are_resumed_where_they_broke(server: HubServer, tmp_path: Path) -> None:
    server.faults[SECOND].cut_after = [1000, 50_000, 7]
    result = get(server, tmp_path)
    expect_copy(result.folder, WANTED)
    assert server.gets(SECOND) == [f"bytes={n}-" for n in (0, 1000, 51_000, 51_007)]
    assert result.fetched_bytes == result.total_bytes, "bytes were fetched twice"


def test_an_interrupted_process_goes_on_where_it_stopped(server: HubServer, tmp_path: Path) -> None:
    """huggingface_hub 2 starts such a file again; a shard is 4.8 GB."""

    def interrupt(phase: str, done: int, total: int) -> None:
        if done > len(FILES[FIRST]) + 1000:
            raise KeyboardInterrupt

    server.faults[SECOND].cut_after = [5000]
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, progress=interrupt)
    assert leftovers(tmp_path) == [f"{sha256(FILES[SECOND])}.incomplete"]
    assert find_snapshot(REPO, cache_dir=tmp_path) is None
    result = get(server, tmp_path)
    expect_copy(result.folder, WANTED)
    assert server.gets(FIRST) == ["bytes=0-"]
    assert server.gets(SECOND)[-1] == "bytes=5000-"
    assert leftovers(tmp_path) == []


def test_a_server_that_ignores_ranges_does_not_double_the_start(
    server: HubServer, tmp_path: Path
) -> None:
    server.faults[SECOND].cut_after = [5000]
    server.faults[SECOND].ignore_range = True
    seen: list[int] = []
    result = get(server, tmp_path, progress=lambda _, done, total: seen.append(done))
    expect_copy(result.folder, WANTED)
    assert seen[-1] == result.total_bytes


def test_server_errors_pass(server: HubServer, tmp_path: Path) -> None:
    server.faults[FIRST].status = [500, 503, 429, 200]
    expect_copy(get(server, tmp_path).folder, WANTED)
    assert len(server.gets(FIRST)) == 4


def test_a_server_that_says_nothing_is_asked_again(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    server.faults[SECOND].stall_s = [3.0]
    expect_copy(get(server, tmp_path).folder, WANTED)
    assert len(server.gets(SECOND)) >= 2  # more where the machine is busy


def test_a_connection_that_brings_nothing_more_is_given_up(
    server: HubServer, tmp_path: Path
) -> None:
    server.faults[SECOND].cut_after = [1000] + [0] * 10
    with pytest.raises(
        DownloadError, match=r"got 1000 of \d+ bytes, then nothing in 4 attempts .*"
    ):
        get(server, tmp_path)
    assert leftovers(tmp_path) == [f"{sha256(FILES[SECOND])}.incomplete"]
    server.faults.clear()
    expect_copy(get(server, tmp_path).folder, WANTED)
    assert server.gets(SECOND)[-1] == "bytes=1000-"


@pytest.mark.parametrize("name", [FIRST, "config.json"])
def test_a_wrong_hash_is_fetched_once_more(server: HubServer, tmp_path: Path, name: str) -> None:
    """Both kinds of hash: sha256 of large files, git's sha1 of small ones."""
    server.faults[name].flip = [True, False]
    expect_copy(get(server, tmp_path).folder, WANTED)
    assert len(server.gets(name)) == 2


@pytest.mark.parametrize("name", [FIRST, "config.json"])
def test_a_hash_wrong_twice_is_an_error_and_leaves_nothing(
    server: HubServer, tmp_path: Path, name: str
) -> None:
    server.faults[name].flip = [True] * 5
    want = sha256(FILES[name]) if name == FIRST else git_sha1(FILES[name])
    with pytest.raises(DownloadError, match=rf"{name}: expected hash {want}, got \w+, twice"):
        get(server, tmp_path)
    assert leftovers(tmp_path) == []
    assert not any(path.name == want for path in tmp_path.rglob("*"))
    assert find_snapshot(REPO, cache_dir=tmp_path) is None


def test_a_wrong_size_is_an_error(server: HubServer, tmp_path: Path) -> None:
    server.faults[FIRST].wrong_length = 9
    size = len(FILES[FIRST])
    with pytest.raises(DownloadError, match=f"expected {size} bytes, the hub sends {size + 9}"):
        get(server, tmp_path)


def test_a_damaged_file_in_the_cache_is_replaced(server: HubServer, tmp_path: Path) -> None:
    blob = get(server, tmp_path).folder / FIRST
    damaged = bytearray(FILES[FIRST])
    damaged[77] ^= 4
    blob.resolve().write_bytes(damaged)
    again = get(server, tmp_path)
    assert again.fetched_bytes == len(FILES[FIRST])
    expect_copy(again.folder, WANTED)


def test_a_full_disk_is_found_before_the_first_byte(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(DownloadError, match=r"expected 0\.0 GB free for .*, got 0\.0 GB"):
        get(server, tmp_path)
    assert server.gets(FIRST) == server.gets("config.json") == []


def test_a_disk_that_fills_up_keeps_what_was_received(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(transfer.FileIO):
        def write(self, data: object) -> int:
            if self.tell() >= 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(memoryview(data)[:1000])  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "FileIO", FullDisk)
    with pytest.raises(DownloadError, match="No space left on device; what was received is kept"):
        get(server, tmp_path)
    [partial] = tmp_path.rglob("*.incomplete")
    assert partial.stat().st_size == 1000


def test_two_processes_do_not_write_one_file(server: HubServer, tmp_path: Path) -> None:
    blob = HubCache(REPO, tmp_path).root / "blobs" / git_sha1(FILES["config.json"])
    blob.parent.mkdir(parents=True)
    with (
        transfer.open_partial(transfer.partial_path(blob), "config.json"),
        pytest.raises(DownloadError, match=r"config\.json: another process is downloading it"),
    ):
        get(server, tmp_path)
    expect_copy(get(server, tmp_path).folder, WANTED)


def test_published_sizes_follow_from_the_published_shapes() -> None:
    from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B

    for name, config in (("20b", GPT_OSS_20B), ("120b", GPT_OSS_120B)):
        h, d = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        e, width = config.num_local_experts, config.intermediate_size
        attention = (q + 2 * kv) * (h + 1) + q * h + h + config.num_attention_heads
        dense = attention + e * (h + 1) + 2 * h + e * (2 * width + h)  # bf16 values of a layer
        experts = e * 3 * h * width * 17 // 32  # 4 bits a weight and a scale byte for 32 of them
        per_layer = 2 * dense + experts
        size = config.num_hidden_layers * per_layer + 2 * h * (2 * config.vocab_size + 1)
        assert PUBLISHED[name].weights_bytes == size
