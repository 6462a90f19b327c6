"""The model: embedding, layers, final norm, unembedding, over weights in mlx-lm's names.

`Model` turns token ids into logits and knows nothing of text. The forward pass ends in two steps,
`hidden` and `unembed`, because a prompt needs the logits of its last token alone: `next_logits`
does that, and runs the last layer, but for its keys and values, for that token alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.attention import (
    AttentionWeights,
    Place,
    Store,
    attention_block,
    last_token_block,
)
from mlx_gptoss.cache import FullCache, ModelCache, WindowCache
from mlx_gptoss.checkpoint import Quantization, open_checkpoint
from mlx_gptoss.config import FULL, ModelConfig
from mlx_gptoss.errors import CacheError
from mlx_gptoss.kernels.selection import (
    Choice,
    all_definitions,
    choose_kernels,
    dense_form,
    sizes_of,
)
from mlx_gptoss.layer_weights import unlike_layers, weights_of_layer
from mlx_gptoss.matrix import Matrix, on_cpu
from mlx_gptoss.moe import MoeWeights, moe_block
from mlx_gptoss.rope import RopeTable, softmax_scale
from mlx_gptoss.table import MODULE, PLACES, EmbeddingPlace, FileTable, rows_of

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
KERNELS = ("auto", "on", "off")

AttentionBlock = Callable[[mx.array, AttentionWeights, Sequence[Store], Place], mx.array]


class Model:
    """A gpt-oss model in memory.

    Args:
        config: its sizes.
        weights: arrays under the names of `checkpoint.expected_tensors`; kept as they are, except
            that "float32" widens the dense ones.
        quantization: how each packed module is packed; a module that is absent is dense.
        dtype: "bfloat16", or "float32" for exact comparison, of activations, keys and values.
        embedding: the table in its file; None where it is among the weights.

    Raises:
        ValueError: no such dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, mx.array],
        *,
        quantization: Mapping[str, Quantization],
        dtype: str = "bfloat16",
        embedding: FileTable | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.config = config
        self.dtype = DTYPES[dtype]
        reader = _WeightReader(weights, quantization, self.dtype)
        self.embedding = embedding or reader.matrix(MODULE)
        self.layers = [reader.layer(n) for n in range(config.num_hidden_layers)]
        self.norm = reader.array("model.norm.weight")
        self.unembedding = reader.matrix("lm_head")
        self.arrays = reader.arrays  # every weight, for mx.eval and for counting bytes
        self.rope = RopeTable.of(config)
        self.softmax_scale = softmax_scale(config)
        self.kernels = all_definitions("none were chosen for this model")

    def make_cache(
        self, batch_size: int = 1, *, left_padding: Sequence[int] | None = None
    ) -> ModelCache:
        """An empty cache for this model.

        Args:
            batch_size: rows, B.
            left_padding: for each row, how many padding tokens precede its prompt; none if None.

        Returns:
            The cache, to be passed with every chunk and every decoded token of these rows.

        Raises:
            ValueError: `left_padding` does not have one number >= 0 for each row.
        """
        padding = [0] * batch_size if left_padding is None else list(left_padding)
        if batch_size < 1 or len(padding) != batch_size or min(padding) < 0:
            raise ValueError(
                f"left_padding: expected {batch_size} numbers from 0, one for each row, "
                f"got {left_padding!r}"
            )
        c = self.config

        def layer(kind: str) -> WindowCache | FullCache:
            if kind == FULL:
                return FullCache((batch_size, c.num_key_value_heads, c.head_dim), self.dtype)
            shape = (batch_size, c.num_key_value_heads, c.sliding_window, c.head_dim)
            return WindowCache(shape, self.dtype)

        return ModelCache([layer(kind) for kind in c.layer_types], padding)

    def __call__(self, tokens: mx.array, cache: ModelCache | None = None) -> mx.array:
        """Logits of every position.

        Args:
            tokens: (B, T) integers, each below the vocabulary's size. One token a row is taken
                unchecked: it may still be on its way from the device.
            cache: of the positions before, which it extends; None for a text from its beginning.

        Returns:
            (B, T, V) float32.

        Raises:
            ValueError: `tokens` has another shape or type, or prompt tokens out of range.
            CacheError: the cache is for another batch, or the context is full.
        """
        return self.unembed(self.hidden(tokens, cache)).astype(mx.float32)

    def hidden(self, tokens: mx.array, cache: ModelCache | None = None) -> mx.array:
        """Hidden states after the final norm, for `unembed`.

        To feed a chunk of a prompt whose logits nobody needs, call this, drop the result, and
        evaluate `cache.arrays`: of the last layer little but keys and values is then computed.

        Args:
            tokens: see `__call__`.
            cache: see `__call__`.

        Returns:
            (B, T, D) of the model's type.

        Raises:
            ValueError: see `__call__`.
            CacheError: see `__call__`.
        """
        return self._forward(tokens, [self._given(tokens, cache)], attention_block)

    def next_logits(self, tokens: mx.array, cache: ModelCache | None = None) -> mx.array:
        """Logits after the last position alone, for the price of one unembedded row.

        Args:
            tokens: see `__call__`.
            cache: see `__call__`.

        Returns:
            (B, V), see `unembed`.

        Raises:
            ValueError: see `__call__`.
            CacheError: see `__call__`.
        """
        caches = [self._given(tokens, cache)]
        return self.unembed(self._forward(tokens, caches, last_token_block))[:, 0]

    def step_rows(self, tokens: mx.array, caches: Sequence[ModelCache]) -> mx.array:
        """Logits after one more token of several texts, each with a cache of its own.

        The weights are multiplied for all rows together, attention runs row by row; so rows may
        have any offsets, come and go, and have the very bits that they have alone. MLX's CPU keeps
        that promise (`tests/test_rows.py`); on Metal it picks its products' kernels by the number
        of rows, so there each row is multiplied alone.

        Args:
            tokens: (B,) integers; may still be on their way from the device.
            caches: B caches of one row each, which it extends.

        Returns:
            (B, V), see `unembed`.

        Raises:
            ValueError: see `__call__`.
            CacheError: see `__call__`.
        """
        if tokens.shape != (len(caches),) or not caches:
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens: expected one for each of {len(caches)} caches, got {shape}")
        if on_cpu():
            return self.unembed(self._forward(tokens[:, None], caches, attention_block))[:, 0]
        rows = zip(tokens[:, None, None], caches, strict=True)
        return mx.concatenate([self.next_logits(token, cache) for token, cache in rows])

    def unembed(self, h: mx.array) -> mx.array:
        """Logits of hidden states, (B, T, D) -> (B, T, V), of the model's type or float32.

        They are not widened: bfloat16 products are no better for twice the bytes.
        """
        return reference.final_logits(h, self.unembedding)

    def _forward(
        self, tokens: mx.array, caches: Sequence[ModelCache], last_block: AttentionBlock
    ) -> mx.array:
        """Hidden states after the final norm, of the positions that `last_block` returns."""
        self._check_caches(tokens, caches)
        place = self._place(tokens.shape[1], caches)
        c, x = self.config, rows_of(self.embedding, tokens, self.dtype)
        blocks = [attention_block] * (c.num_hidden_layers - 1) + [last_block]
        stores = zip(*caches, strict=True)
        for block, (attention, moe), store in zip(blocks, self.layers, stores, strict=True):
            x = block(x, attention, store, place)
            x = moe_block(
                x,
                moe,
                kernels=self.kernels,
                chosen=c.num_experts_per_tok,
                eps=c.rms_norm_eps,
                limit=c.swiglu_limit,
                alpha=c.swiglu_alpha,
            )
        return reference.rms_norm(x, self.norm, eps=c.rms_norm_eps).astype(self.dtype)

    def _place(self, count: int, caches: Sequence[ModelCache]) -> Place:
        # A padded row is turned further than alone, queries and keys alike: only distances count.
        offsets = mx.array([cache.offset for cache in caches], mx.int32)
        return Place(
            angles=self.rope.at(offsets[:, None] + mx.arange(count)),
            starts=tuple(cache.start for cache in caches),
            head_dim=self.config.head_dim,
            eps=self.config.rms_norm_eps,
            scale=self.softmax_scale,
            kernels=self.kernels,
        )

    def _given(self, tokens: mx.array, cache: ModelCache | None) -> ModelCache:
        """The cache to use; a caller's mistakes are found before anything is changed."""
        if tokens.ndim != 2 or 0 in tokens.shape or not mx.issubdtype(tokens.dtype, mx.integer):
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens: expected (B, T) integers, got {shape} {tokens.dtype}")
        batch, count = tokens.shape
        size = self.config.vocab_size
        if count > 1:  # a prompt is on the host; a sampled token may still be on its way
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise ValueError(f"tokens: expected ids from 0 to {size - 1}, got {wrong}")
        return self.make_cache(batch) if cache is None else cache

    def _check_caches(self, tokens: mx.array, caches: Sequence[ModelCache]) -> None:
        c, (batch, count) = self.config, tokens.shape
        rows = batch // len(caches)
        for cache in caches:
            if (cache.batch_size, len(cache)) != (rows, c.num_hidden_layers):
                raise CacheError(
                    f"cache of {cache.batch_size} rows and {len(cache)} layers, but {rows} rows "
                    f"were given to a model of {c.num_hidden_layers} layers; make one with "
                    "model.make_cache"
                )
            if cache.offset + count > c.max_position_embeddings:
                raise CacheError(
                    f"the context holds {c.max_position_embeddings} positions: {cache.offset} are "
                    f"taken, {count} more do not fit"
                )


class _WeightReader:
    """Builds the blocks' weights out of a flat dictionary of arrays."""

    def __init__(
        self,
        weights: Mapping[str, mx.array],
        quantization: Mapping[str, Quantization],
        dtype: mx.Dtype,
    ):
        self._weights, self._quantization, self._dtype = weights, quantization, dtype
        self.arrays: list[mx.array] = []

    def array(self, name: str) -> mx.array:
        array = self._weights[name]
        if self._dtype == mx.float32 and array.dtype == mx.bfloat16:
            array = array.astype(mx.float32)
        self.arrays.append(array)
        return array

    def matrix(self, module: str) -> Matrix:
        weight = self.array(f"{module}.weight")
        has_bias = f"{module}.bias" in self._weights
        bias = self.array(f"{module}.bias") if has_bias else None
        packing = self._quantization.get(module)
        if packing is None:
            return Matrix(weight=weight, bias=bias)
        return Matrix(
            weight=weight,
            bias=bias,
            scales=self.array(f"{module}.scales"),
            offsets=self.array(f"{module}.biases") if packing.mode == "affine" else None,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
        )

    def layer(self, n: int) -> tuple[AttentionWeights, MoeWeights]:
        layer = f"model.layers.{n}"
        attention = AttentionWeights(
            norm=self.array(f"{layer}.input_layernorm.weight"),
            q=self.matrix(f"{layer}.self_attn.q_proj"),
            k=self.matrix(f"{layer}.self_attn.k_proj"),
            v=self.matrix(f"{layer}.self_attn.v_proj"),
            out=self.matrix(f"{layer}.self_attn.o_proj"),
            sinks=self.array(f"{layer}.self_attn.sinks"),
        )
        moe = MoeWeights(
            norm=self.array(f"{layer}.post_attention_layernorm.weight"),
            router=self.matrix(f"{layer}.mlp.router"),
            gate=self.matrix(f"{layer}.mlp.experts.gate_proj"),
            up=self.matrix(f"{layer}.mlp.experts.up_proj"),
            down=self.matrix(f"{layer}.mlp.experts.down_proj"),
        )
        return attention, moe


def load_model(
    path: str | Path,
    *,
    kernels: Choice = "auto",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    embedding: EmbeddingPlace = "memory",
    kernel_record: Path | None = None,
) -> Model:
    """Load a converted model folder, ours or mlx-lm's, into memory.

    Args:
        path: the folder.
        kernels: "auto" uses the kernels that agree with their definitions here; "off" none; "on"
            insists on all.
        dtype: of activations, keys and values; "float32" also widens dense weights, for exact
            comparison.
        embedding: "file" leaves the table in its file and reads rows as they are needed: less
            memory by its bytes, and each token waits for the one before to reach the host.
        kernel_record: keeps which kernels agree on this machine; None checks at every load.

    Returns:
        The model, its weights evaluated.

    Raises:
        ConfigError: config.json is not a gpt-oss model's.
        CheckpointError: the folder is not a converted checkpoint, or is damaged.
        KernelError: kernels are insisted on, and one cannot be used.
        ValueError: no such option.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: expected one of {', '.join(KERNELS)}, got {kernels!r}")
    if embedding not in PLACES:
        raise ValueError(f"embedding: expected one of {', '.join(PLACES)}, got {embedding!r}")
    checkpoint = open_checkpoint(Path(path))
    table = None
    if embedding == "file":
        packing = checkpoint.quantization_of(MODULE)
        wide = DTYPES.get(dtype, mx.bfloat16)  # the model refuses any other
        table = FileTable(checkpoint.tensors, packing, dtype=wide)
    model = Model(
        checkpoint.config,
        checkpoint.load(),
        quantization=checkpoint.quantization,
        dtype=dtype,
        embedding=table,
    )
    mx.eval(model.arrays)
    widest_norm = max(float(mx.abs(moe.norm).max()) for _, moe in model.layers)
    outer = {"embedding": model.embedding, "norm": model.norm, "unembedding": model.unembedding}
    model.kernels = choose_kernels(
        kernels,
        sizes_of(model.config),
        dtype=model.dtype,
        dense=dense_forms(model),
        layers=[weights_of_layer(layer, **outer) for layer in unlike_layers(model.layers)],
        expert_input_bound=model.config.hidden_size**0.5 * widest_norm,
        record=kernel_record,
    )
    return model


def dense_forms(model: Model) -> list[str]:
    """How its dense matrices are stored: mlx-lm packs routers otherwise than the rest.

    One kernel multiplies by q, k and v, and takes them in one form.
    """
    found = [model.unembedding]
    found += [model.embedding] if isinstance(model.embedding, Matrix) else []
    for attention, moe in model.layers:
        found += [attention.q, attention.k, attention.v, attention.out, moe.router]
    mixed = any(
        len({dense_form(matrix) for matrix in (a.q, a.k, a.v)}) > 1 for a, _ in model.layers
    )
    unlike = ["q, k and v packed unlike each other"] if mixed else []
    return sorted({*map(dense_form, found), *unlike})
