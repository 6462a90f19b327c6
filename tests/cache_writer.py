"""Writes large files of caches until it is killed, and says the number of each that is written.

`python tests/cache_writer.py FOLDER FIRST_NUMBER`
"""

import sys
from pathlib import Path

import mlx.core as mx

from mlx_gptoss.cache import FullCache
from mlx_gptoss.cache_files import Content
from mlx_gptoss.cache_folder import CacheFolder

IDENTITY = "0123456789abcdef"
TOKENS = 12_000


def content(number: int) -> Content:
    """A conversation of 12 MB that its number tells."""
    layer = FullCache((1, 2, 64), mx.float32)
    ramp = mx.arange(2 * TOKENS * 64, dtype=mx.float32).reshape(1, 2, TOKENS, 64)
    layer.extend(ramp + number, ramp - number)
    return Content.of([number] * TOKENS, (layer.snapshot(),), {})


if __name__ == "__main__":
    files = CacheFolder(Path(sys.argv[1]), identity=IDENTITY)
    for number in range(int(sys.argv[2]), 10**6):
        files.save(content(number))
        files.flush()
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
