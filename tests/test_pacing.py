"""Chunk sizes follow the time that chunks take; the clock here is a made-up machine."""

import math

import pytest

from mlx_gptoss.pacing import FIRST, LEAST, TARGET_S, ChunkPacer


def seconds(tokens: int, depth: int, *, rate: float, slowing: float = 0.0) -> float:
    """A machine that reads `rate` tokens a second, each slowed by what lies before it."""
    return tokens / rate * (1 + slowing * depth)


def read(pacer: ChunkPacer, prompt: int, **machine: float) -> list[tuple[int, float]]:
    """Chunks and their times."""
    chunks, depth = [], 0
    while depth < prompt:
        size = min(pacer.size, prompt - depth)
        chunks.append((size, seconds(size, depth, **machine)))
        pacer.note(*chunks[-1])
        depth += size
    return chunks


@pytest.mark.parametrize("rate", [150, 405, 600, 1022, 1589, 2416])
def test_published_speeds_settle_below_the_target(rate):
    """From M1 to M2 Ultra: after the first chunks none takes longer, and none is tiny."""
    chunks = read(ChunkPacer(512), 8192, rate=rate)
    assert all(time <= TARGET_S for _, time in chunks[3:])
    settled = chunks[len(chunks) // 2][0]
    assert settled == 512 or seconds(settled, 0, rate=rate) >= 0.17


def test_chunks_shrink_with_depth():
    chunks = read(ChunkPacer(512), 60_000, rate=1200, slowing=1e-4)
    assert max(size for size, _ in chunks[:10]) == 512
    assert chunks[-2][0] <= 128
    late = [time for _, time in chunks if time > TARGET_S]
    assert len(late) <= 4 and max(late) < 1.1 * TARGET_S  # the one that finds out, for each size


def test_a_very_slow_machine_is_found_out_at_once():
    pacer = ChunkPacer(512)
    pacer.note(FIRST, 9 * TARGET_S)
    assert pacer.size == LEAST
    pacer.note(LEAST, 100.0)
    assert pacer.size == LEAST


def test_limits():
    assert ChunkPacer(7).size == 7
    small = ChunkPacer(7)
    small.note(7, 99.0)
    assert small.size == 7
    fixed = ChunkPacer(512, target_s=math.inf)
    fixed.note(512, 99.0)
    assert fixed.size == 512


def test_the_end_of_a_prompt_says_nothing():
    pacer = ChunkPacer(512)
    pacer.note(3, 0.001)
    assert pacer.size == FIRST


def test_noise_does_not_change_a_size_that_fits():
    pacer = ChunkPacer(512)
    for time in (0.3, 0.45, 0.23, 0.49, 0.25):
        pacer.note(FIRST, time)
        assert pacer.size == FIRST
