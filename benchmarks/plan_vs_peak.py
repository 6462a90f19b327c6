"""The planned peak memory beside the one that MLX reports, for one model and one prompt.

    python benchmarks/plan_vs_peak.py demo 512

The prompt is read in chunks of fixed size, then a few tokens are decoded. Run it once a process:
the peak is the process's. The last line is the record.
"""

import json
import math
import sys

import mlx.core as mx

from mlx_gptoss.bench_runs import named_arrays
from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.engine import PREFILL_CHUNK, Engine
from mlx_gptoss.library import find_model
from mlx_gptoss.machine import read_machine
from mlx_gptoss.model import load_model
from mlx_gptoss.plan import ON_CPU, ON_METAL, MemoryPlan
from mlx_gptoss.routes import sample_prompt
from mlx_gptoss.sampling import SamplingParams

ANSWER = 8


def main(name: str, prompt_tokens: int) -> None:
    """Plan, run, and print both."""
    folder = find_model(name)
    checkpoint, model = open_checkpoint(folder), load_model(folder)
    plan = MemoryPlan(
        config=checkpoint.config,
        packing=checkpoint.quantization,
        context=prompt_tokens,
        scratch=ON_METAL if mx.metal.is_available() else ON_CPU,
    )
    engine = Engine(model, chunk_target_s=math.inf)
    prompt = sample_prompt(checkpoint.config, prompt_tokens)
    greedy = SamplingParams(temperature=0)
    with engine.generate(prompt, sampling=greedy, max_tokens=ANSWER) as generation:
        list(generation)
    peak, machine = mx.get_peak_memory(), read_machine()
    record = {
        "model": name,
        "prompt_tokens": prompt_tokens,
        "chunk": PREFILL_CHUNK,
        "weights_bytes": sum(array.nbytes for array in named_arrays(model).values()),
        "kv_bytes": generation.cache.nbytes,
        "planned_bytes": plan.total_bytes,
        "peak_bytes": peak,
        "planned_over_peak": round(plan.total_bytes / peak, 4),
        "machine": f"{machine.cpu}, {machine.system} {machine.os_version}",
        "mlx": mx.__version__,
    }
    for key, value in record.items():
        print(f"{key:20}{value}")
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
