"""Make parity.npz and parity.json: what transformers and mlx-lm compute on a tiny checkpoint.

    pip install -e '.[test,oracles]'
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/goldens/make_parity.py

The checkpoint is random, in the published layout, and remade from its seed by `tests/parity.py`.
transformers' `GptOssForCausalLM` in float32 is the truth. Its own bfloat16, and mlx-lm as
released, are compared with it here, and the figures kept for the tests and for the README.
Needs 4 GB and five minutes.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import torch
import transformers
from mlx_lm.models.cache import make_prompt_cache
from parity import GOLDENS, LONG, RANGES, SEED, SHAPE, SHORT, compare, prompt
from tiny import write_checkpoint
from transformers.models.gpt_oss import modeling_gpt_oss
from weights import tiny_config

from mlx_gptoss.rope import inverse_frequencies

CHUNK = 500  # both peers are fed so: eager attention would hold T * T scores


def transformers_logits(folder: Path, tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        attn_implementation="eager",
    ).eval()
    cache, parts = transformers.DynamicCache(config=model.config), []
    with torch.inference_mode():
        for start in range(0, len(tokens), CHUNK):
            chunk = torch.tensor(tokens[None, start : start + CHUNK])
            out = model(chunk, past_key_values=cache, use_cache=True)
            parts.append(out.logits[0].float().numpy())
    return np.concatenate(parts)


@contextlib.contextmanager
def exact_angles() -> Iterator[None]:
    """transformers with position * frequency formed in float64; it forms them in float32."""
    inverse = torch.from_numpy(inverse_frequencies(tiny_config(SHAPE)))

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angles = position_ids[..., None].double() * inverse
        return tuple(
            (f(angles) * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin)
        )

    with mock.patch.object(modeling_gpt_oss.GptOssRotaryEmbedding, "forward", forward):
        yield


def mlx_lm_logits(folder: Path, tokens: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(dtype)
    cache, parts = make_prompt_cache(model), []
    for start in range(0, len(tokens), CHUNK):
        logits = model(mx.array(tokens[None, start : start + CHUNK]), cache=cache)
        parts.append(np.array(logits[0].astype(mx.float32)))
    return np.concatenate(parts)


def main() -> None:
    torch.manual_seed(0)
    short, long = prompt(SHORT), prompt(LONG)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(Path(temporary) / "source", shape=SHAPE, seed=SEED)
        truth = transformers_logits(folder, short, torch.float32)
        truth_long = transformers_logits(folder, long, torch.float32)
        with exact_angles():
            exact_long = transformers_logits(folder, long, torch.float32)
        narrow = transformers_logits(folder, short, torch.bfloat16)
        peer = mlx_lm_logits(folder, short, mx.float32)
        peer_narrow = mlx_lm_logits(folder, short, mx.bfloat16)
        peer_long = mlx_lm_logits(folder, long, mx.float32)
    positions = np.unique(np.r_[0:LONG:150, 125:131, 4090:4102, LONG - 4 : LONG])
    np.savez_compressed(
        GOLDENS / "parity.npz",
        short_logits=truth,
        long_positions=positions,
        long_logits=truth_long[positions],
        long_exact_logits=exact_long[positions],
        long_best=truth_long.argmax(-1).astype(np.uint16),
    )
    figures = {
        "truth": "transformers GptOssForCausalLM, float32",
        "versions": {m.__name__: m.__version__ for m in (transformers, torch, mlx_lm)}
        | {"mlx": mx.__version__},
        "short": {
            "tokens": SHORT,
            "transformers bfloat16": compare(truth, narrow),
            "mlx-lm bfloat16": compare(truth, peer_narrow),
            "mlx-lm float32": compare(truth, peer),
        },
        "long": {
            "tokens": LONG,
            "transformers float32 against itself with exact angles": compare(
                exact_long, truth_long
            ),
            "mlx-lm float32, by position": {
                f"{a}-{b}": compare(truth_long[a:b], peer_long[a:b]) for a, b in RANGES
            },
        },
    }
    text = json.dumps(figures, indent=2)
    (GOLDENS / "parity.json").write_text(text + "\n")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
