"""Device buffers as the caller sees them: typed arrays of the host."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

ITEM_SIZES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8,
}  # fmt: skip


@dataclass
class Buffer:
    """A buffer to bind to a kernel.

    Attributes:
        data: The bytes, 1-D uint8; a launch writes the kernel's stores back into them.
        dtype: Name of the element type; "" for raw bytes (a struct).
        shape: Of the elements.
        read_only: Whether a store is a fault even where the kernel declares the buffer writable.
        initialised: Whether the kernel may read what it has not written. Where it may not, it must
            also write every byte.
    """

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]
    read_only: bool = False
    initialised: bool = True

    @classmethod
    def of(cls, array: Any, *, dtype: str | None = None, read_only: bool = False) -> "Buffer":
        """Copy an array into a buffer.

        Args:
            array: Anything numpy takes. bfloat16 values come as uint16 bit patterns.
            dtype: Element type where it is not the array's: "bfloat16", or "" for raw bytes.
            read_only: See the class.
        """
        values = np.ascontiguousarray(array)
        name = str(values.dtype) if dtype is None else dtype
        if name not in ITEM_SIZES and name != "":
            raise ValueError(f"buffer of dtype {name!r}: Metal has {', '.join(ITEM_SIZES)}")
        shape = (
            np.shape(array) if name and ITEM_SIZES[name] == values.itemsize else (values.nbytes,)
        )
        return cls(values.reshape(-1).view(np.uint8).copy(), name, shape, read_only=read_only)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "Buffer":
        """An output: its bytes are the pattern 0xFF until the kernel writes them."""
        data = np.full(prod(shape) * ITEM_SIZES[dtype], 0xFF, np.uint8)
        return cls(data, dtype, tuple(shape), initialised=False)

    def array(self) -> np.ndarray:
        """The contents as numpy; bfloat16 widened to float32."""
        if self.dtype == "bfloat16":
            wide = self.data.view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        return self.data.view(self.dtype or np.uint8).reshape(self.shape)
