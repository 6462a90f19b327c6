"""The forward pass gives the same logits by every route: whole, chunked, step by step, batched."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import PUBLISHED_ROPE, TinyShape, hf_tensors
from weights import experts_packed, mlx_weights, tiny_config, tiny_model

from mlx_gptoss.checkpoint import Quantization
from mlx_gptoss.config import FULL, SLIDING
from mlx_gptoss.errors import CacheError
from mlx_gptoss.model import Model, load_model

TOLERANCE = 3e-4  # float32, other orders of summation; logits reach 30


def small(layers: int) -> TinyShape:
    return TinyShape(
        layers=layers,
        hidden=96,
        inter=32,
        q_heads=4,
        kv_heads=2,
        experts=6,
        chosen=3,
        vocab=320,
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(small(2))


def prompt(count: int, *, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 320, (1, count)))


def assert_same(got: mx.array, expected: mx.array, case: str) -> None:
    assert got.shape == expected.shape, case
    difference = mx.abs(got - expected)
    worst, mean = difference.max().item(), difference.mean().item()
    assert worst <= TOLERANCE, f"{case}: max difference {worst:.2e}, mean {mean:.2e}"


def in_chunks(model: Model, tokens: mx.array, sizes: list[int]) -> mx.array:
    cache = model.make_cache(tokens.shape[0])
    ends = list(itertools.accumulate(sizes))
    assert ends[-1] == tokens.shape[1]
    parts = []
    for size, end in zip(sizes, ends, strict=True):
        parts.append(model(tokens[:, end - size : end], cache))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("count", [1, 2, 126, 127, 128, 129, 130, 255, 256, 257])
def test_step_by_step_equals_whole(model: Model, count: int) -> None:
    tokens = prompt(count)
    assert_same(in_chunks(model, tokens, [1] * count), model(tokens), f"{count} tokens")


@pytest.mark.parametrize(
    "sizes",
    [
        [64] * 7 + [2],
        [100, 200, 150],
        [1, 127, 1, 128, 129, 1, 63],
        [128, 128, 128, 66],
        [127, 129, 1, 1, 1, 191],
        [449, 1],
        [1, 449],
        [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 69],
    ],
    ids=str,
)
def test_chunks_equal_whole(model: Model, sizes: list[int]) -> None:
    tokens = prompt(450)
    assert_same(in_chunks(model, tokens, sizes), model(tokens), str(sizes))


def test_every_split_in_two_around_the_window(model: Model) -> None:
    tokens = prompt(260)
    whole = model(tokens)
    for first in (1, 2, 63, 126, 127, 128, 129, 130, 131, 255, 256, 257, 259):
        assert_same(in_chunks(model, tokens, [first, 260 - first]), whole, f"split at {first}")


def test_ragged_batch_equals_single_runs(model: Model) -> None:
    """Three prompts of 5, 140 and 200 tokens, padded on the left, then 4 decoded tokens each."""
    lengths, decoded = (5, 140, 200), 4
    rows = [prompt(n + decoded, seed=n) for n in lengths]
    longest = max(lengths)
    padded = [mx.pad(r, [(0, 0), (longest - n, 0)]) for r, n in zip(rows, lengths, strict=True)]
    batch = mx.concatenate(padded)
    cache = model.make_cache(3, left_padding=[longest - n for n in lengths])
    parts = [model(batch[:, :130], cache), model(batch[:, 130:longest], cache)]
    for step in range(decoded):
        parts.append(model(batch[:, longest + step : longest + step + 1], cache))
    got = mx.concatenate(parts, axis=1)
    for row, (single, length) in enumerate(zip(rows, lengths, strict=True)):
        ours = got[row : row + 1, longest - length :]
        assert_same(ours, model(single), f"row of {length} tokens")


def test_a_row_does_not_see_its_padding(model: Model) -> None:
    tokens = prompt(20)
    other = mx.concatenate([mx.full((1, 7), 319), tokens[:, 7:]], axis=1)
    outputs = [model(t, model.make_cache(1, left_padding=[7]))[:, 7:] for t in (tokens, other)]
    assert mx.array_equal(*outputs)


@pytest.mark.parametrize("kinds", [[SLIDING, FULL], [FULL, SLIDING]], ids=["full", "sliding"])
@pytest.mark.parametrize("sizes", [[140], [100, 40], [139, 1], [1, 139], [60]], ids=str)
def test_next_logits_are_the_last_row(kinds: list[str], sizes: list[int]) -> None:
    """The last layer attends for one token alone, and its cache is none the poorer."""
    model, tokens = tiny_model(small(2), layer_types=kinds), prompt(sum(sizes) + 1)
    whole, cache = model(tokens), model.make_cache()
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        logits = model.next_logits(tokens[:, end - size : end], cache)
        assert_same(logits, whole[:, end - 1], f"{end} tokens")
    assert_same(model(tokens[:, -1:], cache), whole[:, -1:], "the token after")


def test_next_logits_of_a_ragged_batch(model: Model) -> None:
    rows = [prompt(n, seed=n) for n in (30, 131, 140)]
    batch = mx.concatenate([mx.pad(r, [(0, 0), (140 - r.shape[1], 0)]) for r in rows])
    cache = model.make_cache(3, left_padding=[140 - r.shape[1] for r in rows])
    got = model.next_logits(batch, cache)
    for row, single in enumerate(rows):
        assert_same(got[row : row + 1], model(single)[:, -1], f"row {row}")


def test_hidden_then_unembed_is_the_call(model: Model) -> None:
    tokens = prompt(9)
    assert mx.array_equal(model.unembed(model.hidden(tokens)), model(tokens))


def test_the_call_widens_logits_and_the_next_are_left_as_they_are() -> None:
    narrow, tokens = tiny_model(small(1), dtype="bfloat16"), prompt(9)
    logits, following = narrow(tokens), narrow.next_logits(tokens)
    assert (logits.dtype, following.dtype) == (mx.float32, mx.bfloat16)
    assert mx.array_equal(narrow.unembed(narrow.hidden(tokens)).astype(mx.float32), logits)


@pytest.mark.parametrize(
    "kinds",
    [[SLIDING] * 3, [FULL] * 3, [FULL, SLIDING, SLIDING], [SLIDING, FULL, SLIDING]],
    ids=lambda kinds: "".join(kind[0] for kind in kinds),
)
def test_any_layer_types(kinds: list[str]) -> None:
    model = tiny_model(small(3), layer_types=kinds)
    tokens = prompt(150)
    assert [type(layer).__name__ for layer in model.make_cache()] == [
        {"s": "WindowCache", "f": "FullCache"}[kind[0]] for kind in kinds
    ]
    assert_same(in_chunks(model, tokens, [100, 1, 49]), model(tokens), str(kinds))


def test_layer_types_matter_only_past_the_window() -> None:
    """A sliding layer is a full one until a query has more than 128 keys."""
    shape = small(3)
    sliding, full = (tiny_model(shape, layer_types=[kind] * 3) for kind in (SLIDING, FULL))
    tokens = prompt(135)
    a, b = sliding(tokens), full(tokens)
    assert_same(a[:, :128], b[:, :128], "within the window")
    assert mx.abs(a[:, 128:] - b[:, 128:]).max().item() > 100 * TOLERANCE


def test_swiglu_limit_is_honoured() -> None:
    shape, tokens = small(1), prompt(12)
    published, tight = tiny_model(shape), tiny_model(shape, swiglu_limit=1.0)
    assert mx.abs(published(tokens) - tight(tokens)).max().item() > 0.1


def test_rope_parameters_of_transformers_5_are_honoured() -> None:
    """Read as plain RoPE, as if the field were absent, every logit would move."""
    shape, tokens = small(2), prompt(200)
    rope = {**PUBLISHED_ROPE, "rope_theta": 150000}
    new = {"rope_scaling": None, "rope_theta": None, "rope_parameters": rope}
    published = tiny_model(shape)
    assert mx.array_equal(tiny_model(shape, **new)(tokens), published(tokens))
    plain = tiny_model(shape, rope_scaling={**rope, "factor": 1.0})
    assert mx.abs(plain(tokens) - published(tokens)).max().item() > 1


def test_truncate_is_honoured() -> None:
    shape, tokens = small(2), prompt(300)
    rounded = {**PUBLISHED_ROPE, "truncate": True}
    difference = tiny_model(shape, rope_scaling=rounded)(tokens) - tiny_model(shape)(tokens)
    assert mx.abs(difference).max().item() > 0.1


def test_bfloat16_is_close_to_float32() -> None:
    shape, tokens = small(2), prompt(200)
    wide, narrow = (tiny_model(shape, dtype=d)(tokens) for d in ("float32", "bfloat16"))
    assert narrow.dtype == mx.float32
    p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (wide, narrow))
    assert (mx.exp(p) * (p - q)).sum(-1).mean().item() < 2e-2


def test_bfloat16_chunks_agree() -> None:
    model, tokens = tiny_model(small(2), dtype="bfloat16"), prompt(200)
    chunked, whole = in_chunks(model, tokens, [100, 1, 99]), model(tokens)
    assert mx.abs(chunked - whole).mean().item() < 0.2
    assert (chunked.argmax(-1) == whole.argmax(-1)).astype(mx.float32).mean().item() > 0.9


def test_weights_need_not_be_packed() -> None:
    """Experts dequantised to float32 give what MXFP4 experts give."""
    shape, tokens = small(1), prompt(30)
    config, weights = tiny_config(shape), {}
    source = mlx_weights_of(shape)
    for name, array in source.items():
        if name.endswith(".scales"):
            continue
        scales = source.get(name.removesuffix("weight") + "scales")
        if scales is not None and name.endswith(".weight"):
            array = mx.dequantize(
                array, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32
            )
        weights[name] = array
    dense = Model(config, weights, quantization={}, dtype="float32")
    assert_same(dense(tokens), tiny_model(shape)(tokens), "dense experts")


@pytest.mark.parametrize("bits", [8, 4])
def test_affine_dense_weights(bits: int) -> None:
    """Affine-packed attention, embedding, router and unembedding equal their dequantised values."""
    shape, tokens = small(1), prompt(40)
    config, packed, unpacked = tiny_config(shape), {}, {}
    quantization = experts_packed(config)
    for name, array in mlx_weights_of(shape).items():
        packed[name] = unpacked[name] = array
        module = name.removesuffix(".weight")
        if array.ndim == 2 and name.endswith(".weight"):
            w, scales, biases = mx.quantize(array, group_size=32, bits=bits)
            packed |= {name: w, f"{module}.scales": scales, f"{module}.biases": biases}
            wide = (a.astype(mx.float32) for a in (scales, biases))
            unpacked[name] = mx.dequantize(w, *wide, group_size=32, bits=bits)
            quantization = {**quantization, module: Quantization(32, bits, "affine")}
    exact = Model(config, unpacked, quantization=experts_packed(config), dtype="float32")
    ours = Model(config, packed, quantization=quantization, dtype="float32")
    assert_same(ours(tokens), exact(tokens), f"{bits} bits")


def mlx_weights_of(shape: TinyShape) -> dict[str, mx.array]:
    return mlx_weights(hf_tensors(shape, 0))


# ---- a caller's mistakes


def test_tokens_must_be_rows_of_integers(model: Model) -> None:
    with pytest.raises(ValueError, match=r"tokens: expected \(B, T\) integers, got \(3,\) mlx"):
        model(mx.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"expected \(B, T\) integers, got \(1, 1\) mlx.core.flo"):
        model(mx.array([[1.0]]))
    with pytest.raises(ValueError, match=r"expected \(B, T\) integers, got \(1, 0\)"):
        model(mx.zeros((1, 0), mx.int32))


@pytest.mark.parametrize("wrong", [320, -1])
def test_prompt_tokens_must_be_in_the_vocabulary(model: Model, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"tokens: expected ids from 0 to 319, got {wrong}"):
        model(mx.array([[5, wrong]]))


def test_cache_of_another_batch(model: Model) -> None:
    cache = model.make_cache(2)
    with pytest.raises(CacheError, match="cache of 2 rows and 2 layers, but 1 rows were given"):
        model(prompt(3), cache)
    assert cache.offset == 0


def test_the_context_ends() -> None:
    model = tiny_model(small(1), max_position_embeddings=150)
    cache = model.make_cache()
    model.hidden(prompt(149), cache)
    with pytest.raises(CacheError, match="holds 150 positions: 149 are taken, 2 more do not fit"):
        model(prompt(2), cache)
    assert model(prompt(1), cache).shape == (1, 1, 320)


@pytest.mark.parametrize("padding", [[1], [0, -1], [0, 0, 0]])
def test_left_padding_for_each_row(model: Model, padding: list[int]) -> None:
    with pytest.raises(ValueError, match="left_padding: expected 2 numbers from 0, one for each"):
        model.make_cache(2, left_padding=padding)


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of bfloat16, float32, got 'float16'"):
        tiny_model(small(1), dtype="float16")


def test_an_unknown_choice_of_kernels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernels: expected one of auto, on, off, got 'yes'"):
        load_model(tmp_path, kernels="yes")  # pyright: ignore[reportArgumentType]
