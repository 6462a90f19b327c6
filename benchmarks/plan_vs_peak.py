"""The planned peak memory beside the one that MLX reports, for one model and one prompt.

    python benchmarks/plan_vs_peak.py demo 512
    python benchmarks/plan_vs_peak.py demo 512 --embedding file    the table stays on disk

The prompt is read in chunks of fixed size, then a few tokens are decoded. Run it once a process:
the peak is the process's. The last line is the record.
"""

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.engine import PREFILL_CHUNK, Engine
from mlx_gptoss.library import find_model
from mlx_gptoss.machine import read_machine
from mlx_gptoss.model import load_model
from mlx_gptoss.plan import MemoryPlan, scratch_here
from mlx_gptoss.routes import sample_prompt
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.table import PLACES, EmbeddingPlace

ANSWER = 8


def main(name: str, prompt_tokens: int, place: EmbeddingPlace) -> None:
    """Plan, run, and print both."""
    folder = find_model(name)
    checkpoint, model = open_checkpoint(folder), load_model(folder, embedding=place)
    plan = MemoryPlan(
        config=checkpoint.config,
        packing=checkpoint.quantization,
        context=prompt_tokens,
        embedding=place,
        scratch=scratch_here(),
    )
    engine = Engine(model, chunk_target_s=math.inf)
    prompt = sample_prompt(checkpoint.config, prompt_tokens)
    greedy = SamplingParams(temperature=0)
    with engine.generate(prompt, sampling=greedy, max_tokens=ANSWER) as generation:
        tokens = list(generation)
    peak, machine = mx.get_peak_memory(), read_machine()
    record = {
        "model": Path(name).name,
        "prompt_tokens": prompt_tokens,
        "chunk": PREFILL_CHUNK,
        "embedding": place,
        "tokens": tokens,
        "weights_bytes": sum(array.nbytes for array in model.arrays),
        "kv_bytes": generation.cache.nbytes,
        "planned_bytes": plan.total_bytes,
        "peak_bytes": peak,
        "planned_over_peak": round(plan.total_bytes / peak, 4),
        "machine": f"{machine.cpu}, {machine.system} {machine.os_version}",
        "mlx": version("mlx"),
    }
    for key, value in record.items():
        print(f"{key:20}{value}")
    print(json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("prompt_tokens", type=int)
    parser.add_argument("--embedding", choices=PLACES, default="memory")
    options = parser.parse_args()
    main(options.model, options.prompt_tokens, options.embedding)
