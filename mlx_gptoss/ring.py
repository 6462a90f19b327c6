"""The keys and values of a sliding layer: position p in row p % W of a ring, extended by chunks."""

import mlx.core as mx

Segment = tuple[mx.array, mx.array]  # keys and values, (B, Hkv, N, Dh) each


def extend_ring(ring: Segment, new: Segment, *, offset: int) -> tuple[Segment, Segment]:
    """The positions that a chunk sees, and the ring after it.

    Args:
        ring: (B, Hkv, W, Dh) each.
        new: those of the chunk, (B, Hkv, T, Dh) each.
        offset: position of the chunk's first token.

    Returns:
        The W positions before `offset` (what the ring has, where there are none) and the new ones,
        in order, (B, Hkv, W + T, Dh) each; and the ring.
    """
    window, end = ring[0].shape[2], offset + new[0].shape[2]
    unroll = (offset + mx.arange(window)) % window
    # Row s gets the last position before `end` that is s modulo W; `ordered` starts at position
    # offset - W.
    roll = end - 1 - (end - 1 - mx.arange(window)) % window - (offset - window)
    pairs = zip(ring, new, strict=True)
    keys, values = (mx.concatenate([old[:, :, unroll], more], axis=2) for old, more in pairs)
    return (keys, values), (keys[:, :, roll], values[:, :, roll])
