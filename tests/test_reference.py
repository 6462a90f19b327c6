"""Each operation against its formula in numpy, and each trap that another port fell into."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import E2M1

from mlx_gptoss import attention, matrix, moe, reference
from mlx_gptoss.attention import full_attention_fused, full_attention_in_blocks
from mlx_gptoss.config import GPT_OSS_20B
from mlx_gptoss.kernels import prompt_definitions
from mlx_gptoss.kernels.selection import all_definitions
from mlx_gptoss.matrix import Matrix, expert_linear
from mlx_gptoss.moe import CPU_ROWS, GROUP_FROM, MoeWeights, moe_block
from mlx_gptoss.rope import RopeTable

RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_close(got: mx.array, expected: np.ndarray, case: str, *, atol: float = 2e-6) -> None:
    assert got.shape == expected.shape, case
    difference = np.abs(wide(got) - expected)
    assert difference.max() <= atol, f"{case}: max {difference.max():.2e} mean {difference.mean()}"


def test_norm_weight_multiplies_before_the_cast() -> None:
    """mx.fast.rms_norm on bfloat16 rounds first: a quarter of its outputs are off by one unit."""
    x, weight = normal(7, 2880).astype(mx.bfloat16), (normal(2880) + 1).astype(mx.bfloat16)
    exact = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-5) * wide(weight)
    rounded = wide(mx.array(exact.astype(np.float32)).astype(mx.bfloat16))
    ours = wide(reference.rms_norm(x, weight, eps=1e-5).astype(mx.bfloat16))
    rounded_first = wide(mx.fast.rms_norm(x, weight, 1e-5))
    assert (ours != rounded).mean() < 1e-3
    assert (rounded_first != rounded).mean() > 0.1


def test_eps_is_inside_the_root() -> None:
    x, weight = mx.full((1, 64), 1e-3), mx.ones((64,))
    got = reference.rms_norm(x, weight, eps=1e-5)
    assert_close(got, np.full((1, 64), 1e-3 / np.sqrt(1e-6 + 1e-5)), "tiny input")


def attention_by_hand(q, k, v, sinks, *, scale: float, seen: np.ndarray) -> np.ndarray:
    """q (Hq,T,Dh), k and v (Hkv,S,Dh), seen (T,S): one head and one query at a time, float64."""
    heads, tokens, head_dim = q.shape
    out = np.zeros((tokens, heads, head_dim))
    for head in range(heads):
        kv = head // (heads // k.shape[0])
        for t in range(tokens):
            scores = np.exp(k[kv] @ q[head, t] * scale) * seen[t]
            out[t, head] = scores @ v[kv] / (scores.sum() + np.exp(sinks[head]))
    return out.reshape(tokens, heads * head_dim)


def attention_inputs(tokens: int, keys: int) -> tuple[mx.array, ...]:
    """Batch 2, 6 query heads over 2 of keys, head dimension 8."""
    return normal(2, 6, tokens, 8), normal(2, 2, keys, 8), normal(2, 2, keys, 8), normal(6)


def in_window(offset: int, tokens: int, keys: int, window: int, start: int = 0) -> np.ndarray:
    """Key j of 0..S-1 is at position offset + T - S + j; itself and window - 1 before are seen."""
    query = offset + np.arange(tokens)[:, None]
    key = offset + tokens - keys + np.arange(keys)[None]
    return (key >= start) & (key <= query) & (query - key < window)


def assert_attention(got, q, k, v, sinks, *, scale, seen, case) -> None:
    for row in range(q.shape[0]):
        expected = attention_by_hand(
            wide(q[row]), wide(k[row]), wide(v[row]), wide(sinks), scale=scale, seen=seen[row]
        )
        assert_close(got[row], expected, f"{case}, row {row}")


def test_sinks_are_neither_scaled_nor_masked_nor_summed() -> None:
    q, k, v, sinks = attention_inputs(3, 5)
    seen = np.ones((2, 3, 5), bool)
    got = reference.attention(q, [(k, v)], None, sinks, scale=0.3)
    assert_attention(got, q, k, v, sinks, scale=0.3, seen=seen, case="sinks")
    blind = reference.attention(q, [(k, v)], mx.zeros((1, 1, 1, 3, 5), mx.bool_), sinks, scale=0.3)
    assert_close(blind, np.zeros((2, 3, 48)), "a query that sees nothing")


def test_segments_are_one_sequence() -> None:
    q, k, v, sinks = attention_inputs(1, 9)
    parts = [(k[:, :, :4], v[:, :, :4]), (k[:, :, 4:5], v[:, :, 4:5]), (k[:, :, 5:], v[:, :, 5:])]
    whole = reference.attention_decode(q, [(k, v)], sinks, scale=0.4, start=None)
    split = reference.attention_decode(q, parts, sinks, scale=0.4, start=None)
    assert_close(split, wide(whole), "three segments")
    start = mx.array([0, 6])
    seen = np.arange(9)[None, None] >= np.array([0, 6])[:, None, None]
    padded = reference.attention_decode(q, parts, sinks, scale=0.4, start=start)
    assert_attention(padded, q, k, v, sinks, scale=0.4, seen=seen, case="padding")


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 6, 13])
@pytest.mark.parametrize("starts", [None, [0, 2]])
def test_window_of_a_decoded_token(offset: int, starts: list[int] | None) -> None:
    """W keys with the token's own; slots not yet written, and padding, stay unseen."""
    window = 5
    q, k, v, sinks = attention_inputs(1, window)
    slots = [p % window for p in range(offset - window + 1, offset + 1)]
    ring = [mx.zeros_like(x) for x in (k, v)]
    for x, source in zip(ring, (k, v), strict=True):
        x[:, :, mx.array(slots)] = source
    start = None if starts is None else mx.array(starts)
    got = reference.attention_window(q, *ring, sinks, scale=0.5, offset=offset, start=start)
    seen = np.stack([in_window(offset, 1, window, window, s) for s in starts or (0, 0)])
    assert_attention(got, q, k, v, sinks, scale=0.5, seen=seen, case=f"offset {offset}")


@pytest.mark.parametrize("offset", [0, 1, 4, 5, 6, 12])
@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 10, 13])
def test_window_of_a_chunk(offset: int, tokens: int) -> None:
    window = 5
    q, k, v, sinks = attention_inputs(tokens, window + tokens)
    for starts in (None, [0, 3]):
        start = None if starts is None else mx.array(starts)
        got = reference.attention_window_prefill(
            q, k, v, sinks, scale=0.5, offset=offset, start=start
        )
        rows = [in_window(offset, tokens, window + tokens, window, s) for s in starts or (0, 0)]
        assert_attention(got, q, k, v, sinks, scale=0.5, seen=np.stack(rows), case=f"{starts}")


def test_window_of_a_chunk_costs_two_windows_a_token() -> None:
    """4,096 tokens against every key would hold 138 MB of scores; against 256 keys each, 8 MB."""
    tokens, window = 4096, 128
    q, k, v = (mx.zeros((1, 2, n, 8)) for n in (tokens, window + tokens, window + tokens))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(
        reference.attention_window_prefill(q, k, v, mx.zeros((2,)), scale=1.0, offset=0, start=None)
    )
    assert mx.get_peak_memory() - before < 70e6


@pytest.mark.parametrize(("distance", "sees"), [(0, True), (127, True), (128, False)])
def test_the_published_window_is_128_with_the_token_itself(distance: int, sees: bool) -> None:
    """One key 5 among zeros: its value arrives at distance 127 and not at 128."""
    key, tokens, shape = 5, 200, (1, 1, 128 + 200, 2)
    v = mx.zeros(shape)
    v[:, :, 128 + key] = 1
    out = reference.attention_window_prefill(
        mx.zeros((1, 1, tokens, 2)),
        mx.zeros(shape),
        v,
        mx.zeros((1,)),
        scale=1.0,
        offset=0,
        start=None,
    )
    assert (out[0, key + distance, 0].item() > 0) is sees


@pytest.mark.parametrize("attend", [full_attention_in_blocks, full_attention_fused])
@pytest.mark.parametrize(("offset", "tokens"), [(0, 5), (0, 63), (0, 64), (3, 65), (70, 130)])
def test_full_attention_of_a_chunk(attend, offset: int, tokens: int) -> None:
    q, k, v, sinks = attention_inputs(tokens, offset + tokens)
    for starts in (None, [0, 3]):
        start = None if starts is None else mx.array(starts)
        got = attend(q, k, v, sinks, scale=0.5, offset=offset, start=start)
        rows = [in_window(offset, tokens, offset + tokens, 10**6, s) for s in starts or (0, 0)]
        first = 0 if starts is None else 3  # what a padding query gets is nobody's business
        expected = np.stack(rows)[:, first:]
        cut = q[:, :, first:], k, v, sinks
        assert_attention(got[:, first:], *cut, scale=0.5, seen=expected, case=f"{starts}")


def test_projections_and_rotation() -> None:
    """q and k turn, v does not, and YaRN's concentration stays out of all three."""
    x, norm = normal(2, 3, 96), normal(96)
    projections = tuple(
        Matrix(weight=normal(n * 64, 96) / 10, bias=normal(n * 64)) for n in (4, 2, 2)
    )
    positions = mx.array([[0, 1, 2], [500, 501, 502]])
    angles = RopeTable.of(GPT_OSS_20B).at(positions)
    sizes = {"head_dim": 64, "eps": 1e-5}
    q, k, v = reference.norm_qkv_rope(x, norm, projections, angles, queries=3, **sizes)
    last, _, _ = reference.norm_qkv_rope(x, norm, projections, angles, queries=1, **sizes)
    assert_close(last, wide(q[:, :, 2:]), "queries of the last token", atol=1e-5)
    y = wide(reference.rms_norm(x, norm, eps=1e-5))
    for got, m, turned in zip((q, k, v), projections, (True, True, False), strict=True):
        assert m.bias is not None
        plain = (y @ wide(m.weight).T + wide(m.bias)).reshape(2, 3, -1, 64).swapaxes(1, 2)
        if turned:
            z = plain[..., :32] + 1j * plain[..., 32:]
            z = z * (wide(angles[0]) + 1j * wide(angles[1]))
            plain = np.concatenate([z.real, z.imag], -1)
        assert_close(got, plain, "turned" if turned else "not turned", atol=1e-5)


def test_softmax_comes_after_the_choice() -> None:
    x, norm, router = normal(9, 64), mx.ones((64,)), Matrix(weight=normal(7, 64), bias=normal(7))
    y, experts, weights = reference.route(x, norm, router, chosen=3, eps=1e-5)
    assert router.bias is not None
    logits = wide(y) @ wide(router.weight).T + wide(router.bias)
    order = np.argsort(-logits, axis=-1)[:, :3]
    assert experts.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(experts), order)
    best = np.exp(np.take_along_axis(logits, order, -1))
    assert_close(weights, best / best.sum(-1, keepdims=True), "weights")


def test_equal_experts_are_taken_in_order() -> None:
    router = Matrix(weight=mx.zeros((8, 64)), bias=mx.array([0, 1, 0, 1, 0, 1, 0, 0.0]))
    _, experts, _ = reference.route(normal(2, 64), mx.ones((64,)), router, chosen=5, eps=1e-5)
    assert experts.tolist() == [[1, 3, 5, 0, 2]] * 2


def test_router_sees_its_input_before_rounding() -> None:
    """In bfloat16 the choice is made on float32 values: near ties are not decided by rounding."""
    x, norm = normal(400, 64).astype(mx.bfloat16), (normal(64) + 1).astype(mx.bfloat16)
    router = Matrix(weight=normal(32, 64).astype(mx.bfloat16), bias=normal(32).astype(mx.bfloat16))
    y, experts, _ = reference.route(x, norm, router, chosen=4, eps=1e-5)
    assert y.dtype == mx.bfloat16 and router.bias is not None
    exact = wide(reference.rms_norm(x, norm, eps=1e-5))
    logits = exact @ wide(router.weight).T + wide(router.bias)
    np.testing.assert_array_equal(np.array(experts), np.argsort(-logits, axis=-1)[:, :4])


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (1.0, 0.0, 1 / (1 + np.exp(-1.702))),  # + 1 on the linear half
        (1.0, -1.0, 0.0),
        (50.0, 0.0, 7 / (1 + np.exp(-1.702 * 7))),  # gate clamped from above
        (-8.0, 0.0, -8 / (1 + np.exp(1.702 * 8))),  # and not from below
        (1.0, 50.0, 8 / (1 + np.exp(-1.702))),  # linear half clamped on both sides
        (1.0, -50.0, -6 / (1 + np.exp(-1.702))),
    ],
)
def test_clamped_swiglu(gate: float, up: float, expected: float) -> None:
    got = reference.swiglu(mx.array([gate]), mx.array([up]), limit=7.0, alpha=1.702)
    assert got.item() == pytest.approx(expected, rel=2e-6, abs=0)


def packed_experts(experts: int, rows: int, columns: int) -> tuple[Matrix, np.ndarray]:
    """Random MXFP4 experts, and their values decoded in numpy, low nibble first."""
    blocks = RNG.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
    scales = RNG.integers(120, 128, (experts, rows, columns // 32), dtype=np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, rows, -1, 32)
    values = E2M1[codes & 7] * np.where(codes & 8, -1, 1) * np.exp2(scales - 127.0)[..., None]
    matrix = Matrix(
        weight=mx.array(blocks.view(np.uint32).reshape(experts, rows, -1)),
        scales=mx.array(scales),
        bias=normal(experts, rows),
        group_size=32,
        bits=4,
        mode="mxfp4",
    )
    return matrix, values.reshape(experts, rows, columns)


def test_low_nibble_first() -> None:
    """A one-hot input reads one column: the columns come in the order of the codes."""
    matrix, values = packed_experts(3, 5, 64)
    eye = mx.eye(64)[:, None, None]  # (64, 1, 1, 64)
    experts = mx.broadcast_to(mx.array([[2, 0]], mx.uint32), (64, 2))
    got = expert_linear(eye, matrix, experts, grouped=False)[:, :, 0]
    assert matrix.bias is not None
    for choice, expert in enumerate((2, 0)):
        expected = values[expert].T + wide(matrix.bias[expert])
        assert_close(got[:, choice], expected, f"expert {expert}", atol=1e-5)


def experts_by_hand(y, experts, weights, gate, up, down, residual) -> np.ndarray:
    """One token and one expert at a time; each a pair of (decoded values, bias)."""
    out = residual.copy()
    for t, chosen in enumerate(experts):
        for k, e in enumerate(chosen):
            g, u = (w[e] @ y[t] + bias[e] for w, bias in (gate, up))
            g, u = np.minimum(g, 7), np.clip(u, -7, 7)
            h = g / (1 + np.exp(-1.702 * g)) * (u + 1)
            out[t] += weights[t, k] * (down[0][e] @ h + down[1][e])
    return out


@pytest.mark.parametrize("block", [CPU_ROWS, 32], ids="blocks of {}".format)
@pytest.mark.parametrize("tokens", [1, 2, 7, 15, 16, 32, 33])
@pytest.mark.parametrize("favourite", [None, 10], ids=["spread", "one expert for all"])
def test_experts_by_hand(
    monkeypatch: pytest.MonkeyPatch, tokens: int, favourite: int | None, block: int
) -> None:
    """Below and above the pairs from which they are sorted, and the rows of a block on the CPU."""
    monkeypatch.setattr(moe, "CPU_ROWS", block)
    d, h, e, chosen = 96, 64, 11, 4
    assert 15 * chosen < GROUP_FROM <= 16 * chosen
    (gate, g), (up, u), (down, w) = (packed_experts(e, *s) for s in ((h, d), (h, d), (d, h)))
    bias = np.zeros(e, np.float32)
    if favourite is not None:
        bias[favourite] = 100
    router = Matrix(weight=normal(e, d) / 3, bias=mx.array(bias))
    norm, x = normal(d), normal(1, tokens, d)
    weights = MoeWeights(norm=norm, router=router, gate=gate, up=up, down=down)
    kernels = all_definitions("the reference is under test")
    got = moe_block(x, weights, kernels=kernels, chosen=chosen, eps=1e-5, limit=7.0, alpha=1.702)
    y, experts, shares = reference.route(x[0], norm, router, chosen=chosen, eps=1e-5)
    expected = experts_by_hand(
        wide(y),
        np.array(experts),
        wide(shares),
        *(
            (values, wide(m.bias))
            for values, m in ((g, gate), (u, up), (w, down))
            if m.bias is not None
        ),
        wide(x[0]),
    )
    scale = np.abs(expected).max()
    assert_close(got[0] / scale, expected / scale, f"{tokens} tokens")


def test_dispatch_sorts_by_expert_and_back() -> None:
    experts = mx.array([[3, 1], [0, 3], [3, 2]], mx.uint32)
    found = reference.expert_dispatch(experts, count=5)
    assert found.experts.tolist() == [0, 1, 2, 3, 3, 3]
    assert found.inverse.tolist() == [3, 1, 0, 4, 5, 2], "pairs of one expert keep their order"
    assert found.tokens.tolist() == [1, 0, 2, 0, 1, 2]
    assert found.offsets.tolist() == [0, 1, 2, 3, 6, 6]
    assert {array.dtype for array in found} == {mx.uint32}


def test_experts_are_weighed_and_summed_in_float32() -> None:
    """One rounding, of the sum: what bfloat16 products give differs in half of the outputs."""
    y, shares = normal(50, 4, 96).astype(mx.bfloat16), mx.softmax(normal(50, 4), axis=-1)
    residual = normal(50, 96).astype(mx.bfloat16)
    exact = (wide(y) * wide(shares)[..., None]).sum(1) + wide(residual)
    rounded = wide(mx.array(exact.astype(np.float32)).astype(mx.bfloat16))
    got = reference.combine(y, shares, residual)
    assert got.dtype == mx.bfloat16
    assert (wide(got) != rounded).mean() < 1e-3
    narrow = (y * shares[..., None].astype(mx.bfloat16)).sum(1) + residual
    assert (wide(narrow) != rounded).mean() > 0.2


def test_packed_weights_meet_float32_on_the_cpu() -> None:
    """MLX's CPU sums bfloat16 by mxfp4 in bfloat16: 1 % off. Metal is another matter."""
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("the default device is a GPU")
    matrix, values = packed_experts(2, 40, 2880)
    x = normal(1, 1, 2880).astype(mx.bfloat16)
    experts = mx.array([1], mx.uint32)
    assert matrix.bias is not None
    exact = wide(x)[0] @ values[1].T + wide(matrix.bias[1])
    got = wide(expert_linear(x, matrix, experts, grouped=False)[0])
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 1e-6


def test_out_residual() -> None:
    x, residual = normal(2, 3, 40), normal(2, 3, 24)
    matrix = Matrix(weight=normal(24, 40), bias=normal(24))
    assert matrix.bias is not None
    exact = wide(x) @ wide(matrix.weight).T + wide(matrix.bias) + wide(residual)
    assert_close(reference.out_residual(x, matrix, residual), exact, "sum", atol=1e-5)


def test_elementwise_steps_are_the_same_as_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX compiles on Metal, compiled here."""
    gate, up = (normal(5, 4, 96).astype(mx.bfloat16) * 4 for _ in range(2))
    heads, angle = normal(1, 3, 5, 64).astype(mx.bfloat16), normal(1, 1, 5, 32)

    def outputs() -> list[mx.array]:
        return [
            reference.swiglu(gate, up, limit=7.0, alpha=1.702),
            prompt_definitions._rotate(heads, mx.cos(angle), mx.sin(angle)),
            attention._biased_sum(gate[:, 0], up[0, 0], up[:, 0]),
            reference.combine(gate, angle[0, 0, :, :4], up[:, 0]),
            reference._sum(gate[:, 0], up[:, 0]),
        ]

    plain = outputs()
    mx.eval(plain)
    monkeypatch.setattr(matrix, "on_cpu", lambda: False)
    for got, want in zip(outputs(), plain, strict=True):
        assert got.dtype == want.dtype
        limit = 2e-6 if want.dtype == mx.float32 else 2**-8
        assert mx.abs(got - want).max() <= limit * mx.abs(want).max()
