"""Verification: it passes what is right, and finds each thing that we break on purpose."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from tiny import TinyShape, write_checkpoint

from mlx_gptoss import cache, machine, matrix, model_info, reference, transcripts, verify
from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.cli import main
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import MachineError
from mlx_gptoss.kernel_faults import kernel_fault
from mlx_gptoss.kernels import selection, trials
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.library import find_model
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.model import load_model
from mlx_gptoss.routes import layers_alone, sample_prompt
from mlx_gptoss.transcripts import Transcript, score, weights_digest
from mlx_gptoss.verify import Check, Outcome

SMALL = TinyShape(layers=2, hidden=128, inter=96, q_heads=12, kv_heads=3, experts=12, vocab=640)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    convert_checkpoint(
        write_checkpoint(folder / "source", shape=SMALL), folder / "model", dense="q8"
    )
    return folder / "model"


@pytest.fixture
def model(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def failed(checks) -> list[Check]:
    return [check for check in checks if check.outcome is Outcome.FAILED]


def test_a_right_model_passes(converted):
    checks = list(verify.verify(converted))
    assert not failed(checks)
    names = [check.name for check in checks]
    assert names == [
        "files",
        "constants",
        "rotation",
        "layers",
        "products",
        "kernels",
        "routes",
        "answer",
    ]
    assert checks[-1].outcome is Outcome.SKIPPED  # no answer is stored for random weights
    assert checks[5].outcome is Outcome.SKIPPED  # there is no Metal here
    assert checks[-2].numbers["mean_kl"] < 0.005
    assert checks[3].numbers["worst"] < 2e-5


def test_the_peak_is_the_planned_one(tmp_path):
    """Within 5 %, of a model whose weights are most of it, as they are of every real one."""
    shape = dataclasses.replace(SMALL, inter=288, hidden=320, q_heads=10, kv_heads=2, vocab=32768)
    source = write_checkpoint(tmp_path / "source", shape=shape)
    folder = convert_checkpoint(source, tmp_path / "model", verify=False).target
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert not failed(verify.verify(folder, embedding="file"))
    peak = mx.get_peak_memory() - before
    planned = verify.planned_bytes(open_checkpoint(folder), embedding="file")
    assert abs(planned / peak - 1) <= 0.05, f"planned {planned}, measured {peak}"


def test_what_does_not_fit_is_refused_before_it_is_loaded(model, monkeypatch):
    """On a Mac it would end in a restart. One byte more, and it begins."""
    checkpoint = open_checkpoint(model)
    needed = verify.planned_bytes(checkpoint, embedding="memory")
    in_file = verify.planned_bytes(checkpoint, embedding="file")
    assert needed - in_file == model_info.parts(checkpoint)["embedding"].nbytes
    next(verify.verify(model, limit_bytes=needed))
    next(verify.verify(model, limit_bytes=in_file, embedding="file"))
    with pytest.raises(MachineError, match=r"checks its files alone$"):
        next(verify.verify(model, limit_bytes=in_file - 1, embedding="file"))
    here = dataclasses.replace(machine.read_machine(), working_set_bytes=needed - 1)
    monkeypatch.setattr(machine, "read_machine", lambda: here)
    monkeypatch.setattr(verify, "load_model", lambda *_, **__: pytest.fail("loaded"))
    result = CliRunner().invoke(main, ["verify", str(model)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        r"Error: memory: verifying a model of 0\.00 GB needs 0\.0\d GB, this machine lets 0\.0\d "
        r"GB be used; `mlx-gptoss info --hashes` checks its files alone, and --embedding file "
        r"saves the memory of the table\n",
        result.stderr,
    ), result.stderr


def test_one_flipped_bit_in_any_file(converted, tmp_path):
    """Every shard and every small file: one bit, anywhere in it."""
    names = sorted(open_checkpoint(converted).manifest["files"])
    assert sum(name.endswith(".safetensors") for name in names) >= 3
    for n, name in enumerate(names):
        folder = Path(shutil.copytree(converted, tmp_path / str(n)))
        content = bytearray((folder / name).read_bytes())
        place = len(content) - 1 - 37 * n % (len(content) // 2)
        content[place] ^= 1 << n % 8
        (folder / name).write_bytes(content)
        [*_, last] = verify.verify(folder)
        assert last.outcome is Outcome.FAILED, name
        assert str(folder) in last.detail


def test_a_truncated_file(model):
    shard = max(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5000])
    (check,) = verify.verify(model)
    assert check.outcome is Outcome.FAILED and shard.name in check.detail


def test_a_missing_file(model):
    max(model.glob("*.safetensors")).unlink()
    (check,) = verify.verify(model)
    assert (check.name, check.outcome) == ("files", Outcome.FAILED)


@pytest.mark.parametrize("kept", ["with a manifest", "of another tool"])
def test_a_wrong_rope_factor(model, kept):
    raw = json.loads((model / "config.json").read_text())
    raw["rope_scaling"]["factor"] = 16.0
    (model / "config.json").write_text(json.dumps(raw))
    if kept == "of another tool":
        (model / "mlx_gptoss.json").unlink()
    first = next(check for check in verify.verify(model) if check.outcome is Outcome.FAILED)
    if kept == "of another tool":
        assert first.name == "constants" and "factor=16.0" in first.detail
    else:
        assert first.name == "files" and "config.json" in first.detail


def skip_last_block(x, weights, **options):
    """A product that forgets its last 32 columns, as a tile of the wrong size would."""
    columns = mx.arange(x.shape[-1]) < x.shape[-1] - 32
    return matrix.linear(mx.where(columns, x, 0), weights, **options)


def next_expert(x, weights, experts, **options):
    return matrix.expert_linear(x, weights, (experts + 1) % weights.weight.shape[0], **options)


def few_rows_right(x, weights):
    """Right for a single token and wrong for a tile: seen in builds of MLX for M5."""
    y = matrix.linear(x, weights)
    return y if x.shape[0] < 8 else mx.concatenate([y[:8], y[:-8]])


@pytest.mark.parametrize(
    "name, wrong",
    [("linear", skip_last_block), ("linear", few_rows_right), ("expert_linear", next_expert)],
)
def test_a_product_made_wrong_on_purpose(converted, monkeypatch, name, wrong):
    monkeypatch.setattr(verify, name, wrong)
    check = verify._products(load_model(converted))
    assert check.outcome is Outcome.FAILED and "computes wrongly" in check.detail


def test_a_step_that_forgets_the_oldest_key(converted, monkeypatch):
    """A window of 127 when decoding, of 128 when reading a prompt."""
    right = reference.attention_window

    def short(q, keys, values, sinks, *, scale, offset, start):
        oldest = mx.array([offset - keys.shape[2] + 2])
        return right(q, keys, values, sinks, scale=scale, offset=offset, start=oldest)

    monkeypatch.setattr(reference, "attention_window", short)
    check = verify._layers(open_checkpoint(converted), None)
    assert check.outcome is Outcome.FAILED and "token by token" in check.detail


def test_a_ring_that_writes_one_slot_late(converted, monkeypatch):
    right = cache.WindowCache.append

    def late(self, keys, values):
        self.offset += 1
        ring = right(self, keys, values)
        self.offset -= 1
        return ring

    monkeypatch.setattr(cache.WindowCache, "append", late)
    check = verify._layers(open_checkpoint(converted), None)
    assert check.outcome is Outcome.FAILED and "token by token" in check.detail


def test_chunks_that_lose_a_key(converted, monkeypatch):
    right = cache.FullCache.extend

    def forgetful(self, keys, values):
        found = right(self, keys, values)
        return tuple(mx.where(mx.arange(a.shape[2])[:, None] == 1, 0, a) for a in found)

    monkeypatch.setattr(cache.FullCache, "extend", forgetful)
    check = verify._layers(open_checkpoint(converted), None)
    assert check.outcome is Outcome.FAILED


def test_a_whole_model_that_steps_wrongly(converted, monkeypatch):
    right = reference.attention_window
    monkeypatch.setattr(reference, "attention_window", lambda *a, **k: -right(*a, **k))
    assert verify._routes(load_model(converted)).outcome is Outcome.FAILED


def test_layers_alone_are_the_layers(converted):
    """The last layer alone, of a model whose embedding is cut: the same weights as in the whole."""
    part, whole = (
        layers_alone(open_checkpoint(converted), range(1, 2)),
        load_model(converted),
    )
    assert part.config.layer_types == whole.config.layer_types[1:]
    assert mx.array_equal(part.layers[0][1].gate.weight, whole.layers[1][1].gate.weight)
    assert part.embedding.weight.shape[0] == part.config.vocab_size == 256


@pytest.fixture
def metal(monkeypatch):
    """The emulator poses as a Metal device; rows above the slot are undefined by design."""
    with emulate(mode="plain", allow=("unwritten-output",)):
        monkeypatch.setattr(trials, "BATCHES", (1, 5))  # the others cost seconds
        chunk = {"batch": 2, "base": 110, "tokens": 67}
        monkeypatch.setitem(trials.ASKED, "attention_window_prefill", [chunk])
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        yield


def test_kernels_with_these_weights(converted, metal, monkeypatch):
    """All of them agree; one made wrong on purpose does not, and is named."""
    model = load_model(converted, kernels="off")
    check = verify._kernels(model)
    assert check.outcome is Outcome.PASSED, check.detail
    right = KERNELS["experts_swiglu"]
    wrong = dataclasses.replace(
        right, launch=lambda **arguments: right.launch(**{**arguments, "limit": 1.5})
    )
    monkeypatch.setitem(KERNELS, "experts_swiglu", wrong)
    monkeypatch.setattr(
        selection, "KERNELS", {"experts_swiglu": wrong, "route": KERNELS["route"]}
    )  # the others have been seen to agree
    check = verify._kernels(model)
    assert check.outcome is Outcome.FAILED
    assert "experts_swiglu in layer 0 differs by" in check.detail
    assert "route in" not in check.detail


def test_the_whole_model_by_its_kernels(converted, metal, monkeypatch):
    """A prompt in chunks past the window and decoded tokens; and one kernel wrong on purpose."""
    model = load_model(converted, kernels="off")
    monkeypatch.setattr(verify, "STEPS", 5)
    mx.disable_compile()  # emulated kernels run when they are called, which a trace is not
    try:
        check = verify._steps(model)
        assert check.outcome is Outcome.PASSED, check.detail
        assert check.numbers["mean_kl"] < 0.01 and 0 < check.numbers["decoded_gap"] < 0.05
        right = KERNELS["attention_window"]

        def no_sinks(q, frozen, append, sinks, **options):
            return right.launch(
                q, frozen, append, mx.full(sinks.shape, 9.0, sinks.dtype), **options
            )

        wrong = dataclasses.replace(right, launch=no_sinks)
        monkeypatch.setitem(KERNELS, "attention_window", wrong)
        check = verify._steps(model)
        assert check.outcome is Outcome.FAILED and check.numbers["decoded_gap"] > 0.2
        assert check.numbers["mean_kl"] < 0.01  # prompts do not use this one
    finally:
        mx.enable_compile()


def test_kernels_get_these_weights(converted, metal, monkeypatch):
    """A kernel that is right for random weights and wrong for the user's is found."""
    model, right = load_model(converted, kernels="off"), KERNELS["out_residual"]
    theirs = model.layers[1][0].out.weight

    def launch(x, matrix, residual):
        y = right.launch(x=x, matrix=matrix, residual=residual)
        return -y if mx.array_equal(matrix.weight, theirs) else y

    monkeypatch.setitem(KERNELS, "out_residual", dataclasses.replace(right, launch=launch))
    assert kernel_fault("out_residual", model, layer=0) == ""
    assert "differs by" in kernel_fault("out_residual", model, layer=1)


def test_a_kernel_that_is_wrong_for_some_batches(converted, metal, monkeypatch):
    """Five rows, with these weights, in the last layer alone."""
    model, right = load_model(converted, kernels="off"), KERNELS["route"]
    theirs = model.layers[-1][1].router.weight

    def launch(x, router, **rest):
        y, logits = right.launch(x=x, router=router, **rest)
        return y, -logits if x.shape[0] == 5 and router.weight is theirs else logits

    monkeypatch.setitem(KERNELS, "route", dataclasses.replace(right, launch=launch))
    assert kernel_fault("route", model, layer=0) == ""
    assert "differs by" in kernel_fault("route", model, layer=len(model.layers) - 1)


def test_a_kernel_that_raises(converted, metal, monkeypatch):
    def launch(**arguments):
        raise RuntimeError("program_source:7: error\nmore")

    wrong = dataclasses.replace(KERNELS["route"], launch=launch)
    monkeypatch.setitem(KERNELS, "route", wrong)
    fault = kernel_fault("route", load_model(converted, kernels="off"), layer=0)
    assert fault == "failed: program_source:7: error"


@pytest.fixture
def stored(converted, tmp_path, monkeypatch) -> Path:
    """The converted model with its own answer in the store of transcripts."""
    prompt = tuple(sample_prompt(open_checkpoint(converted).config, 140))
    model, tokens = load_model(converted), ()
    for _ in range(12):
        guess = Transcript(prompt=prompt, tokens=(*tokens, 0), logprobs=())
        tokens = (*tokens, score(model, guess).tokens[-1])
    answer = score(model, Transcript(prompt=prompt, tokens=tokens, logprobs=()))
    digest = weights_digest(open_checkpoint(converted))
    (tmp_path / "data").mkdir()
    text = json.dumps({digest: {**vars(answer)}})
    (tmp_path / "data" / transcripts.FILE).write_text(text)
    monkeypatch.setattr(transcripts, "files", lambda package: tmp_path)
    return converted


def test_a_stored_answer(stored, monkeypatch):
    checkpoint, model = open_checkpoint(stored), load_model(stored)
    assert verify._answer(checkpoint, model).outcome is Outcome.PASSED
    monkeypatch.setattr(
        reference, "swiglu", lambda gate, up, **limits: gate * mx.sigmoid(gate) * up
    )
    check = verify._answer(checkpoint, model)
    assert check.outcome is Outcome.FAILED and check.numbers["top1"] < 0.95


def test_the_command(model):
    result = CliRunner().invoke(main, ["verify", str(model), "--json"])
    assert result.exit_code == 0
    assert [c["outcome"] for c in json.loads(result.stdout)["checks"]] == ["ok"] * 5 + [
        "skipped",
        "ok",
        "skipped",
    ]
    shard = min(model.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    result = CliRunner().invoke(main, ["verify", str(model), "--quiet"])
    assert result.exit_code == 1
    assert result.stdout.startswith("FAILED   files")
    assert result.stderr.startswith(f"Error: {model}: files: {shard}: expected sha256")
    assert result.stderr.count("\n") == 1


def test_what_is_infinitely_far_is_null_in_json(model, monkeypatch):
    """Infinity is no JSON."""
    far = verify._passed("products", False, "no number", worst=float("inf"), rest=2.0)
    monkeypatch.setattr(verify, "verify", lambda *_, **__: [far])
    result = CliRunner().invoke(main, ["verify", str(model), "--json"])
    [check] = json.loads(result.stdout, parse_constant=pytest.fail)["checks"]
    assert result.exit_code == 1 and check["numbers"] == {"worst": None, "rest": 2.0}


def test_the_demo_gives_its_stored_answer():
    """A demo made anew needs a new answer: see benchmarks/record_transcript.py."""
    folder = find_model("demo")
    check = verify._answer(open_checkpoint(folder), load_model(folder))
    assert check.outcome is Outcome.PASSED, check.detail
