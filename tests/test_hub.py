"""Downloads: every byte proven, nothing fetched twice, every fault survived or named."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, HubServer, git_sha1, sha256
from huggingface_hub import constants

from mlx_gptoss import hub, transfer
from mlx_gptoss.errors import DownloadError
from mlx_gptoss.hub import PUBLISHED, Download, download
from mlx_gptoss.hub_cache import HubCache, find_snapshot

REPO = "someone/gpt-oss-tiny"
SHARDS = {
    f"model-0000{i}-of-00002.safetensors": bytes(range(256)) * (300 * i) + bytes([i])
    for i in (1, 2)
}
INDEX = {"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(SHARDS)}}
FILES = {
    "config.json": b'{"model_type": "gpt_oss"}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **SHARDS,
    "original/config.json": b"{}",
    "original/model.safetensors": b"another layout" * 100,
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# a card",
    "metal/model.bin": b"a third layout",
}
WANTED = {name for name in FILES if "/" not in name and name.endswith((".json", ".safetensors"))}
FIRST, SECOND = SHARDS


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process alone can reach; waits between attempts are shortened."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 20)
    monkeypatch.setattr(transfer, "BACKOFF_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with HubServer({REPO: dict(FILES)}) as running:
        yield running
    huggingface_hub.close_session()


def get(server: HubServer, cache: Path, **options: object) -> Download:
    return download(REPO, cache_dir=cache, endpoint=server.endpoint, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def expect_copy(folder: Path, names: set[str]) -> None:
    assert contents(folder) == {name: FILES[name] for name in names}


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


@pytest.mark.parametrize(
    ("repo", "revision", "says"),
    [
        ("someone/else", "main", "no such repository, revision or file"),
        (REPO, "v2", "no such repository, revision or file"),
        ("gpt-oss-20b", "main", "expected a hub id like openai/gpt-oss-20b, got 'gpt-oss-20b'"),
        ("a/../b", "main", "expected a hub id like"),
        (REPO, "../main", "expected a branch, tag or commit, got"),
    ],
)
def test_a_name_that_does_not_exist(
    server: HubServer, tmp_path: Path, repo: str, revision: str, says: str
) -> None:
    with pytest.raises(DownloadError, match=says):
        download(repo, revision=revision, cache_dir=tmp_path, endpoint=server.endpoint)


def test_a_gated_repository_names_the_login(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "hf_test"
    with pytest.raises(
        DownloadError, match=r"is gated: accept its terms .* `hf auth login` or set"
    ):
        get(server, tmp_path)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_test")
    expect_copy(get(server, tmp_path).folder, WANTED)


def test_the_token_stays_with_the_hub_and_nothing_else_is_told(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    get(server, tmp_path)
    for _, path, headers in server.requests:
        agent = headers["user-agent"]
        assert agent.startswith("mlx-gptoss/") and " " not in agent
        assert ("authorization" in headers) == (not path.startswith("/cdn/")), path
        if path.startswith("/cdn/"):  # a compressed body could be neither resumed nor measured
            assert headers["accept-encoding"] == "identity"
        ordinary = {"host", "accept", "accept-encoding", "connection", "user-agent", "range"}
        assert set(headers) <= ordinary | {"authorization", "x-amzn-trace-id"}, path


def test_an_unreachable_hub_is_one_clear_line(tmp_path: Path, server: HubServer) -> None:
    with pytest.raises(
        DownloadError, match=r"cannot reach http://127\.0\.0\.1:9 \(ConnectE.*--offline"
    ):
        download(REPO, cache_dir=tmp_path, endpoint="http://127.0.0.1:9")


def test_an_overloaded_hub_is_asked_again_for_its_listing(
    server: HubServer, tmp_path: Path
) -> None:
    server.faults[""].status = [500, 200]
    expect_copy(get(server, tmp_path).folder, WANTED)
    server.faults[""].status = [500] * 9
    with pytest.raises(DownloadError, match="HTTP status 500"):
        get(server, tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"rfilename": "../evil.json", "size": 1, "blobId": "0" * 40},
        {"rfilename": "/evil.json", "size": 1, "blobId": "0" * 40},
        {"rfilename": "evil.json", "size": 1, "blobId": "../../evil"},
        {"rfilename": "no_hash.json", "size": 1},
    ],
)
def test_a_listing_cannot_write_outside_the_cache(
    server: HubServer, tmp_path: Path, entry: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "listing", lambda _: {"sha": COMMIT, "siblings": [entry]})
    with pytest.raises(DownloadError, match="did not answer as a hub does"):
        get(server, tmp_path)


@pytest.mark.parametrize("commit", ["../../evil", None, "main"])
def test_a_commit_is_a_hash(
    server: HubServer, tmp_path: Path, commit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "listing", lambda _: {"sha": commit, "siblings": []})
    with pytest.raises(DownloadError, match="did not answer as a hub does"):
        get(server, tmp_path)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("revision", ["", "/etc", "../.."])
def test_a_revision_is_no_path(
    server: HubServer, tmp_path: Path, revision: str, offline: bool
) -> None:
    with pytest.raises(DownloadError, match=f"expected a branch, tag or commit, got '{revision}'"):
        get(server, tmp_path, revision=revision, offline=offline)


def test_a_repository_of_pickles_is_refused(server: HubServer, tmp_path: Path) -> None:
    server.repos[REPO] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(DownloadError, match="pickled weights are never loaded"):
        get(server, tmp_path)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_uses_a_complete_copy_and_proves_it(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    get(server, tmp_path)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    result = get(server, tmp_path, offline=how == "argument")
    assert set(result.files) == WANTED and result.fetched_bytes == 0 and server.requests == []
    blob = (result.folder / FIRST).resolve()
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    with pytest.raises(DownloadError, match=rf"{FIRST}: expected hash .*the copy is damaged"):
        get(server, tmp_path, offline=True)


def test_offline_without_a_copy_says_what_to_do(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"offline, and not in the cache at .*go online \(unset"
    ):
        get(server, tmp_path, offline=True)
    folder = get(server, tmp_path).folder
    os.unlink(folder / SECOND)
    with pytest.raises(DownloadError, match=f"offline, and .* lacks {SECOND}"):
        get(server, tmp_path, offline=True)
    assert find_snapshot(REPO, cache_dir=tmp_path) is None


def test_the_environment_is_left_alone(server: HubServer, tmp_path: Path) -> None:
    before = dict(os.environ)
    get(server, tmp_path)
    assert dict(os.environ) == before


def download_command(endpoint: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": "."}
    settings.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-m", "mlx_gptoss", "download", REPO, *arguments],
        env=settings | env,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )


def test_the_command_prints_the_folder_and_honours_the_hubs_environment(
    server: HubServer, tmp_path: Path
) -> None:
    """A process of its own: HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE are read at import."""
    online = download_command(server.endpoint, HF_HUB_CACHE=str(tmp_path))
    assert online.returncode == 0, online.stderr
    expect_copy(Path(online.stdout.removesuffix("\n")), WANTED)
    assert re.search(r"^download: [\d.]+ kB of 230\.\d kB", online.stderr, re.MULTILINE)
    assert "4 files, 230." in online.stderr and "all hashes are right" in online.stderr
    server.requests.clear()
    for offline in (
        download_command(server.endpoint, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"),
        download_command(server.endpoint, "--offline", "-q", HF_HUB_CACHE=str(tmp_path)),
    ):
        assert (offline.returncode, offline.stdout) == (0, online.stdout), offline.stderr
    assert offline.stderr == "" and server.requests == []
    nothing = download_command(server.endpoint, "--offline", HF_HUB_CACHE=str(tmp_path / "else"))
    assert nothing.returncode == 1 and nothing.stdout == ""
    [line] = nothing.stderr.splitlines()
    assert line.startswith(f"Error: {REPO} at main: offline, and not in the cache at ")


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
