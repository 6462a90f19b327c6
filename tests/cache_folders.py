"""What the tests of caches in files share: turns held, files looked at, contents made."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from cache_writer import IDENTITY

from mlx_gptoss.cache import ModelCache, WindowCache
from mlx_gptoss.cache_files import Content
from mlx_gptoss.cache_folder import CacheFolder
from mlx_gptoss.harmony.ledger import Prompt
from mlx_gptoss.model import Model
from mlx_gptoss.prefix_cache import PrefixCache, Slot

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [(7 * n * n + n) % 1024 for n in range(340)]
HEAD, STABLE, END = 150, 290, 299  # past the window of 128, all of them


def prefixes_of(model: Model, folder: Path, **options: Any) -> PrefixCache:
    files = CacheFolder(folder, identity=IDENTITY, **options)
    return PrefixCache(model.make_cache, budget_bytes=2**30, files=files)


def prompt_of(tokens: Sequence[int], stable: int = STABLE) -> Prompt:
    return Prompt(tokens=tuple(tokens), ends=(), stable=stable)


def take(prefixes: PrefixCache, prompt: Prompt, *, head: int = HEAD) -> Slot:
    """What a turn begins with, once files are read."""
    return prefixes.take(prompt, head=head, found=prefixes.search(prompt, head=head).result())


def hold_turn(
    model: Model, prefixes: PrefixCache, tokens: Sequence[int], *, answer: int = END - STABLE - 2
) -> Slot:
    """Feed what is left of a prompt that ends behind `STABLE`, and some tokens one by one."""
    end = len(tokens) - answer
    slot = take(prefixes, prompt_of(tokens[:end], end - 2))
    for mark in (*slot.marks, end):
        if piece := tokens[slot.cache.offset : mark]:
            model.hidden(mx.array([piece]), slot.cache)
            mx.eval(slot.cache.arrays)
            prefixes.note(slot, prompt_of(tokens), head=HEAD)
    for token in tokens[end:]:
        mx.eval(model.next_logits(mx.array([[token]]), slot.cache))
    slot.note(tokens)
    prefixes.give_back(slot)
    return slot


def files_in(folder: Path) -> list[Path]:
    """The least recently used first."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def wait_for(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def overwrite(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(new)


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def states_of(cache: ModelCache) -> list[np.ndarray]:
    return [np.array(array.astype(mx.float32)) for array in cache.arrays]


def content_of(model: Model, number: int, count: int = 200) -> tuple[list[int], Content]:
    """The tokens of a conversation that begins like no other, and its keys and values."""
    tokens = [number, *TOKENS[:count]]
    slot = Slot(model.make_cache())
    model.hidden(mx.array([tokens]), slot.cache)
    slot.note(tokens)
    return tokens, slot.content()


def load(folder: CacheFolder, model: Model, tokens: Sequence[int]) -> tuple[int, ModelCache]:
    cache = model.make_cache()
    return fill(folder, cache, [*tokens, 1]), cache


def fill(folder: CacheFolder, cache: ModelCache, prompt: Sequence[int]) -> int:
    """Fill an empty cache from a file, and return how much of a prompt it holds then."""
    sliding = [isinstance(layer, WindowCache) for layer in cache]
    found = folder.search(prompt, more_than=0, sliding=sliding).result()
    if found is not None:
        found.state.fill(cache)
    return cache.offset


def fed(model: Model, tokens: Sequence[int]) -> ModelCache:
    cache = model.make_cache()
    model.hidden(mx.array([tokens]), cache)
    return cache
