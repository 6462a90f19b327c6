"""Keys and values of the positions seen: a ring for sliding layers, a growing store for full.

Arrays are never written in place: an update makes a new array and MLX reuses the buffer if nobody
else holds it. So a snapshot costs nothing when it is taken (a later update copies instead of
reusing), and a step that was computed ahead can be dropped by restoring.

A batch of ragged prompts is padded on the left; `ModelCache.start` says where each row begins.
All rows share one `offset`, the number of positions fed so far, padding included.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_gptoss.errors import CacheError
from mlx_gptoss.ring import Segment, extend_ring

RECENT = 128  # tokens appended one by one before they are merged into the long store
GROWTH = 256  # positions; capacity grows by this or an eighth, whichever is more


class WindowSnapshot(NamedTuple):
    """What `WindowCache.restore` needs; holds its arrays, copies nothing."""

    keys: mx.array
    values: mx.array
    offset: int


class FullSnapshot(NamedTuple):
    """What `FullCache.restore` needs; holds its arrays, copies nothing."""

    frozen: Segment
    recent: Segment
    frozen_length: int
    recent_length: int


def _write(store: Segment, new: Segment, at: int) -> Segment:
    start = mx.array([at])
    keys, values = (
        mx.slice_update(a, b, start, axes=(2,)) for a, b in zip(store, new, strict=True)
    )
    return keys, values


def _join(*segments: Segment) -> Segment:
    """Those that hold positions, one after the other."""
    filled = [segment for segment in segments if segment[0].shape[2]]
    if len(filled) == 1:  # laid out for the kernels that will read it
        return mx.contiguous(filled[0][0]), mx.contiguous(filled[0][1])
    keys, values = (mx.concatenate(list(parts), axis=2) for parts in zip(*filled, strict=True))
    return keys, values


def _first(store: Segment, count: int) -> Segment:
    return store[0][:, :, :count], store[1][:, :, :count]


class WindowCache:
    """The last W positions of a sliding layer, position p in slot p % W.

    Args:
        shape: (B, Hkv, W, Dh) of keys and of values.
        dtype: of both.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: mx.Dtype):
        self.window = shape[2]
        self.offset = 0
        self._ring: Segment = (mx.zeros(shape, dtype), mx.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        """Size of the ring, in bytes."""
        return sum(a.nbytes for a in self._ring)

    @property
    def arrays(self) -> Segment:
        """What must be evaluated for this cache to be up to date."""
        return self._ring

    def append(self, keys: mx.array, values: mx.array) -> Segment:
        """Add one position per row.

        Args:
            keys: (B, Hkv, 1, Dh).
            values: as `keys`.

        Returns:
            The ring, (B, Hkv, W, Dh) each, in slot order.
        """
        self._ring = _write(self._ring, (keys, values), self.offset % self.window)
        self.offset += 1
        return self._ring

    def extend(
        self,
        keys: mx.array,
        values: mx.array,
        *,
        by: Callable[..., tuple[Segment, Segment]] = extend_ring,
    ) -> Segment:
        """Add T positions per row.

        Args:
            keys: (B, Hkv, T, Dh).
            values: as `keys`.
            by: computes what `ring.extend_ring` does.

        Returns:
            The W positions before the new ones (zeros where there are none) and the new ones, in
            order of position, (B, Hkv, W + T, Dh) each.
        """
        ordered, self._ring = by(self._ring, (keys, values), offset=self.offset)
        self.offset += keys.shape[2]
        return ordered

    def snapshot(self) -> WindowSnapshot:
        """The present state, for `restore`."""
        return WindowSnapshot(*self._ring, self.offset)

    def restore(self, snapshot: WindowSnapshot) -> None:
        """Go back (or forth) to a state that `snapshot` returned."""
        self._ring, self.offset = (snapshot.keys, snapshot.values), snapshot.offset

    def check_trim(self, count: int) -> None:
        """Raise `CacheError` if the last `count` positions cannot be dropped."""
        _check_count(count, self.offset)
        if count and self.offset > self.window:
            raise CacheError(
                f"cannot drop the last {count} of {self.offset} positions: a sliding layer keeps "
                f"{self.window} and has overwritten the ones before; restore a snapshot instead"
            )

    def trim(self, count: int) -> None:
        """Drop the last positions.

        Args:
            count: how many.

        Raises:
            CacheError: more than there are, or the ring has gone round.
        """
        self.check_trim(count)
        self.offset -= count


class FullCache:
    """All positions of a full-attention layer: a long frozen store, and a short one for decoding.

    A decoded token is written into the short store, so that even when the buffer is still in use
    by a step in flight, and MLX must copy it, the copy is of 128 positions and not of the context.
    Every 128 tokens the short store is merged into the long one.

    Args:
        shape: (B, Hkv, Dh) of keys and of values, without positions.
        dtype: of both.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: mx.Dtype):
        self._shape, self._dtype = shape, dtype
        self._frozen, self._recent = self._empty(0), self._empty(RECENT)
        self._frozen_length = self._recent_length = 0

    def _empty(self, positions: int) -> Segment:
        batch, heads, head_dim = self._shape
        shape = (batch, heads, positions, head_dim)
        return mx.zeros(shape, self._dtype), mx.zeros(shape, self._dtype)

    @property
    def offset(self) -> int:
        """Positions held."""
        return self._frozen_length + self._recent_length

    @property
    def nbytes(self) -> int:
        """Size of both stores, free capacity included, in bytes."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What must be evaluated for this cache to be up to date."""
        return *self._frozen, *self._recent

    @property
    def merges_next(self) -> bool:
        """Whether the next `append` merges: in place, if nobody holds the long store by then."""
        return self._recent_length == RECENT

    def append(self, keys: mx.array, values: mx.array) -> list[Segment]:
        """Add one position per row.

        Args:
            keys: (B, Hkv, 1, Dh).
            values: as `keys`.

        Returns:
            One or two segments that hold all positions in order.
        """
        if self.merges_next:
            self.freeze()
        self._recent = _write(self._recent, (keys, values), self._recent_length)
        self._recent_length += 1
        stores = (self._frozen, self._frozen_length), (self._recent, self._recent_length)
        return [_first(store, count) for store, count in stores if count]

    def extend(self, keys: mx.array, values: mx.array) -> Segment:
        """Add T positions per row.

        Args:
            keys: (B, Hkv, T, Dh).
            values: as `keys`.

        Returns:
            All positions in order, (B, Hkv, offset, Dh) each.
        """
        self.freeze()
        self._freeze((keys, values), keys.shape[2])
        return _first(self._frozen, self._frozen_length)

    def freeze(self) -> Segment:
        """Merge the short store into the long one.

        Returns:
            The long store with its free capacity, (B, Hkv, C, Dh) each; the first `offset` of its C
            positions are held.
        """
        count, self._recent_length = self._recent_length, 0
        if count:
            self._freeze(_first(self._recent, count), count)
        return self._frozen

    def _freeze(self, new: Segment, count: int) -> None:
        capacity, needed = self._frozen[0].shape[2], self._frozen_length + count
        if needed > capacity:
            target = max(needed, capacity + max(GROWTH, capacity // 8))
            room = self._empty(-(-target // GROWTH) * GROWTH - needed)
            self._frozen = _join(_first(self._frozen, self._frozen_length), new, room)
        else:
            self._frozen = _write(self._frozen, new, self._frozen_length)
        self._frozen_length = needed

    def snapshot(self) -> FullSnapshot:
        """The present state, for `restore`."""
        return FullSnapshot(self._frozen, self._recent, self._frozen_length, self._recent_length)

    def restore(self, snapshot: FullSnapshot) -> None:
        """Go back (or forth) to a state that `snapshot` returned."""
        self._frozen, self._recent, self._frozen_length, self._recent_length = snapshot

    def check_trim(self, count: int) -> None:
        """Raise `CacheError` if the last `count` positions cannot be dropped."""
        _check_count(count, self.offset)

    def trim(self, count: int) -> None:
        """Drop the last positions.

        Args:
            count: how many.

        Raises:
            CacheError: more than there are.
        """
        self.check_trim(count)
        from_recent = min(count, self._recent_length)
        self._recent_length -= from_recent
        self._frozen_length -= count - from_recent


def _check_count(count: int, offset: int) -> None:
    if not 0 <= count <= offset:
        raise CacheError(f"cannot drop {count} positions: the cache holds {offset}")


class ModelSnapshot(NamedTuple):
    """What `ModelCache.restore` needs."""

    layers: tuple[WindowSnapshot | FullSnapshot, ...]
    left_padding: tuple[int, ...]


class ModelCache:
    """One cache per layer, moved together.

    Args:
        layers: in the order of the model.
        left_padding: padding tokens at the head of each row, B of them.
    """

    def __init__(self, layers: Sequence[WindowCache | FullCache], left_padding: Sequence[int]):
        self._layers = tuple(layers)
        self.left_padding = tuple(left_padding)
        self.batch_size = len(left_padding)
        self.start = mx.array(list(left_padding), mx.int32) if any(left_padding) else None

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> WindowCache | FullCache:
        return self._layers[index]

    def __iter__(self) -> Iterator[WindowCache | FullCache]:
        return iter(self._layers)

    @property
    def offset(self) -> int:
        """Positions fed so far, padding included."""
        return self._layers[0].offset

    @property
    def nbytes(self) -> int:
        """Size of all layers, in bytes."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def merges_next(self) -> bool:
        """Whether the next single position moves long stores.

        That is in place only if no step is in flight and no snapshot is held; else each is copied.
        """
        return any(isinstance(layer, FullCache) and layer.merges_next for layer in self._layers)

    @property
    def arrays(self) -> list[mx.array]:
        """What `mx.eval` needs to bring the cache up to date, and no output with it."""
        return [a for layer in self._layers for a in layer.arrays]

    def snapshot(self) -> ModelSnapshot:
        """The present state of all layers, for `restore`; costs no copy now."""
        return ModelSnapshot(tuple(layer.snapshot() for layer in self._layers), self.left_padding)

    def restore(self, snapshot: ModelSnapshot) -> None:
        """Go to a state that `snapshot` returned.

        Args:
            snapshot: of this cache, or of one made for the same model, batch and padding.

        Raises:
            CacheError: it belongs to another number of layers or rows, or to other padding.
        """
        rows = len(snapshot.left_padding)
        if (len(snapshot.layers), rows) != (len(self), self.batch_size):
            raise CacheError(
                f"snapshot of {len(snapshot.layers)} layers and {rows} rows; this "
                f"cache has {len(self)} layers and {self.batch_size} rows"
            )
        if snapshot.left_padding != self.left_padding:
            raise CacheError(
                f"snapshot of rows padded by {list(snapshot.left_padding)} tokens; this cache's "
                f"are padded by {list(self.left_padding)}"
            )
        for layer, state in zip(self._layers, snapshot.layers, strict=True):
            layer.restore(state)  # pyright: ignore[reportArgumentType]

    def trim(self, count: int) -> None:
        """Drop the last positions of every layer, or of none.

        Args:
            count: how many.

        Raises:
            CacheError: more than there are, or a ring has gone round.
        """
        for layer in self._layers:
            layer.check_trim(count)
        for layer in self._layers:
            layer.trim(count)
