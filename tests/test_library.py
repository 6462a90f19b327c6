"""Model names: each finds its folder without a network, or says which commands bring it."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import write_checkpoint

from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.errors import CheckpointError, ModelNotFoundError
from mlx_gptoss.library import converted_folder, find_model, find_source, model_store
from mlx_gptoss.manifest import MANIFEST

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repo_id: str, source: Path) -> Path:
    """Put a checkpoint into a hub cache as huggingface_hub lays it out."""
    root = cache / ("models--" + repo_id.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(source, root / "snapshots" / COMMIT))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", layers=2)


def test_the_store_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model_store() == Path.home() / ".cache/mlx-gptoss"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model_store() == tmp_path / "xdg/mlx-gptoss"
    monkeypatch.setenv("MLX_GPTOSS_HOME", "~/models")
    assert model_store() == Path.home() / "models"


def test_a_store_below_no_home_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GPTOSS_HOME", "~nobody-here/models")
    with pytest.raises(
        ModelNotFoundError, match=r"~nobody-here/models: this user has no home.*set"
    ):
        model_store()


def test_the_demo_is_made_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(demo_model_path=lambda store: store / "demo-1234")
    monkeypatch.setitem(sys.modules, "mlx_gptoss.demo", made)
    assert find_model("demo") == model_store() / "demo-1234"


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["20b", "openai/gpt-oss-20b"])
def test_a_published_model_goes_from_nothing_to_download_to_converted(
    tmp_path: Path, source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = shutil.disk_usage(tmp_path)._replace(free=40_100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space)
    with pytest.raises(
        ModelNotFoundError,
        match=r"20b: not on this machine; run `mlx-gptoss download 20b` "
        r"\(13\.8 GB, 40\.1 GB free\), then `mlx-gptoss convert 20b`",
    ):
        find_model(name, cache_dir=tmp_path / "hub")
    cached(tmp_path / "hub", "openai/gpt-oss-20b", source)
    with pytest.raises(ModelNotFoundError, match=r"20b: downloaded, but not converted: .*run `mlx"):
        find_model(name, cache_dir=tmp_path / "hub")
    converted_folder("20b").mkdir(parents=True)
    (converted_folder("20b") / MANIFEST).touch()
    assert find_model(name, cache_dir=tmp_path / "hub") == converted_folder("20b")


def test_the_size_of_the_larger_one_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"download 120b` \(65\.2 GB, .* convert 120b`"):
        find_model("120b", cache_dir=tmp_path)


def test_a_hub_id_is_found_in_the_cache_if_complete(tmp_path: Path, source: Path) -> None:
    snapshot = cached(tmp_path, "someone/tuned", source)
    assert find_model("someone/tuned", cache_dir=tmp_path) == snapshot
    assert find_source("someone/tuned", cache_dir=tmp_path) == snapshot
    next(snapshot.glob("model-00002*")).unlink()
    for find in (find_model, find_source):
        with pytest.raises(ModelNotFoundError, match="run `mlx-gptoss download someone/tuned`"):
            find("someone/tuned", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": 5}',
        "[]",
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_copy_in_the_cache_is_no_copy(tmp_path: Path, source: Path, index: str) -> None:
    snapshot = cached(tmp_path, "someone/tuned", source)
    file = snapshot / "model.safetensors.index.json"
    file.write_text(index, errors="surrogateescape")
    with pytest.raises(ModelNotFoundError, match="run `mlx-gptoss download someone/tuned`"):
        find_model("someone/tuned", cache_dir=tmp_path)
    (snapshot.parent.parent / "refs/main").write_bytes(b"\xff")
    with pytest.raises(ModelNotFoundError, match="run `mlx-gptoss download someone/tuned`"):
        find_model("someone/tuned", cache_dir=tmp_path)


def test_a_source_folder_names_the_converter(source: Path) -> None:
    with pytest.raises(CheckpointError, match="mlx-gptoss convert"):
        open_checkpoint(find_model(str(source)))


def test_names_that_are_nothing(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.touch()
    with pytest.raises(ModelNotFoundError, match="expected a folder with a converted model, got a"):
        find_model(str(file))
    with pytest.raises(
        ModelNotFoundError, match=r"nonsense: expected demo, 20b, 120b, a folder or"
    ):
        find_model("nonsense")
    with pytest.raises(ModelNotFoundError, match="expected demo, 20b, 120b, a folder or a hub id"):
        find_model("./no/such/folder")
    with pytest.raises(ModelNotFoundError, match=r"~nobody-here/x: expected demo, 20b, 120b"):
        find_model("~nobody-here/x")
    with pytest.raises(ModelNotFoundError, match=r"^'': expected demo, 20b, 120b, a folder or a"):
        find_model("")  # and not the folder one is in
    assert find_source("~nobody-here/x") == Path("~nobody-here/x")


def test_a_source_is_a_folder_or_a_name(tmp_path: Path, source: Path) -> None:
    assert find_source(str(source)) == source
    assert find_source("./no/such/folder") == Path("no/such/folder")
    with pytest.raises(ModelNotFoundError, match=r"run `mlx-gptoss download 20b` \(13\.8 GB, "):
        find_source("20b", cache_dir=tmp_path)
    snapshot = cached(tmp_path, "openai/gpt-oss-20b", source)
    assert find_source("20b", cache_dir=tmp_path) == snapshot
