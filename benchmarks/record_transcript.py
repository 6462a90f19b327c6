"""Store a model's greedy answer, for `mlx-gptoss verify` to compare with on other machines.

    python benchmarks/record_transcript.py demo "Why is the sky blue?"

Adds to mlx_gptoss/data/transcripts.json under the digest of the weights, so a model that is made
anew needs a new recording. The answer is taken from the CPU with kernels off: from the definition.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx

from mlx_gptoss import harmony
from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.engine import Engine
from mlx_gptoss.library import find_model
from mlx_gptoss.model import load_model
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.transcripts import FILE, Transcript, score, weights_digest

TOKENS = 48
STORE = Path(__file__).resolve().parent.parent / "mlx_gptoss" / "data" / FILE


def main(name: str, question: str) -> None:
    """Ask, score, store; the last line is the record without its tokens."""
    mx.set_default_device(mx.cpu)
    folder = find_model(name)
    digest, model = weights_digest(open_checkpoint(folder)), load_model(folder, kernels="off")
    if digest is None:
        raise SystemExit(f"{folder}: no manifest, so these weights have no digest")
    content = harmony.SystemContent(effort=harmony.ReasoningEffort("low"), date="2026-11-21")
    messages = [harmony.system(content), harmony.user(question)]
    prompt = harmony.render_conversation_for_completion(messages)
    greedy = SamplingParams(temperature=0)
    tokens = tuple(Engine(model).generate(prompt, sampling=greedy, max_tokens=TOKENS))
    found = score(model, Transcript(prompt=tuple(prompt), tokens=tokens, logprobs=()))
    if found.tokens != tokens:
        raise SystemExit("the model does not repeat its own greedy answer")
    entry = {**vars(found), "logprobs": [round(value, 4) for value in found.logprobs]}
    stored = json.loads(STORE.read_text()) if STORE.is_file() else {}
    STORE.write_text(json.dumps({**stored, digest: entry}) + "\n")
    print(json.dumps({"model": name, "digest": digest, "tokens": len(tokens)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("question")
    options = parser.parse_args()
    main(options.model, options.question)
