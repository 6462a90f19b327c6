"""The o200k vocabulary of gpt-oss: text to token ids and back, offline.

The ranks ship inside the package (0.8 MB, hash-checked) and become a `tiktoken.Encoding` with one
name per id and exactly as many ids as the models have rows. Nothing is downloaded and no
environment variable is read: both tiktoken and openai-harmony fetch this file at run time, which
fails behind proxies and on machines without a network.

`Vocabulary.encode` knows ordinary text only. The spelling of a control token in a user's text
becomes plain characters, so no text can forge a message boundary; control tokens enter a prompt
as ids, from `Special`.
"""

import codecs
import functools
import hashlib
import json
import lzma
import re
import threading
from collections.abc import Iterable
from enum import IntEnum
from importlib.resources import files
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from mlx_gptoss.errors import VocabularyError

N_TEXT = 199_998  # ids below this are byte sequences; all others are control or reserved
N_VOCAB = 201_088  # rows of the published embedding and unembedding

DATA_SHA256 = "440741350e7cfa1c0f4869ce742d1b043550adbda5187adcac9e787edac6fba9"
"""Hash of the unpacked data file: one length byte a token, then all tokens joined.

The test suite writes the same ranks as .tiktoken lines and finds the published sha256
446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d.
"""

PUBLISHED_TOKENIZER_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
"""Hash of the tokenizer.json (27,868,174 bytes) published with both gpt-oss models."""

# The o200k pattern of tiktoken (OpenAI, MIT licence); the same in the published tokenizer.json.
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# tiktoken's regex engine panics past a million backtracks, which a run of 999,940 spaces needs.
_LONGEST_SPACE = 400_000


class Special(IntEnum):
    """The control tokens with a meaning; all other ids from 199,998 up are reserved."""

    STARTOFTEXT = 199_998
    ENDOFTEXT = 199_999
    RETURN = 200_002
    CONSTRAIN = 200_003
    CHANNEL = 200_005
    START = 200_006
    END = 200_007
    MESSAGE = 200_008
    CALL = 200_012
    ENDOFPROMPT = 200_018

    @property
    def spelling(self) -> str:
        """How the token is written where people read it: `<|start|>`."""
        return f"<|{self.name.lower()}|>"


def special_spelling(token: int) -> str:
    """Return the spelling of a control or reserved token: `<|start|>`, `<|reserved_200013|>`."""
    return _SPELLINGS.get(token, f"<|reserved_{token}|>")


_SPELLINGS = {int(token): token.spelling for token in Special}


class Vocabulary:
    """The vocabulary of both gpt-oss models; get it from `load_vocabulary`.

    Immutable and safe in any thread.

    Attributes:
        tokens: the bytes of every text token, by id (199,998 of them).
        n_vocab: 201,088, the rows of the published embedding.
        sampleable: (201088,) bool, read-only: False for ids that are never right to sample,
            which are the reserved ones, `<|startoftext|>` and `<|endofprompt|>`.
    """

    special = Special
    n_vocab = N_VOCAB

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.sampleable = _sampleable_mask()

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The `tiktoken.Encoding`, built at first use; for libraries that want one."""
        special = {special_spelling(token): token for token in range(N_TEXT, N_VOCAB)}
        return tiktoken.Encoding(
            "o200k_gpt_oss",
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens=special,
            explicit_n_vocab=N_VOCAB,
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ordinary text; every id is below 199,998.

        The spelling of a control token is text like any other. A lone surrogate becomes U+FFFD.
        A run of more than 400,000 white-space characters is encoded in pieces of that size.
        """
        if len(text) <= _LONGEST_SPACE:
            return self.encoding.encode_ordinary(text)
        return [t for part in _split_long_space(text) for t in self.encoding.encode_ordinary(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Control tokens appear as their spelling: this is for people who look at raw streams, the
        harmony parser is what splits a model's output.

        Raises:
            ValueError: an id is outside 0..201087.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of token ids, control tokens as their spelling.

        Raises:
            ValueError: an id is outside 0..201087.
        """
        return b"".join(self._bytes_of(token) for token in ids)

    def _bytes_of(self, token: int) -> bytes:
        if 0 <= token < N_TEXT:
            return self.tokens[token]
        if N_TEXT <= token < N_VOCAB:
            return special_spelling(token).encode()
        raise ValueError(f"token id: expected 0..{N_VOCAB - 1}, got {token}")


class TextDecoder:
    """Bytes in, text out, for one message: holds back an unfinished UTF-8 character.

    What it returns in total equals decoding all bytes at once with U+FFFD for what is no UTF-8,
    however the bytes are split.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.feed = self._decoder.decode
        """feed(bytes) -> the characters that are complete so far."""

    def finish(self) -> str:
        """Return U+FFFD if a character was left unfinished, else nothing; then start anew."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


_lock = threading.Lock()
_loaded: list[Vocabulary] = []


def load_vocabulary() -> Vocabulary:
    """Return the vocabulary, unpacked at the first call (0.2 s) and shared after.

    Raises:
        VocabularyError: the data file of the installed package is missing or damaged.
    """
    with _lock:
        if not _loaded:
            _loaded.append(Vocabulary(_read_tokens()))
        return _loaded[0]


def check_tokenizer_json(path: Path) -> None:
    """Check that a model folder's tokenizer.json is the vocabulary of gpt-oss.

    The published file is known by its hash (0.03 s); one written by another tool is compared
    entry by entry: all 199,998 tokens with their ids, the control tokens, and the split pattern.
    The merges are not compared, as the ranks imply them.

    Raises:
        VocabularyError: it cannot be read, is damaged, or is of another model.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(raw).hexdigest() == PUBLISHED_TOKENIZER_SHA256:
        return
    try:
        parsed = json.loads(raw)
        vocab, added = parsed["model"]["vocab"], parsed["added_tokens"]
        special = {entry["id"]: entry["content"] for entry in added}
    except (ValueError, KeyError, TypeError) as error:
        raise VocabularyError(
            f"{path}: expected a tokenizer.json with model.vocab and added_tokens, got a file "
            f"without them ({error}); it is damaged: fetch it again"
        ) from error
    _compare_text_tokens(path, vocab)
    _compare_special_tokens(path, special)
    _compare_pattern(path, parsed.get("pre_tokenizer"))


def _read_tokens() -> list[bytes]:
    source = files("mlx_gptoss") / "data" / "o200k_base.split.xz"
    try:
        data = lzma.decompress(source.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise VocabularyError(f"{source}: cannot be read ({error}); {_REINSTALL}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != DATA_SHA256:
        raise VocabularyError(f"{source}: expected sha256 {DATA_SHA256}, got {found}; {_REINSTALL}")
    ends = pairwise(accumulate(data[:N_TEXT], initial=N_TEXT))
    return [data[start:end] for start, end in ends]


_REINSTALL = "the installed package is damaged: reinstall mlx-gptoss"


def _sampleable_mask() -> npt.NDArray[np.bool_]:
    mask = np.arange(N_VOCAB) < N_TEXT
    for token in set(Special) - {Special.STARTOFTEXT, Special.ENDOFPROMPT}:
        mask[token] = True
    mask.flags.writeable = False
    return mask


def _split_long_space(text: str) -> list[str]:
    """Cut text inside its white-space runs so that no run is longer than `_LONGEST_SPACE`."""
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts += range(run.start() + _LONGEST_SPACE, run.end(), _LONGEST_SPACE)
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]


@functools.cache
def _byte_spelling() -> dict[int, str]:
    """How tokenizer.json spells a byte: printable Latin-1 as itself, others from U+0100 up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def _compare_text_tokens(path: Path, vocab: dict[str, int]) -> None:
    if len(vocab) != N_TEXT:
        raise VocabularyError(
            f"{path}: model.vocab: expected {N_TEXT} entries, got {len(vocab)}; {_OTHER_MODEL}"
        )
    tokens = load_vocabulary().tokens
    # One pass over all bytes joined; comparing 199,998 translated strings costs ten times more.
    joined = b"".join(tokens).decode("latin-1").translate(_byte_spelling())
    start = 0
    for rank, token in enumerate(tokens):
        spelled = joined[start : start + len(token)]
        start += len(token)
        if vocab.get(spelled) != rank:
            raise VocabularyError(
                f"{path}: model.vocab[{spelled!r}]: expected {rank}, got "
                f"{vocab.get(spelled)}; {_OTHER_MODEL}"
            )


def _compare_special_tokens(path: Path, found: dict[int, str]) -> None:
    for token in Special:
        if found.get(token) != token.spelling:
            raise VocabularyError(
                f"{path}: added_tokens: expected {token.spelling} at id {int(token)}, got "
                f"{found.get(token)}; {_OTHER_MODEL}"
            )
    strange = sorted(token for token in found if not N_TEXT <= token < N_VOCAB)
    if strange:
        raise VocabularyError(
            f"{path}: added_tokens: expected ids {N_TEXT}..{N_VOCAB - 1}, got {strange[0]} "
            f"({found[strange[0]]}); {_OTHER_MODEL}"
        )


def _compare_pattern(path: Path, pre_tokenizer: Any) -> None:
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if patterns != [PATTERN]:
        raise VocabularyError(
            f"{path}: pre_tokenizer: expected one Split with the o200k pattern, got {patterns}; "
            f"{_OTHER_MODEL}"
        )


_OTHER_MODEL = (
    "the file is damaged or of another model: take tokenizer.json from openai/gpt-oss-20b"
)
