"""What the transformers library really writes when it saves a dequantised model again."""

import json
from pathlib import Path

import pytest
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_a_model_saved_again_by_transformers_converts_to_the_same_bits(tmp_path: Path) -> None:
    """Its experts were MXFP4, so rounding them to MXFP4 again must find every block's bytes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    source = write_checkpoint(tmp_path / "source", layers=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(tmp_path / "saved")
    saved = convert_checkpoint(tmp_path / "saved", tmp_path / "saved-mlx")
    assert saved.source == "Hugging Face, bfloat16 experts"
    convert_checkpoint(source, tmp_path / "source-mlx")
    records = [
        json.loads((tmp_path / name / "mlx_gptoss.json").read_text())
        for name in ("saved-mlx", "source-mlx")
    ]
    assert records[0]["tensors"] == records[1]["tensors"]
