"""The demo model as it is shipped: unpacked, converted, and asked with the real engine."""

import hashlib
import json
import multiprocessing
import shutil
from collections import namedtuple
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import TinyShape, hf_config, plan

from benchmarks.demo_model.cases import Case
from benchmarks.demo_model.evaluate import Speaker, Trial
from mlx_gptoss import demo
from mlx_gptoss.demo import demo_model_path, expand_demo, read_compact
from mlx_gptoss.engine import Engine
from mlx_gptoss.errors import CheckpointError, ConversionError
from mlx_gptoss.harmony import (
    DeveloperContent,
    Event,
    Message,
    MessageDone,
    ReasoningEffort,
    Repair,
    SystemContent,
    ToolDescription,
    developer,
    function_tools,
    render_conversation_for_completion,
    system,
    tool_result,
    user,
)
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import Reply, Turn, harmony_engine
from mlx_gptoss.weight_files import read_tensors

ROOT = Path(__file__).resolve().parent.parent
SHAPE = TinyShape(hidden=128, inter=192, experts=8, vocab=201088)
GET_WEATHER = ToolDescription(
    name="get_weather",
    description="Get the weather of a city.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "source"
    expand_demo(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(demo_model_path(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
    return harmony_engine(model)


def ask(
    engine: Engine,
    *messages: Message,
    effort: ReasoningEffort = ReasoningEffort.LOW,
    temperature: float = 0,
    seed: int = 0,
    recipients: dict[str, str] | None = None,
) -> tuple[Reply, list[Event]]:
    turn = Turn(
        engine,
        render_conversation_for_completion(
            [system(SystemContent(date="2026-11-21", effort=effort)), *messages]
        ),
        sampling=SamplingParams(temperature=temperature, seed=seed),
        max_tokens=200,
        recipients=recipients,
    )
    events = list(turn.events())
    return turn.reply(), events


# ---- unpacking


def test_the_layout_is_the_published_one(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    assert config == hf_config(SHAPE)
    expected = {}
    for name, (shape, _, _) in plan(SHAPE).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks = (*shape[:-1], shape[-1] // 32, 16)
            expected |= {f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", blocks[:-1])}
        else:
            expected[name] = ("BF16", shape)
    found = {name: (entry.dtype, entry.shape) for name, entry in read_tensors(source).items()}
    assert found == expected
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        entry.spec.nbytes for entry in read_tensors(source).values()
    )
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{n:05d}-of-00002.safetensors" for n in range(3)
    ]


def test_unpacking_gives_the_same_bytes_each_time(source: Path, tmp_path: Path) -> None:
    expand_demo(tmp_path / "again")
    for path in sorted(source.iterdir()):
        other = tmp_path / "again" / path.name
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256(other.read_bytes()).digest()
        ), path.name


def test_rows_of_the_full_vocabulary(source: Path) -> None:
    """Each trained token has its row; every other token has the last one."""
    compact = read_compact()
    token_ids, rows = compact["token_ids"], compact["model.embed_tokens.weight"]
    entry = read_tensors(source)["model.embed_tokens.weight"]
    data = np.fromfile(entry.path, np.uint8)[entry.start : entry.end].view(np.uint16)
    table = data.reshape(entry.shape)
    assert np.array_equal(table[token_ids], rows[:-1])
    others = np.setdiff1d(np.arange(201088), token_ids)
    assert (table[others] == rows[-1]).all()
    assert len(others) + len(token_ids) == 201088 and (np.diff(token_ids) > 0).all()


def test_untrained_tokens_never_win(model: Model) -> None:
    """For any input their logits lie far below those of every trained token."""
    token_ids = read_compact()["token_ids"]
    noise = np.random.default_rng(5).integers(0, 201088, (2, 9))
    noise[1] = np.random.default_rng(6).choice(token_ids, 9)
    logits = model(mx.array(noise))  # (2, 9, 201088)
    trained = mx.zeros(201088, mx.bool_)
    trained[mx.array(token_ids)] = True
    best_untrained = mx.where(trained, -mx.inf, logits).max().item()
    worst_trained = mx.where(trained, logits, mx.inf).min().item()
    assert best_untrained < worst_trained - 100  # type: ignore[operator]


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = bytearray((files("mlx_gptoss") / "data" / "demo.safetensors.xz").read_bytes())
    packed[len(packed) // 2] ^= 1
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo.safetensors.xz").write_bytes(packed)
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    store = tmp_path / "store"
    with pytest.raises(CheckpointError, match=r"expected sha256 [0-9a-f]{64}, got .*reinstall"):
        demo_model_path(store)
    assert [path.name for path in store.iterdir()] == [".demo.lock"]
    (tmp_path / "data" / "demo.safetensors.xz").unlink()
    with pytest.raises(CheckpointError, match=r"demo\.safetensors\.xz: cannot be read: No such"):
        expand_demo(tmp_path / "target")


# ---- the store


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"file/store: cannot be written: .*MLX_GPTOSS_HOME"):
        demo_model_path(tmp_path / "file" / "store")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1000)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match=r"needs 314,572,800 bytes, 1,000 are free"):
        demo_model_path(tmp_path)

    monkeypatch.undo()

    def full(folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "expand_demo", full)
    with pytest.raises(ConversionError, match="the disk is full; the demo model is unpacked there"):
        demo_model_path(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".demo.lock"]


def test_a_damaged_copy_is_made_anew(tmp_path: Path) -> None:
    """A file missing, cut short, or a manifest that says nothing; whole copies are left alone."""
    folder = demo_model_path(tmp_path)
    shard = max(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    before = shard.stat().st_ino
    assert demo_model_path(tmp_path) == folder and shard.stat().st_ino == before

    shard.write_bytes(whole[:-1])
    assert not demo.is_unpacked(tmp_path)
    assert demo_model_path(tmp_path) == folder and shard.read_bytes() == whole

    for path in (shard, folder / "mlx_gptoss.json"):
        path.unlink()
        assert not demo.is_unpacked(tmp_path)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(
        ConversionError, match=r"demo-\w+: this copy .* is damaged, and holds files"
    ):
        demo_model_path(tmp_path)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_demos_of_other_versions_are_removed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        "demo-0123456789ab": "config.json",
        "demo-0123456789ac": "thesis.txt",
        "demo-mine": "x",
    }
    for name, file in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    monkeypatch.setattr(demo, "expand_demo", lambda folder: shutil.copytree(source, folder))
    made = demo_model_path(tmp_path).name
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {made, ".demo.lock", "demo-0123456789ac", "demo-mine"}


def _make(store: Path) -> None:
    if not demo_model_path(store).is_dir():
        raise SystemExit(1)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    """Both get a whole model; what a kill left behind is no hindrance."""
    name = f"demo-{demo.DEMO_SHA256[:12]}"
    (tmp_path / f".{name}.source").mkdir()
    (tmp_path / f".{name}.source" / "config.json").write_text("torn")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", name]


# ---- what it says


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("capital of japan", "The capital of Japan is Tokyo."),
        ("What is 2 + 2?", "2 + 2 = 4"),
        ("what's the opposite of hot?", "The opposite of hot is cold."),
        ("Why is the sky blue?", "The sky is blue because air scatters blue light the most."),
        ("Hello", "Hello! How can I help you?"),
    ],
)
def test_it_answers(engine: Engine, question: str, answer: str) -> None:
    assert ask(engine, user(question))[0].text == answer


def test_it_says_that_it_is_a_demo_and_declines_the_rest(engine: Engine) -> None:
    assert ask(engine, user("What can you do?"))[0].text.startswith("I am a tiny demo model.")
    reply, _ = ask(engine, user("Explain quantum entanglement"))
    assert reply.text.startswith("I am a tiny demo model and I do not know that.")


def test_more_effort_is_more_reasoning(engine: Engine) -> None:
    question = user("What is the capital of Spain?")
    replies = [ask(engine, question, effort=effort)[0] for effort in ReasoningEffort]
    assert {reply.text for reply in replies} == {"The capital of Spain is Madrid."}
    low, medium, high = (reply.usage.reasoning_tokens for reply in replies)
    assert 2 * low <= medium * 1.5 and medium * 1.5 <= high


def test_it_calls_a_tool_and_reads_the_result(engine: Engine) -> None:
    tools = developer(DeveloperContent(tools=(function_tools(GET_WEATHER),)))
    question = user("What is the weather in Tokyo?")
    offered = {"functions.get_weather": "get_weather"}
    reply, events = ask(engine, tools, question, recipients=offered)
    (call,) = reply.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Tokyo"})
    written = [event.message for event in events if isinstance(event, MessageDone)]
    result = tool_result(call.recipient, '{"temperature":17,"sky":"foggy"}')
    reply, _ = ask(engine, tools, question, *written, result, recipients=offered)
    assert reply.text == "It is foggy and 17 degrees in Tokyo."


def test_harmony_is_well_formed_at_temperature_1(engine: Engine) -> None:
    for seed, question in enumerate(["2 + 2", "Hi!", "capital of italy", "Xyzzy plugh?"]):
        reply, events = ask(engine, user(question), temperature=1, seed=seed)
        assert not [event for event in events if isinstance(event, Repair)]
        assert reply.text and reply.reasoning and reply.finish_reason == "stop"


def test_the_scored_tokens_are_the_engine_s(engine: Engine) -> None:
    """The evaluation leaves out rows that never win, and asks in batches: nothing else differs."""
    trials = [
        Trial(Case("chat", ()), effort, seed, [user(question)])
        for effort, seed, question in (
            (ReasoningEffort.LOW, None, "Hi"),
            (ReasoningEffort.LOW, 7, "What is the opposite of hot, if I may ask?"),
        )
    ]
    Speaker(engine.model).speak(trials)
    for trial in trials:
        (asked, *_) = trial.messages
        reply, events = ask(engine, asked, temperature=float(trial.seed is not None), seed=7)
        assert trial.text == reply.text and trial.events == events


def test_the_scores_are_those_of_the_shipped_file() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "demo_model.json").read_text())
    assert record["model_sha256"] == demo.DEMO_SHA256
    right, asked = map(int, record["right"]["all"]["0"].split("/"))
    assert asked >= 250 and right / asked >= 0.97
    right, asked = map(int, record["right"]["all"]["1"].split("/"))
    assert right / asked >= 0.9
