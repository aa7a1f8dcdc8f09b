"""ALBERT: embeddings of their own, small width; one layer's weights used again and again.

Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations".
All of it takes whole batches. Weights are stored (in, out); `_convert.py` has the names that
Hugging Face's checkpoints use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxlightning.parallel import DATA_AXES, Rule, constrain

from ._attention import attend
from ._config import AlbertConfig
from ._layers import (
    Dense,
    LayerNorm,
    activation,
    along_last,
    dropped,
    initial,
    named_key,
    rematerialised,
)
from ._lookup import looked_up

_Group = Callable[[Array, Sequence[PRNGKeyArray | None]], Array]
"""Layers one after the other, each with its key of dropout."""


class Embeddings(eqx.Module):
    """Word, position and token type embeddings, summed and normalised (section 3.1)."""

    words: Float[Array, "vocab embedding"]
    positions: Float[Array, "max_positions embedding"]
    token_types: Float[Array, "types embedding"]
    norm: LayerNorm
    dropout: eqx.nn.Dropout

    def __init__(self, config: AlbertConfig, *, key: PRNGKeyArray):
        def table(name: str, rows: int) -> Array:
            return initial(named_key(key, name), (rows, config.embedding_size), config)

        self.words = table("words", config.vocab_size)
        self.positions = table("positions", config.max_position_embeddings)
        self.token_types = table("token_types", config.type_vocab_size)
        self.norm = LayerNorm(config.embedding_size, config)
        self.dropout = eqx.nn.Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        token_types: Int[Array, "batch seq"] | None,
        positions: Int[Array, "batch seq"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq embedding"]:
        x = looked_up(self.words, tokens)
        if token_types is None:
            x = x + along_last(self.token_types[0], x)
        else:
            x = x + looked_up(self.token_types, token_types)
        if positions is None:
            x = x + self.positions[None, : tokens.shape[1]]
        else:
            x = x + looked_up(self.positions, positions)
        return dropped(self.dropout, self.norm(x), key, "embeddings")


class Attention(eqx.Module):
    """Multi-head self-attention with its residual connection and normalisation."""

    query: Dense
    key: Dense
    value: Dense
    output: Dense
    norm: LayerNorm
    probs_dropout: eqx.nn.Dropout
    dropout: eqx.nn.Dropout
    heads: int = eqx.field(static=True)
    implementation: str = eqx.field(static=True)

    def __init__(self, config: AlbertConfig, *, key: PRNGKeyArray):
        def dense(name: str) -> Dense:
            size = config.hidden_size
            return Dense(size, size, config, key=named_key(key, name))

        self.query = dense("query")
        self.key = dense("key")
        self.value = dense("value")
        self.output = dense("output")
        self.norm = LayerNorm(config.hidden_size, config)
        self.probs_dropout = eqx.nn.Dropout(config.attention_probs_dropout_prob)
        self.dropout = eqx.nn.Dropout(config.hidden_dropout_prob)
        self.heads = config.num_attention_heads
        self.implementation = config.attention

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        mask: Bool[Array, "batch from seq"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq hidden"]:
        q, k, v = (
            rearrange(part(x), "batch seq (head dim) -> batch seq head dim", head=self.heads)
            for part in (self.query, self.key, self.value)
        )
        y = attend(q, k, v, mask, self.probs_dropout, key, self.implementation)
        y = self.output(rearrange(y, "batch seq head dim -> batch seq (head dim)"))
        return self.norm(x + dropped(self.dropout, y, key, "attention_output"))


class Layer(eqx.Module):
    """Attention, then a feed-forward network, each normalised after its residual connection."""

    attention: Attention
    ffn: Dense
    ffn_output: Dense
    norm: LayerNorm
    dropout: eqx.nn.Dropout
    hidden_act: str = eqx.field(static=True)

    def __init__(self, config: AlbertConfig, *, key: PRNGKeyArray):
        size, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, key=named_key(key, "attention"))
        self.ffn = Dense(size, inner, config, key=named_key(key, "ffn"))
        self.ffn_output = Dense(inner, size, config, key=named_key(key, "ffn_output"))
        self.norm = LayerNorm(size, config)
        self.dropout = eqx.nn.Dropout(config.hidden_dropout_prob)
        self.hidden_act = config.hidden_act

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        mask: Bool[Array, "batch from seq"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq hidden"]:
        x = self.attention(x, mask, key)
        y = self.ffn_output(activation(self.hidden_act)(self.ffn(x)))
        # Dropped out as in google-research/albert; Hugging Face's model leaves this one out.
        return self.norm(x + dropped(self.dropout, y, key, "ffn_output"))


class Albert(eqx.Module):
    """ALBERT without a head: from token ids to a vector for each.

        albert = Albert(AlbertConfig.preset("base"), key=key)
        hidden = albert(tokens, mask=tokens != config.pad_token_id)

    **Arguments:**

    - `pooler`: whether there is one. Tasks on whole sentences use it; masked language modelling
      does not, and goes without, so that no parameter is trained that nothing reads.
    """

    embeddings: Embeddings
    mapping: Dense
    """From the embeddings' width to the layers'."""
    groups: tuple[tuple[Layer, ...], ...]
    """`num_hidden_groups` times `inner_group_num` layers' weights."""
    pooler: Dense | None
    config: AlbertConfig = eqx.field(static=True)

    def __init__(self, config: AlbertConfig, *, key: PRNGKeyArray, pooler: bool = True):
        size = config.hidden_size
        self.embeddings = Embeddings(config, key=named_key(key, "embeddings"))
        self.mapping = Dense(config.embedding_size, size, config, key=named_key(key, "mapping"))
        self.groups = tuple(
            tuple(
                Layer(config, key=named_key(key, f"group {group} layer {layer}"))
                for layer in range(config.inner_group_num)
            )
            for group in range(config.num_hidden_groups)
        )
        self.pooler = Dense(size, size, config, key=named_key(key, "pooler")) if pooler else None
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        mask: Bool[Array, "batch seq"] | Bool[Array, "batch seq seq"] | None = None,
        token_types: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """**Arguments:**

        - `mask`: which tokens are seen: by all of their row, or (batch, from, to) in pairs.
        - `token_types`: the segment, 0 or 1, of each token; all 0 by default.
        - `positions`: by default 0, 1, 2, … in each row.
        - `key`: of dropout, where the configuration has any; see `equinox.nn.inference_mode`.

        **Raises:** `ValueError`, at trace time, for rows longer than the position embeddings.
        An id outside its table cannot be seen here and makes its row NaN; `check_tokens` finds
        it on the host.
        """
        limit = self.config.max_position_embeddings
        if positions is None and tokens.shape[1] > limit:
            raise ValueError(
                f"The rows have {tokens.shape[1]} tokens, but this ALBERT has positions for "
                f"{limit} (`max_position_embeddings`). Cut the rows, or make the model with "
                f"`AlbertConfig(max_position_embeddings={tokens.shape[1]})`."
            )
        if mask is not None and mask.ndim == 2:
            mask = rearrange(mask, "batch seq -> batch 1 seq")
        x = self.mapping(self.embeddings(tokens, token_types, positions, key))
        x = constrain(x, DATA_AXES, "context")
        groups = [self._group(number, mask) for number in range(len(self.groups))]
        if isinstance(x, jax.core.Tracer):
            # Traced once for all layers of a group, which halves the time to trace a step of 12.
            groups = [jax.jit(group) for group in groups]
        for number, run in self._runs():
            x = self._run(x, groups[number], run, key)
        return x

    def _runs(self) -> list[tuple[int, list[int]]]:
        """Groups, and the layers by number that use them one after the other: all of a group's,
        to be one loop of the program, or each on its own."""
        # Unrolled by default: training in `lax.scan` took 17 % more time and 40 % more memory on
        # CPU (4 layers, nothing rematerialised), and here gradients of shared weights are reduced
        # once, not a layer at a time. Compiling grows with depth, but takes seconds still.
        numbered = list(enumerate(self.config.layer_groups))
        if not self.config.scan_layers:
            return [(group, [number]) for number, group in numbered]
        return [
            (group, [number for number, _ in run])
            for group, run in itertools.groupby(numbered, key=lambda pair: pair[1])
        ]

    def _group(self, number: int, mask: Bool[Array, "batch from seq"] | None) -> _Group:
        """The layers with the weights of the group `number`, one after the other."""

        def group(x: Array, keys: Sequence[PRNGKeyArray | None]) -> Array:
            for layer, own in zip(self.groups[number], keys, strict=True):
                x = constrain(layer(x, mask, own), DATA_AXES, "context")
            return x

        return rematerialised(group, self.config.remat)

    def _run(
        self,
        x: Float[Array, "batch seq hidden"],
        group: _Group,
        numbers: list[int],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq hidden"]:
        """The layers `numbers`, all of which are this group's."""

        def keys(inner: int) -> list[PRNGKeyArray]:
            assert key is not None
            return [named_key(key, f"{number} {inner}") for number in numbers]

        several = range(self.config.inner_group_num)
        drawn = [None if key is None else keys(inner) for inner in several]
        if len(numbers) == 1:
            return group(x, [None if of is None else of[0] for of in drawn])
        stacked = [None if of is None else jnp.stack(of) for of in drawn]
        body = lambda x, keys: (group(x, keys), None)
        return jax.lax.scan(body, x, stacked, length=len(numbers))[0]

    def partition_rules(self) -> Sequence[Rule]:
        """Attention heads, the feed-forward's width and the vocabulary over the axis `tensor`, as
        in Megatron-LM (Shoeybi et al. 2019, section 3): two reductions a layer in each direction.
        """
        into, out = PartitionSpec(None, "tensor"), PartitionSpec("tensor", None)

        def heads(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
            size, count = mesh.shape.get("tensor", 1), self.config.num_attention_heads
            if count % size:
                raise ValueError(
                    f"The mesh's axis `tensor` has the size {size}, which does not divide the "
                    f"`num_attention_heads={count}` of this ALBERT. Write a size that does."
                )
            return into if len(shape) == 2 else PartitionSpec("tensor")

        return (
            (r"attention/(query|key|value)/(weight|bias)$", heads),
            (r"attention/output/weight$", out),
            (r"/ffn/weight$", into),
            (r"/ffn/bias$", PartitionSpec("tensor")),
            (r"/ffn_output/weight$", out),
            (r"embeddings/words$", out),
        )

    def pooled(
        self,
        hidden: Float[Array, "batch seq hidden"],
        positions: Int[Array, "batch some"] | None = None,
    ) -> Float[Array, "batch hidden"] | Float[Array, "batch some hidden"]:
        """A text's vector, from that of its first token, the [CLS]: one a row, or, where a row is
        packed of several texts, one of those that begin at each of `positions`. In float32."""
        if self.pooler is None:
            raise ValueError("This ALBERT has no pooler. Make it with `Albert(..., pooler=True)`.")
        first = hidden[:, 0] if positions is None else gather(hidden, positions)
        return jnp.tanh(self.pooler.in_float32(first))


class MaskedLMHead(eqx.Module):
    """From hidden vectors to logits over the vocabulary, through the word embeddings."""

    dense: Dense
    norm: LayerNorm
    bias: Float[Array, " vocab"]
    hidden_act: str = eqx.field(static=True)

    def __init__(self, config: AlbertConfig, *, key: PRNGKeyArray):
        self.dense = Dense(
            config.hidden_size, config.embedding_size, config, key=named_key(key, "dense")
        )
        self.norm = LayerNorm(config.embedding_size, config)
        self.bias = jnp.zeros(config.vocab_size)
        self.hidden_act = config.hidden_act

    def __call__(
        self, hidden: Float[Array, "batch some hidden"], words: Float[Array, "vocab embedding"]
    ) -> Float[Array, "batch some vocab"]:
        """Logits, in float32 whatever the compute dtype. `words`: the word embeddings."""
        x = self.norm(activation(self.hidden_act)(self.dense(hidden)))
        logits = jnp.einsum("bse,ve->bsv", x, words, preferred_element_type=jnp.float32)
        return logits + along_last(self.bias.astype(jnp.float32), logits)


def gather(
    hidden: Float[Array, "batch seq hidden"], positions: Int[Array, "batch some"]
) -> Float[Array, "batch some hidden"]:
    """The vectors at `positions` of each row."""
    return jnp.take_along_axis(hidden, rearrange(positions, "batch some -> batch some 1"), axis=1)
