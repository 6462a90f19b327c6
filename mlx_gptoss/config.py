"""The shape of a gpt-oss model, and the strict reading of `config.json`.

Two shapes were published; both are constants here. Other shapes (fine-tunes with fewer layers, test
models) are read from their config with the same rules: a field that changes the computation must be
there, must be valid, and must not contradict another; a field that this package does not know is an
error, because it may change the computation; a field known to be harmless is listed, not obeyed.

Quantization blocks are none of this module's business: `checkpoint.py` reads them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.config_fields import Fields
from mlx_gptoss.errors import ConfigError

SLIDING = "sliding_attention"
FULL = "full_attention"

MXFP4_BLOCK = 32  # values that share one scale: expert rows are made of whole blocks

MOST_LAYERS = 1024  # far above any model: a damaged count must not fill the memory with names

# Known, and without effect on the logits of an inference pass.
HARMLESS = frozenset(
    """_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype
    eos_token_id id2label initializer_range is_encoder_decoder label2id output_attentions
    output_hidden_states output_router_logits pad_token_id problem_type return_dict
    router_aux_loss_coef torch_dtype transformers_version unsloth_fixed unsloth_version
    use_cache""".split()
)
QUANTIZATION = frozenset({"quantization", "quantization_config"})


def alternating_layer_types(num_hidden_layers: int) -> tuple[str, ...]:
    """The published pattern: sliding, full, sliding, ... for any layer count, odd ones included."""
    return tuple(FULL if i % 2 else SLIDING for i in range(num_hidden_layers))


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """How rotary frequencies are stretched beyond the context the model was first trained on.

    `truncate` says whether the correction range is rounded to whole dimensions. gpt-oss says no.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number that the forward pass depends on, under its Hugging Face name."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_theta: float
    rope: YarnConfig
    rms_norm_eps: float
    swiglu_limit: float
    swiglu_alpha: float
    max_position_embeddings: int

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read the fields of a Hugging Face `config.json`.

        Args:
            raw: the parsed file.
            where: its path, for error messages.

        Returns:
            The checked config.

        Raises:
            ConfigError: a field is missing, unknown, invalid or contradictory.
        """
        fields = Fields(raw, where)
        fields.constant("model_type", "gpt_oss", required=True)
        fields.constant("hidden_act", "silu")
        fields.constant("attention_bias", True)
        fields.constant("tie_word_embeddings", False)
        layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
        rope_theta, rope = _read_rope(fields)
        config = cls(
            num_hidden_layers=layers,
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_attention_heads=fields.integer("num_attention_heads"),
            num_key_value_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            num_local_experts=fields.integer("num_local_experts", "num_experts"),
            num_experts_per_tok=fields.integer("num_experts_per_tok", "experts_per_token"),
            vocab_size=fields.integer("vocab_size"),
            sliding_window=fields.integer("sliding_window"),
            layer_types=_read_layer_types(fields, layers),
            rope_theta=rope_theta,
            rope=rope,
            rms_norm_eps=fields.number("rms_norm_eps"),
            swiglu_limit=fields.number("swiglu_limit"),
            swiglu_alpha=fields.number("swiglu_alpha", default=1.702),
            max_position_embeddings=fields.integer("max_position_embeddings"),
        )
        fields.refuse_unknown(HARMLESS | QUANTIZATION)
        _check_dimensions(config, where)
        return config

    @classmethod
    def from_original_json(cls, raw: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read OpenAI's own `original/config.json`, whose code fixes what the file leaves out.

        Args:
            raw: the parsed file.
            where: its path, for error messages.

        Returns:
            The checked config.

        Raises:
            ConfigError: a field is missing, unknown, invalid or contradictory.

        Source: `ModelConfig` and `RotaryEmbedding` of openai/gpt-oss, gpt_oss/torch/model.py.
        """
        fields = Fields(raw, where)
        layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
        context = fields.integer("initial_context_length")
        factor = fields.number("rope_scaling_factor")
        config = cls(
            num_hidden_layers=layers,
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_attention_heads=fields.integer("num_attention_heads"),
            num_key_value_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            num_local_experts=fields.integer("num_experts"),
            num_experts_per_tok=fields.integer("experts_per_token"),
            vocab_size=fields.integer("vocab_size"),
            sliding_window=fields.integer("sliding_window"),
            layer_types=alternating_layer_types(layers),
            rope_theta=fields.number("rope_theta"),
            rope=YarnConfig(
                factor=factor,
                beta_fast=fields.number("rope_ntk_beta"),
                beta_slow=fields.number("rope_ntk_alpha"),
                original_max_position_embeddings=context,
                truncate=False,
            ),
            rms_norm_eps=1e-5,
            swiglu_limit=fields.number("swiglu_limit"),
            swiglu_alpha=1.702,
            max_position_embeddings=int(context * factor),
        )
        fields.refuse_unknown(frozenset())
        _check_dimensions(config, where)
        return config

    def to_json(self) -> dict[str, Any]:
        """The fields in the published spelling, which `from_json` and other MLX tools read."""
        same = (
            "num_hidden_layers hidden_size intermediate_size num_attention_heads"
            " num_key_value_heads head_dim num_local_experts num_experts_per_tok vocab_size"
            " sliding_window rope_theta rms_norm_eps swiglu_limit swiglu_alpha"
            " max_position_embeddings"
        ).split()
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            **{name: getattr(self, name) for name in same},
            "experts_per_token": self.num_experts_per_tok,
            "initial_context_length": self.rope.original_max_position_embeddings,
            "layer_types": list(self.layer_types),
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": self.rope.factor,
                "beta_fast": self.rope.beta_fast,
                "beta_slow": self.rope.beta_slow,
                "original_max_position_embeddings": self.rope.original_max_position_embeddings,
                "truncate": self.rope.truncate,
            },
        }


def _published(num_hidden_layers: int, num_local_experts: int) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=num_hidden_layers,
        hidden_size=2880,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=num_local_experts,
        num_experts_per_tok=4,
        vocab_size=201088,
        sliding_window=128,
        layer_types=alternating_layer_types(num_hidden_layers),
        rope_theta=150000.0,
        rope=YarnConfig(
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            original_max_position_embeddings=4096,
            truncate=False,
        ),
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        max_position_embeddings=131072,
    )


GPT_OSS_20B = _published(num_hidden_layers=24, num_local_experts=32)
GPT_OSS_120B = _published(num_hidden_layers=36, num_local_experts=128)


def read_config(folder: str | Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read `config.json` of a model folder, in the Hugging Face or in OpenAI's own spelling.

    Args:
        folder: the folder that holds `config.json`.

    Returns:
        The config, and the sorted names of the harmless fields that were not used.

    Raises:
        ConfigError: the file is missing, is not JSON, or describes another model.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model folder holds its config.json") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}; copy the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    if "model_type" not in raw and "rope_ntk_alpha" in raw:
        return ModelConfig.from_original_json(raw, str(path)), ()
    return ModelConfig.from_json(raw, str(path)), tuple(sorted(HARMLESS & set(raw)))


def _read_rope(fields: Fields) -> tuple[float, YarnConfig]:
    """`rope_scaling` beside `rope_theta`, or transformers 5's `rope_parameters` that holds both."""
    spellings = [name for name in ("rope_scaling", "rope_parameters") if fields.has(name)]
    if not spellings:
        raise fields.error("rope_scaling", "missing; the computation depends on it")
    read = [_read_rope_block(fields, name) for name in spellings]
    if read[0] != read[-1]:
        raise fields.error(spellings[0], f"contradicts {spellings[-1]}; remove the wrong one")
    theta, yarn = read[0]
    if fields.has("initial_context_length"):
        context = fields.integer("initial_context_length")
        if context != yarn.original_max_position_embeddings:
            original = yarn.original_max_position_embeddings
            raise fields.error(
                "initial_context_length",
                f"is {context}, but {spellings[0]}.original_max_position_embeddings is {original}",
            )
    return theta, yarn


def _read_rope_block(outer: Fields, name: str) -> tuple[float, YarnConfig]:
    block = outer.raw[name]
    if not isinstance(block, Mapping):
        raise outer.error(name, f"expected a JSON object, got {block!r}")
    fields = Fields(block, outer.where, f"{name}.")
    if fields.value("rope_type", "type") != "yarn":
        kind = fields.value("rope_type", "type")
        raise fields.error("rope_type", f"expected 'yarn', got {kind!r}; gpt-oss uses YaRN")
    theta = (fields if fields.has("rope_theta") else outer).number("rope_theta")
    if outer.has("rope_theta") and outer.number("rope_theta") != theta:
        raise outer.error("rope_theta", f"is {outer.raw['rope_theta']}, but {name} says {theta}")
    truncate = fields.value("truncate")
    if not isinstance(truncate, bool):
        raise fields.error("truncate", f"expected true or false, got {truncate!r}")
    yarn = YarnConfig(
        factor=fields.number("factor"),
        beta_fast=fields.number("beta_fast"),
        beta_slow=fields.number("beta_slow"),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings"),
        truncate=truncate,
    )
    fields.has("attention_factor")  # null is what every published file means: computed from factor
    if block.get("attention_factor") is not None:
        raise fields.error("attention_factor", "not supported; gpt-oss computes it from factor")
    fields.refuse_unknown(frozenset())
    return theta, yarn


def _read_layer_types(fields: Fields, num_hidden_layers: int) -> tuple[str, ...]:
    if not fields.has("layer_types"):
        return alternating_layer_types(num_hidden_layers)
    types = fields.value("layer_types")
    if not isinstance(types, list) or len(types) != num_hidden_layers:
        count = len(types) if isinstance(types, list) else types
        raise fields.error("layer_types", f"expected {num_hidden_layers} entries, got {count!r}")
    for i, kind in enumerate(types):
        if kind not in (SLIDING, FULL):
            raise fields.error(f"layer_types[{i}]", f"expected {SLIDING} or {FULL}, got {kind!r}")
    return tuple(types)


def _check_dimensions(config: ModelConfig, where: str) -> None:
    """What the shapes must satisfy together for the model to exist at all."""

    def require(condition: bool, name: str, problem: str) -> None:
        if not condition:
            raise ConfigError(f"{where}: {name}: {problem}, got {getattr(config, name)}")

    heads, chosen = config.num_key_value_heads, config.num_local_experts
    multiple = f"expected a multiple of {MXFP4_BLOCK}, the MXFP4 block"
    require(config.hidden_size % MXFP4_BLOCK == 0, "hidden_size", multiple)
    require(config.intermediate_size % MXFP4_BLOCK == 0, "intermediate_size", multiple)
    require(config.head_dim % 2 == 0, "head_dim", "expected an even number, for rotary pairs")
    require(
        config.num_attention_heads % heads == 0,
        "num_attention_heads",
        f"expected a multiple of num_key_value_heads {heads}",
    )
    require(
        config.num_experts_per_tok <= chosen,
        "num_experts_per_tok",
        f"expected at most num_local_experts {chosen}",
    )
