"""Every kernel of the registry against its definition, in the emulator with all checks on.

Cache rows that no token may see hold NaN.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import reference
from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.kernels import launch
from mlx_gptoss.kernels.agreement import agrees, compare, excess, flattened, widened
from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.sampling import unpacked

FLOATS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FORMS: dict[Dense, tuple[str, ...]] = {
    "plain": ("float32", "float16", "bfloat16"),
    "q8": ("float32", "bfloat16"),
    "q4": ("float32", "bfloat16"),
}
ALLOW = {"norm_qkv_rope": ("unwritten-output",)}  # append rows above the slot stay undefined
CASES = [
    (stem, dtype, dense)
    for stem, kernel in KERNELS.items()
    for dense in FORMS
    for dtype in FORMS[dense]
    if kernel.dense or dense == "plain"
]
LONG_SUMS = ("route", "route_prefill", "unembed")  # float32 outputs that are sums over all columns


def assert_agrees(
    stem: str,
    sizes: Sizes,
    dtype: str = "float32",
    *,
    dense: Dense = "plain",
    order: Any = "forward",
    mode: str = "instrumented",
) -> None:
    with emulate(mode=mode, order=order, allow=ALLOW.get(stem, ())):
        found = agrees(KERNELS[stem], sizes, dtype=FLOATS[dtype], dense=dense)
    assert max(found) <= 1, f"{stem} {dtype} {dense} {order}: {found} times the tolerance"


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def test_sizes_differ_pairwise() -> None:
    """Where two were equal, one could stand for the other unnoticed."""
    s = Sizes()
    sizes = [*vars(s).values(), 64, 64 * s.q_heads, 64 * s.kv_heads, s.vocab // 64]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(("stem", "dtype", "dense"), CASES)
def test_agrees_with_its_definition(stem: str, dtype: str, dense: Dense) -> None:
    for order in ("forward", "reverse"):
        assert_agrees(stem, Sizes(), dtype, dense=dense, order=order)


@pytest.mark.parametrize("batch", [1, 7, 33])
@pytest.mark.parametrize("stem", KERNELS)
def test_batches(stem: str, batch: int) -> None:
    sizes = replace(Sizes(), batch=batch, capacity=320, base=310, vocab=256, tokens=7)
    assert_agrees(stem, sizes, "bfloat16", mode="plain" if batch > 7 else "instrumented")


# Of the 20b, of which the 120b's differ in the experts alone: see test_kernels_trials.py. Rows are
# cut, not columns: lanes and simdgroups are those of the models.
PUBLISHED = Sizes(
    batch=1, hidden=2880, inter=64, q_heads=64, kv_heads=8, experts=32, vocab=256, window=128,
    capacity=1024, rows=128, base=1000, slot=127, splits=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "dense"),
    [(stem, dense) for stem, dtype, dense in CASES
     if dtype == "bfloat16" and stem not in LONG_SUMS],
)  # fmt: skip
def test_published_shapes(stem: str, dense: Dense) -> None:
    sizes = PUBLISHED
    if stem == "experts_down":  # its columns are `inter`; 64 rows out
        sizes = replace(sizes, inter=2880, hidden=64)
    assert_agrees(stem, sizes, "bfloat16", dense=dense, mode="plain")


def dense_weight(matrix: Matrix) -> np.ndarray:
    if matrix.mode is None:
        return wide(matrix.weight)
    assert matrix.scales is not None
    assert matrix.offsets is not None
    scales, offsets = (a.astype(mx.float32) for a in (matrix.scales, matrix.offsets))
    return wide(mx.dequantize(matrix.weight, scales, offsets, group_size=64, bits=matrix.bits))


@pytest.mark.parametrize("dense", FORMS)
@pytest.mark.parametrize(("stem", "experts"), [("route", 32), ("route", 128), ("unembed", 32)])
def test_logits_of_published_shapes_against_float64(stem: str, experts: int, dense: Dense) -> None:
    """MLX's CPU adds 2880 products in one float32 and is 3e-6 off itself; the kernels are not."""
    kernel, sizes = KERNELS[stem], replace(PUBLISHED, experts=experts)
    given = kernel.case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    with emulate(mode="plain"):
        outputs = kernel.launch(**given)
    matrix = given["router" if stem == "route" else "matrix"]
    x, norm, weight = wide(given["x"]), wide(given["norm"]), dense_weight(matrix)
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + given["eps"]) * norm @ weight.T
    want = want if matrix.bias is None else want + wide(matrix.bias)
    got = wide(outputs[1] if stem == "route" else outputs[0])
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize(
    ("base", "slot"),
    [(0, 0), (0, 1), (1, 0), (0, 31), (0, 32), (63, 32), (95, 0), (95, 1), (96, 0), (94, 1),
     (95, 2), (97, 47), (191, 0), (192, 31), (500, 47), (96, 33)],
)  # fmt: skip
def test_window_edges(base: int, slot: int) -> None:
    """Positions around the window of 96, the ring going round, tiles of 32 beginning and ending."""
    assert_agrees("attention_window", replace(Sizes(), batch=1, base=base, slot=slot))


def test_window_shorter_than_the_append_segment() -> None:
    """With 128 rows and a window of 96 the ring has nothing left to show."""
    for slot in (95, 96, 127):
        sizes = replace(Sizes(), batch=1, rows=128, base=200, slot=slot)
        assert_agrees("attention_window", sizes, "bfloat16")


@pytest.mark.parametrize("base", [0, 1, 31, 32, 33, 63, 64, 159, 160, 479, 480])
def test_context_lengths_around_every_tile(base: int) -> None:
    """With more splits than tiles, too, and with fewer keys than a tile."""
    for splits, slot in ((1, 0), (3, 31), (16, 32)):
        sizes = replace(Sizes(), batch=1, base=base, slot=slot, splits=splits)
        assert_agrees("attention_decode", sizes)


@pytest.mark.parametrize("splits", [1, 2, 4, 8, 16, 32])
def test_context_lengths_around_every_split(splits: int) -> None:
    """The two kernels against the softmax with sinks over the keys that exist.

    Where a split begins depends on the number of tiles, so each number has lengths on either side.
    """
    cut = replace(Sizes(), batch=1, splits=splits, q_heads=9, kv_heads=3, capacity=352)
    for base in (32 * tiles + more for tiles in range(11) for more in (-1, 0, 1)):
        sizes = replace(cut, base=max(0, base), slot=(0, 30, 31, 32, 47)[base % 5])
        make = Inputs(sizes, dtype=mx.float32)
        given, sinks = KERNELS["attention_decode"].case(make), make.normal(9)
        with emulate(mode="plain"):
            parts = KERNELS["attention_decode"].launch(**given)
            got = KERNELS["attention_reduce"].launch(*parts, sinks, dtype=mx.float32)
        counts = {"frozen": sizes.base, "append": sizes.slot + 1}
        segments = [tuple(a[:, :, :n] for a in given[name]) for name, n in counts.items()]
        q, scale = given["q"][:, :, None], given["scale"]
        want = reference.attention(q, segments, None, sinks, scale=scale)  # pyright: ignore
        assert excess(got, want[:, 0]) <= 1, sizes


CHOOSERS = [stem for stem in KERNELS if stem.startswith("expert") and stem != "expert_dispatch"]


@pytest.mark.parametrize("stem", CHOOSERS)
@pytest.mark.parametrize(
    "logits",
    [
        pytest.param([[float(e) for e in range(20)]] * 7, id="all rows on the last experts"),
        pytest.param([[1.0] * 20, [0.0] * 3 + [5.0] * 17], id="ties go to the lower expert"),
        pytest.param([[-1e30] * 16 + [-1e31] * 4, [3e38] * 2 + [-3e38] * 18], id="far apart"),
    ],
)
def test_choices_of_experts(stem: str, logits: list[list[float]]) -> None:
    """Most experts have no row in any of them."""
    kernel, chosen = KERNELS[stem], mx.array(logits, dtype=mx.float32)
    given = kernel.case(Inputs(replace(Sizes(), batch=len(logits)), dtype=mx.float32))
    blocks, choice = KERNELS["expert_groups"].define(chosen, chosen=4)
    forms = {"logits": chosen, "blocks": blocks, "choice": choice}
    assert given.keys() & forms, "it chooses no experts"
    with emulate():
        found = compare(kernel, given | {n: a for n, a in forms.items() if n in given})
    assert max(found) <= 1, found


def test_logits_that_are_not_numbers_read_no_foreign_memory() -> None:
    kernel, make = KERNELS["experts_swiglu"], Inputs(Sizes(), dtype=mx.float32)
    arguments = {**kernel.case(make), "logits": mx.full((2, 20), mx.nan)}
    with emulate() as session:
        kernel.launch(**arguments)
    assert not session.reports[0].findings


def test_no_candidate_is_no_foreign_memory_either() -> None:
    """What `unembed` leaves of logits that are not numbers: scores of -inf, ids past the end."""
    best = mx.broadcast_to(mx.array([-mx.inf, 128, -mx.inf, 0]), (2, 2, 4))
    control, logits = mx.zeros((2, 8), mx.int32), mx.full((2, 128), mx.nan)
    with emulate() as session:
        token, _, _ = KERNELS["sample_token"].launch(best, logits, control=control)
    assert token.tolist() == [127, 127]
    assert not session.reports[0].findings


def test_greedy_and_drawn_tokens_are_those_of_sampling() -> None:
    """unembed and sample_token, end to end, against their definitions, at two temperatures."""
    sizes = replace(Sizes(), batch=5)
    given = KERNELS["unembed"].case(Inputs(sizes, dtype=mx.float32))
    with emulate():
        logits, best = KERNELS["unembed"].launch(**given)
        token, logprob, control = KERNELS["sample_token"].launch(
            best, logits, control=given["control"]
        )
    logits, best = KERNELS["unembed"].define(**widened(given))
    want = KERNELS["sample_token"].define(best, logits, control=given["control"])
    assert token.tolist() == want[0].tolist()
    assert control.tolist() == want[2].tolist()
    assert mx.abs(logprob - want[1]).max().item() < 1e-5
    allowed = unpacked(given["allowed"], sizes.vocab)
    assert all(row[t].item() for row, t in zip(allowed, token.tolist(), strict=True))


def test_equal_scores_go_to_the_lower_id() -> None:
    """In one thread's share, in one simdgroup, and between simdgroups of the 256 threads."""
    tiles = 600
    ids = mx.arange(tiles) * 64 + 3
    for tied in ([7, 263], [40, 45], [31, 64, 290], [255, 256]):
        scores = mx.where((mx.arange(tiles)[:, None] == mx.array(tied)).any(-1), 2.0, 1.0)
        best = mx.stack([scores, ids.astype(mx.float32), scores, mx.ones((tiles,))], axis=-1)[None]
        control, logits = mx.zeros((1, 8), mx.int32), mx.zeros((1, tiles * 64))
        with emulate():
            token, _, _ = KERNELS["sample_token"].launch(best, logits, control=control)
        assert token.item() == tied[0] * 64 + 3


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# A line of a kernel, and what it becomes: each fault must be found by a check or by the values.
FAULTS = [
    ("embed", "token[tile.x]", "token[0]"),
    ("experts_swiglu", BARRIER, ""),
    ("experts_swiglu", "values[i] = lane + 32 * i == at", "values[i] = lane == at"),
    ("experts_swiglu", "lane < lanes ? DECODE_SCALE : 0.0f", "DECODE_SCALE"),
    ("experts_swiglu", "min(lane, lanes - 1)", "lane"),
    ("experts_swiglu", "((word + word) & 0x1E1E1E1Eu)", "((word + word) & 0x0E0E0E0Eu)"),
    ("experts_down", "DECODE_SCALE * share", "DECODE_SCALE"),
    ("experts_down", "scales[at + (first + i) * blocks]", "scales[at + (first + i + 1) * blocks]"),
    ("expert_dispatch", "g < group ? counts[2 * g + 1] : 0", "counts[2 * g + 1]"),
    ("expert_dispatch", BARRIER, ""),
    ("expert_dispatch", "at += popcount(owners)", "at += 0"),
    ("expert_dispatch", "p < last && experts", "experts"),
    ("attention_decode", "8 * i + state.row <= end", "true"),
    ("attention_decode", "k + min((8 * i + row) * 64 + 8 * pair, ", "k + max(0u, "),
    ("attention_decode", "v + min((8 * i + 2 * pair + c) * 64 + 8 * row, ", "v + max(0u, "),
    ("attention_decode", "out[d] *= factor", "out[d] *= 1"),
    ("attention_decode", "tiles * (split + 1) / splits", "(tiles * (split + 1) - 1) / splits"),
    ("attention_window", "age + wrap) < ages", "age + wrap) <= ages"),
    ("attention_window", "min(age, age + wrap)", "age"),
    ("attention_window", "base - 1 - position + WINDOW", "WINDOW"),
    ("attention_window", "is_append ? slot + 1", "is_append ? ROWS"),
    ("attention_window_prefill", "uint(row - low) <", "uint(row - low + 1) < 1 +"),
    ("attention_window_prefill", "max(high - low + 1, 0)", "high - low + 2"),
    ("attention_window_prefill", "from >= begin && from", "from"),
    ("attention_window_prefill", f"{BARRIER}\n    for", "for"),
    ("attention_window_prefill", f"{BARRIER}\n    const", "const"),
    ("attention_window_prefill", "state.row == 0 ? 1.0f : 0.0f", "0.0f"),
    ("attention_window_prefill", "if (token >= tokens) return;", ""),
    ("attention_reduce", "total = metal::fast::exp2(sink - top)", "total = 0"),
    ("norm_qkv_rope", "i += threads) to[i] = old[i]", "i += threads) to[i] = old[0]"),
    ("norm_qkv_rope", "turned * sine", "first * sine"),
    ("norm_qkv_rope", "(plane < HKV ? keys : values)", "keys"),
    ("route", "sums[(r * groups + group) * 5 + 4] = square", "sums[r * groups * 5 + 4] = square"),
    ("unembed", "uint(control[0]) + 1", "uint(control[0])"),
    ("unembed", "allowed[tile * 2 + i] >> lane", "allowed[tile * 2] >> lane"),
    ("unembed", "allowed + b * (V / 32)", "allowed"),
    ("out_residual", "n / rows * stride", "n / rows * 0"),
    ("sample_token", "|| thread_id == 2", ""),
    ("sample_filtered", "ulong(distance) << 23 | v", "ulong(distance) << 23"),
    ("sample_filtered", "allowed + b * (V / 32)", "allowed"),
    ("sample_filtered", "limit + one > found", "true"),
    ("sample_filtered", "limit -= sums[GROUPS + 1];", ""),
    ("sample_filtered", "row.logits[v] - row.high < least", "false"),
    ("sample_filtered", "g < group ? sums[g] : 0", "sums[g]"),
    ("extend_ring", "(uint(offset[0]) + row) % WINDOW", "row"),
    ("extend_ring", "if (row < tokens) return;", ""),
    ("extend_ring", "if (row >= rows) return;", ""),
    ("extend_ring", "(is_new ? v : ring_v)", "(is_new ? v : ring_k)"),
    ("qkv_rope", "is_q ? tile.y - before : tile.y", "tile.y"),
    ("qkv_rope", "|| (is_q && tile.y < before)", ""),
    ("qkv_rope", "turned * sine[i]", "first[i] * sine[i]"),
    ("qkv_rope", "(is_q ? bq : is_v ? bv : bk)", "(is_q ? bq : bk)"),
    ("rms_norm", BARRIER, ""),
    ("rms_norm", "square / D + eps", "square + eps"),
    ("route_prefill", f"{BARRIER}\n  UNROLL", "UNROLL"),
    ("route_prefill", f"{BARRIER}\n  for", "for"),
    ("route_prefill", "expert < uint(E)", "true"),
    ("route_prefill", "min(from + n + k, E - 1)", "from + n + k"),
    ("route_prefill", "row < rows && lane", "lane"),
    ("route_prefill", "&& first + v < rows", ""),
    ("sum_pairs", "z + ulong(inverse[p]) * D", "z + ulong(p) * D"),
    ("sum_pairs", "fma(share, product[i]", "fma(1, product[i]"),
    ("sum_pairs", "if (column >= uint(D)) return;", ""),
    ("swiglu_pairs", "u[i] + added[i], alpha", "u[i], alpha"),
    ("swiglu_pairs", "if (column >= uint(H)) return;", ""),
    ("expert_dispatch", "p / CHOSEN", "p % CHOSEN"),
    ("expert_groups", "experts[p] == expert && p < thread_id", "experts[p] == expert"),
    ("expert_groups", "&& experts[p] < expert", "&& experts[p] <= expert"),
    ("experts_swiglu_grouped", "i < 16 * count", "i < 64"),
    ("experts_swiglu_grouped", "own[2 + pair + r] / CHOSEN * D", "own[2 + pair] / CHOSEN * D"),
    ("experts_down_grouped", "|| vector >= count", ""),
    ("experts_sum", "result = fma(own[1]", "result = fma(1"),
]  # fmt: skip


def test_every_kernel_is_broken_once() -> None:
    assert {stem for stem, _, _ in FAULTS} == set(KERNELS)


@pytest.mark.parametrize(("stem", "line", "fault"), FAULTS)
def test_faults_are_found(
    stem: str, line: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text: Callable[[str], str] = launch.source_text
    assert text(stem).count(line) == 1, "the fault must change one line"
    monkeypatch.setattr(launch, "source_text", lambda name: text(name).replace(line, fault))
    sizes = {
        "attention_window": replace(Sizes(), slot=5),  # rows of the ring's end and of its beginning
        "route": replace(Sizes(), hidden=2048),  # more than one simdgroup
        "experts_swiglu": replace(Sizes(), experts=40),  # more than one a lane
        "expert_groups": replace(Sizes(), batch=7),  # more than one pair of an expert
        "experts_swiglu_grouped": replace(Sizes(), batch=7),
        "attention_window_prefill": replace(Sizes(), q_heads=9, kv_heads=3, tokens=41),
        "rms_norm": replace(Sizes(), hidden=2048, tokens=3),
        "route_prefill": replace(Sizes(), hidden=2048, tokens=7),
        "sample_filtered": replace(Sizes(), batch=33),  # each filter draws several times
    }.get(stem, Sizes())
    try:
        with emulate(allow=ALLOW.get(stem, ())):
            launch._build.cache_clear()
            found = agrees(KERNELS[stem], sizes, dtype=mx.float32, dense="plain")
    except EmulatorError:
        return
    finally:
        launch._build.cache_clear()
    assert max(found) > 1, "the fault went unnoticed"


def test_every_output_is_compared() -> None:
    """One value of one output off by three tolerances is too far."""
    make = Inputs(Sizes(), dtype=mx.float32)
    kernel = KERNELS["route"]
    outputs = flattened(kernel.define(**kernel.case(make)))
    for output in outputs:
        step = 3 * 2e-6 * mx.abs(output).max()
        moved = output + step * (mx.arange(output.size) == 5).reshape(output.shape)
        assert excess(output, output) == 0
        assert 2 < excess(moved, output) < 4
        assert excess(mx.where(moved != output, mx.nan, output), output) == float("inf")
