"""The name table: every row of every source tensor goes to exactly one place, and back."""

import pytest
from tiny import TinyShape, hf_tensors, original_tensors, write_checkpoint

from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig, read_config
from mlx_gptoss.convert.names import Layout, by_source, dense_expert_spec, parts, source_tensors
from mlx_gptoss.weight_files import TensorSpec

PUBLISHED = [
    pytest.param(config, layout, id=f"{name}-{layout.name}")
    for name, config in (("20b", GPT_OSS_20B), ("120b", GPT_OSS_120B))
    for layout in Layout
]


@pytest.mark.parametrize(("config", "layout"), PUBLISHED)
def test_parts_cover_every_row_once(config: ModelConfig, layout: Layout) -> None:
    table, specs = parts(config, layout), source_tensors(config, layout)
    turned = by_source(table)
    assert sorted(name for pieces in turned.values() for name in pieces) == sorted(table)
    assert set(turned) == set(specs)
    for source, pieces in turned.items():
        (axis,) = {part.axis for part in pieces.values()}
        rows = [
            row for part in pieces.values() for row in range(specs[source].shape[axis])[part.rows]
        ]
        assert sorted(rows) == list(range(specs[source].shape[axis])), source


@pytest.mark.parametrize("layout", list(Layout))
def test_published_sizes(layout: Layout) -> None:
    """The 20b's total is the `total_size` of its published index."""
    specs = source_tensors(GPT_OSS_20B, layout)
    assert sum(spec.nbytes for spec in specs.values()) == 13_761_264_768
    assert len(specs) == {Layout.HUGGING_FACE: 459, Layout.ORIGINAL: 363}[layout]


def test_published_shapes() -> None:
    hf = source_tensors(GPT_OSS_120B, Layout.HUGGING_FACE)
    blocks = hf["model.layers.35.mlp.experts.gate_up_proj_blocks"]
    assert blocks == TensorSpec((128, 5760, 90, 16), "U8")
    assert dense_expert_spec(blocks) == TensorSpec((128, 2880, 5760), "BF16")
    original = source_tensors(GPT_OSS_120B, Layout.ORIGINAL)
    assert original["block.35.attn.qkv.weight"] == TensorSpec((5120, 2880), "BF16")
    assert original["block.35.mlp.mlp2_weight.scales"] == TensorSpec((128, 2880, 90), "U8")


def test_shapes_agree_with_the_generator(tmp_path) -> None:
    """The test checkpoints are written by other code, and have the same names and shapes."""
    config, _ = read_config(write_checkpoint(tmp_path / "source", layers=3))
    hf = hf_tensors(TinyShape(layers=3), 0)
    for layout, tensors in (
        (Layout.HUGGING_FACE, hf),
        (Layout.ORIGINAL, original_tensors(hf)),
    ):
        shapes = {name: spec.shape for name, spec in source_tensors(config, layout).items()}
        assert shapes == {name: array.shape for name, array in tensors.items()}
