"""config.json is read strictly: what changes the computation is there, valid and uncontradicted."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import PUBLISHED_ROPE

from mlx_gptoss.config import (
    GPT_OSS_20B,
    GPT_OSS_120B,
    ModelConfig,
    alternating_layer_types,
    read_config,
)
from mlx_gptoss.errors import ConfigError

PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": PUBLISHED_ROPE,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
ORIGINAL = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def published(*, without: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """The published 20b config with changes; `rope_scaling__x` reaches into that block."""
    raw = json.loads(json.dumps(PUBLISHED))
    for name, value in changes.items():
        block, _, inner = name.rpartition("__")
        (raw[block] if block else raw)[inner] = value
    for name in without:
        block, _, inner = name.rpartition("__")
        del (raw[block] if block else raw)[inner]
    return raw


def rope_parameters(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED["rope_scaling"], "rope_theta": 150000.0, **changes}


def test_published_file_is_the_20b_constant() -> None:
    assert ModelConfig.from_json(PUBLISHED, "here") == GPT_OSS_20B


def test_openai_file_is_the_20b_constant() -> None:
    assert ModelConfig.from_original_json(ORIGINAL, "here") == GPT_OSS_20B


def test_the_two_published_shapes_differ_in_layers_and_experts_alone() -> None:
    assert (GPT_OSS_120B.num_hidden_layers, GPT_OSS_120B.num_local_experts) == (36, 128)
    small, large = GPT_OSS_20B.to_json(), GPT_OSS_120B.to_json()
    different = {name for name in small if small[name] != large[name]}
    assert different == {"num_hidden_layers", "num_local_experts", "layer_types"}


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B], ids=["20b", "120b"])
def test_to_json_reads_back(config: ModelConfig) -> None:
    raw = json.loads(json.dumps(config.to_json()))
    assert ModelConfig.from_json(raw, "here") == config


def test_rope_parameters_of_transformers_5() -> None:
    raw = published(without=("rope_scaling", "rope_theta", "initial_context_length"))
    raw["rope_parameters"] = rope_parameters()
    assert ModelConfig.from_json(raw, "here") == GPT_OSS_20B


@pytest.mark.parametrize("gone", ["experts_per_token", "num_experts_per_tok"])
def test_either_spelling_of_the_expert_count(gone: str) -> None:
    assert ModelConfig.from_json(published(without=(gone,)), "here") == GPT_OSS_20B


def test_missing_layer_types_alternate_from_sliding() -> None:
    raw = published(without=("layer_types",), num_hidden_layers=3)
    kinds = ModelConfig.from_json(raw, "here").layer_types
    assert kinds == ("sliding_attention", "full_attention", "sliding_attention")
    assert alternating_layer_types(1) == ("sliding_attention",)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_layers_of_one_kind(kind: str) -> None:
    config = ModelConfig.from_json(published(layer_types=[kind] * 24), "here")
    assert config.layer_types == (kind,) * 24


def test_swiglu_constants_are_obeyed() -> None:
    config = ModelConfig.from_json(published(swiglu_limit=5, swiglu_alpha=1.5), "here")
    assert (config.swiglu_limit, config.swiglu_alpha) == (5.0, 1.5)


REFUSED = [
    ({"without": ("swiglu_limit",)}, "swiglu_limit: missing; the computation depends on it"),
    ({"without": ("model_type",)}, "model_type: missing"),
    ({"without": ("rope_scaling",)}, "rope_scaling: missing"),
    ({"without": ("rope_theta",)}, "rope_theta: missing"),
    ({"without": ("rope_scaling__truncate",)}, "rope_scaling.truncate: missing"),
    ({"without": ("experts_per_token", "num_experts_per_tok")}, "num_experts_per_tok: missing"),
    ({"model_type": "llama"}, "model_type: expected 'gpt_oss', got 'llama'; this is not a gpt-oss"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False, got True"),
    ({"attention_bias": False}, "attention_bias: expected True, got False"),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ({"logit_softcap": 30}, "logit_softcap: unknown field; it may change the computation"),
    ({"rope_scaling__mscale": 2.0}, "rope_scaling.mscale: unknown field"),
    ({"rope_scaling__attention_factor": 1.0}, "rope_scaling.attention_factor: not supported"),
    ({"rope_scaling__rope_type": "linear"}, "rope_scaling.rope_type: expected 'yarn', got"),
    ({"rope_scaling__truncate": 0}, "rope_scaling.truncate: expected true or false, got 0"),
    ({"rope_scaling": 4}, "rope_scaling: expected a JSON object, got 4"),
    ({"experts_per_token": 2}, "num_experts_per_tok: is 4, but experts_per_token is 2"),
    ({"initial_context_length": 8192}, "initial_context_length: is 8192, but rope_scaling.orig"),
    ({"hidden_size": "2880"}, "hidden_size: expected a whole number above 0, got '2880'"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number above 0, got True"),
    ({"sliding_window": 0}, "sliding_window: expected a whole number above 0, got 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number above 0, got nan"),
    ({"rope_theta": 10**400}, "rope_theta: expected a finite number above 0, got 1000000"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1024, got 1000000000"),
    ({"vocab_size": 2**31}, "vocab_size: expected at most 2147483647, got 2147483648"),
    ({"layer_types": ["full_attention"]}, "layer_types: expected 24 entries, got 1"),
    ({"layer_types": ["full_attention"] * 23 + ["x"]}, "layer_types[23]: expected sliding_atte"),
    ({"hidden_size": 2881}, "hidden_size: expected a multiple of 32, the MXFP4 block, got 2881"),
    ({"intermediate_size": 2881}, "intermediate_size: expected a multiple of 32"),
    ({"num_key_value_heads": 7}, "num_attention_heads: expected a multiple of num_key_value_heads"),
    ({"head_dim": 63}, "head_dim: expected an even number, for rotary pairs, got 63"),
    ({"num_local_experts": 3}, "num_experts_per_tok: expected at most num_local_experts 3, got 4"),
    ({"rope_parameters": rope_parameters(factor=8.0)}, "rope_scaling: contradicts rope_parameters"),
    ({"rope_parameters": rope_parameters(rope_theta=1e4)}, "rope_theta: is 150000, but rope_param"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_refused_with_the_field_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(published(**changes), "models/x/config.json")
    assert str(caught.value).startswith(f"models/x/config.json: {message}")


def test_openai_file_is_read_as_strictly() -> None:
    with pytest.raises(ConfigError, match=r"o\.json: swiglu_alpha: unknown field"):
        ModelConfig.from_original_json({**ORIGINAL, "swiglu_alpha": 1.7}, "o.json")
    with pytest.raises(ConfigError, match=r"o\.json: num_experts: missing"):
        ModelConfig.from_original_json(
            {k: ORIGINAL[k] for k in ORIGINAL if k != "num_experts"}, "o.json"
        )


def test_read_config_lists_what_it_did_not_use(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config, ignored = read_config(tmp_path)
    assert config == GPT_OSS_20B
    assert ignored == (
        "architectures",
        "attention_dropout",
        "eos_token_id",
        "initializer_range",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "transformers_version",
        "use_cache",
    )


def test_read_config_knows_openais_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    assert read_config(tmp_path) == (GPT_OSS_20B, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; a model folder holds its config.json"),
        ('{"model_type": ', "not valid JSON: Expecting value"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        ("[1]", "expected a JSON object, got list"),
        (b"\xff\xfe", "not valid JSON: 'utf-8' codec can't decode"),
    ],
    ids=["missing", "cut off", "deep", "a list", "not text"],
)
def test_unreadable_files(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
