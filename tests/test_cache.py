"""What the caches hold, what going back means, and what a step may copy."""

import mlx.core as mx
import pytest

from mlx_gptoss.cache import (
    GROWTH,
    RECENT,
    FullCache,
    ModelCache,
    Segment,
    WindowCache,
)
from mlx_gptoss.errors import CacheError

BATCH, HEADS, WINDOW, HEAD_DIM = 2, 3, 5, 4


def ring() -> WindowCache:
    return WindowCache((BATCH, HEADS, WINDOW, HEAD_DIM), mx.float32)


def full() -> FullCache:
    return FullCache((BATCH, HEADS, HEAD_DIM), mx.float32)


def tokens(first: int, count: int) -> Segment:
    """Keys that carry their position in every element, from 1; values are their negatives."""
    keys = mx.arange(first + 1, first + count + 1, dtype=mx.float32)
    keys = mx.broadcast_to(keys[:, None], (BATCH, HEADS, count, HEAD_DIM))
    return keys, -keys


def positions(segment: Segment) -> list[int]:
    """Undo `tokens`; a row never written is -1."""
    keys, values = segment
    assert mx.array_equal(keys, -values)
    assert mx.array_equal(keys, mx.broadcast_to(keys[:1, :1, :, :1], keys.shape))
    return [int(x) - 1 for x in keys[0, 0, :, 0].tolist()]


# ---- the ring


def test_ring_holds_exactly_the_window() -> None:
    cache, segment = ring(), None
    for position in range(13):
        segment = cache.append(*tokens(position, 1))
    assert segment is not None
    assert positions(segment) == [10, 11, 12, 8, 9]
    assert cache.offset == 13
    assert cache.nbytes == 2 * BATCH * HEADS * WINDOW * HEAD_DIM * 4


@pytest.mark.parametrize("before", [0, 1, 4, 5, 6, 13])
@pytest.mark.parametrize("count", [2, 4, 5, 6, 11])
def test_ring_takes_chunks_of_any_size(before: int, count: int) -> None:
    cache = ring()
    for position in range(before):
        cache.append(*tokens(position, 1))
    ordered = positions(cache.extend(*tokens(before, count)))
    expected = [max(p, -1) for p in range(before - WINDOW, before + count)]
    assert ordered == expected
    end = before + count
    slots = positions(cache.append(*tokens(end, 1)))
    held = {p: p % WINDOW for p in range(max(0, end + 1 - WINDOW), end + 1)}
    assert all(slots[slot] == position for position, slot in held.items())


def test_ring_goes_back_while_nothing_is_lost() -> None:
    cache = ring()
    cache.extend(*tokens(0, 5))
    cache.trim(2)
    assert cache.offset == 3
    assert positions(cache.extend(*tokens(3, 2)))[-5:] == [0, 1, 2, 3, 4]


def test_ring_cannot_go_back_once_it_has_gone_round() -> None:
    cache = ring()
    cache.extend(*tokens(0, 6))
    cache.trim(0)
    with pytest.raises(CacheError) as caught:
        cache.trim(1)
    assert str(caught.value) == (
        "cannot drop the last 1 of 6 positions: a sliding layer keeps 5 and has overwritten the "
        "ones before; restore a snapshot instead"
    )
    assert cache.offset == 6


# ---- the growing store


@pytest.mark.parametrize("plan", [[1] * 300, [7, 1, 1, 300, 1], [256, 1], [257], [1, 257, 130]])
def test_full_cache_holds_every_position(plan: list[int]) -> None:
    cache, end, segments = full(), 0, []
    for count in plan:
        new = tokens(end, count)
        segments = cache.append(*new) if count == 1 else [cache.extend(*new)]
        mx.eval(cache.arrays)
        end += count
    assert [p for segment in segments for p in positions(segment)] == list(range(end))
    assert cache.offset == end


def test_a_decoded_token_does_not_touch_the_long_store() -> None:
    """Were it written into the long store, a step in flight would force a copy of the context."""
    cache = full()
    cache.extend(*tokens(0, 1000))
    long_store = cache.arrays[:2]
    for step in range(RECENT):
        cache.append(*tokens(1000 + step, 1))
    assert cache.arrays[0] is long_store[0] and cache.arrays[1] is long_store[1]
    cache.append(*tokens(1000 + RECENT, 1))
    assert cache.arrays[0] is not long_store[0]


def test_capacity_grows_by_chunks() -> None:
    cache, sizes = full(), set()
    for step in range(40):
        cache.extend(*tokens(step * 32, 32))
        sizes.add(cache.arrays[0].shape[2])
    assert sizes == {GROWTH * n for n in range(1, 6)}
    per_position = 2 * BATCH * HEADS * HEAD_DIM * 4
    assert cache.nbytes == per_position * (5 * GROWTH + RECENT)


@pytest.mark.parametrize("drop", [0, 1, 3, 4, 9, 14])
def test_full_cache_goes_back_anywhere(drop: int) -> None:
    cache = full()
    cache.extend(*tokens(0, 10))
    for position in range(10, 14):
        cache.append(*tokens(position, 1))
    cache.trim(drop)
    assert cache.offset == 14 - drop
    assert positions(cache.extend(*tokens(14 - drop, 2))) == list(range(16 - drop))


@pytest.mark.parametrize("make", [ring, full])
def test_more_than_there_is_cannot_be_dropped(make) -> None:
    cache = make()
    cache.extend(*tokens(0, 3))
    for count in (4, -1):
        with pytest.raises(CacheError, match=f"cannot drop {count} positions: the cache holds 3"):
            cache.trim(count)


# ---- snapshots


@pytest.mark.parametrize("make", [ring, full])
def test_snapshot_survives_what_comes_after(make) -> None:
    cache = make()
    cache.extend(*tokens(0, 7))
    cache.append(*tokens(7, 1))
    snapshot = cache.snapshot()
    for position in range(50, 60):
        cache.append(*tokens(position, 1))
    cache.extend(*tokens(90, 9))
    mx.eval(cache.arrays)
    cache.restore(snapshot)
    assert cache.offset == 8
    assert positions(cache.extend(*tokens(8, 2)))[-5:] == [5, 6, 7, 8, 9]


def model_cache(**changes) -> ModelCache:
    return ModelCache([ring(), full()], **{"left_padding": [0, 2], **changes})


def test_layers_move_together() -> None:
    cache = model_cache()
    for layer in cache:
        layer.extend(*tokens(0, 4))
    assert (len(cache), cache.offset, cache.batch_size) == (2, 4, 2)
    assert cache.nbytes == cache[0].nbytes + cache[1].nbytes
    snapshot = cache.snapshot()
    cache.trim(3)
    assert [layer.offset for layer in cache] == [1, 1]
    cache.restore(snapshot)
    assert [layer.offset for layer in cache] == [4, 4]


def test_no_layer_is_trimmed_unless_all_can_be() -> None:
    cache = ModelCache([full(), ring()], [0, 0])
    for layer in cache:
        layer.extend(*tokens(0, 8))
    with pytest.raises(CacheError, match="a sliding layer keeps 5"):
        cache.trim(1)
    assert [layer.offset for layer in cache] == [8, 8]


def test_snapshot_of_another_cache_is_refused() -> None:
    with pytest.raises(CacheError) as caught:
        model_cache().restore(ModelCache([ring()], [0]).snapshot())
    assert str(caught.value) == (
        "snapshot of 1 layers and 1 rows; this cache has 2 layers and 2 rows"
    )


def test_snapshot_of_other_padding_is_refused() -> None:
    """It was taken silently, and the rows then saw their padding: logits off by whole units."""
    layers = [ring(), full()]
    padded, plain = ModelCache(layers, [0, 3]), ModelCache(layers, [0, 0])
    padded.restore(padded.snapshot())
    with pytest.raises(CacheError) as caught:
        plain.restore(padded.snapshot())
    assert str(caught.value) == (
        "snapshot of rows padded by [0, 3] tokens; this cache's are padded by [0, 0]"
    )


def test_rows_without_padding_need_no_start() -> None:
    assert model_cache(left_padding=[0, 0]).start is None
    start = model_cache().start
    assert start is not None and start.tolist() == [0, 2]
