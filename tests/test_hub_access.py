"""Names, logins, listings, offline mode and the command: what is refused, and what it says."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_repository import FIRST, REPO, SECOND, WANTED, expect_copy, get, serving
from hub_server import COMMIT, HubServer
from huggingface_hub import constants

from mlx_gptoss import hub
from mlx_gptoss.errors import DownloadError
from mlx_gptoss.hub import download
from mlx_gptoss.hub_cache import find_snapshot


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as running:
        yield running


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
