"""openai-harmony 0.0.8, the oracle of the harmony layer, loaded offline once per process."""

import base64
import functools
import os
import tempfile
from pathlib import Path

import openai_harmony as upstream

from mlx_gptoss.vocabulary import load_vocabulary

_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"


@functools.cache
def oracle() -> upstream.HarmonyEncoding:
    """The oracle's encoding, given our ranks; it re-reads the environment at every load."""
    before = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            base64.b64encode(token) + b" %d\n" % rank
            for rank, token in enumerate(load_vocabulary().tokens)
        ]
        (Path(folder) / "o200k_base.tiktoken").write_bytes(b"".join(lines))
        os.environ[_VARIABLE] = folder
        try:
            return upstream.load_harmony_encoding(upstream.HarmonyEncodingName.HARMONY_GPT_OSS)
        finally:
            os.environ.pop(_VARIABLE)
            if before is not None:
                os.environ[_VARIABLE] = before
