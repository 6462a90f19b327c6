"""A small repository on a hub that this process alone can reach, and what a download brings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants

from mlx_gptoss import hub, transfer
from mlx_gptoss.hub import Download, download

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


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run the hub; waits between attempts are shortened."""
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
