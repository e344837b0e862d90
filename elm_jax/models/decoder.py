"""One decoder for every language model family; a family is a `DecoderConfig`.

B batch, T tokens, D width, E width of the token embeddings (D but for some OPT), H heads, K key/value heads, V
vocabulary.
Layers are stacked (a parameter of `layers` has a leading axis of the layers with such a part, see `stack`) and run by
one `lax.scan`. The model
has no KV cache: `generate` brings its own, through `project`, `combine` and `scan_layers`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from elm_jax.errors import UserError
from elm_jax.models import hints, stack
from elm_jax.models.attention import Blocks, Implementation, attend, padding_mask, positions_from_mask, windowed
from elm_jax.models.decoder_layer import DecoderConfig, Layer, Rotary, Window, make_norm
from elm_jax.models.delta import Chains
from elm_jax.models.hints import hint, weight
from elm_jax.models.layers import Embedding, LearnedPositions, Linear, LongScaling
from elm_jax.models.noise import drawing, dropout
from elm_jax.models.remat import Remat, rematerialised
from elm_jax.models.stack import Parts

__all__ = ["Decoder", "DecoderConfig", "Layer", "Remat", "Window", "as_prompt"]

Body = Callable[[Layer, Window, Any, Parts], tuple[Any, Parts]]


class Decoder(nnx.Module):
    """A causal language model. See `__call__` for plain use; training composes embed, hidden and logits.

    scan=False unrolls the same layer code over the same stacked parameters. remat: what the backward pass
    recomputes ("dots" keeps the results of the matrix products, "full" keeps only each layer's input).
    dropout: the rate after the embeddings and before each residual sum, where `hidden` has a key.
    positions_count_padding: whether padding has positions, too, in `__call__` and `all_hidden` (compat
    gpt2_positions).
    """

    def __init__(
        self,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        scan: bool = True,
        remat: Remat = "none",
        attention: Implementation = "xla",
        dropout: float = 0.0,
        positions_count_padding: bool = False,
    ) -> None:
        self.config, self.scan, self.dropout = config, scan, dropout
        self.remat: Remat = remat
        self.attention: Implementation = attention
        self.positions_count_padding = positions_count_padding

        width, inner = config.embedding, config.hidden
        self.embedding = Embedding(config.vocab_size, width, rngs, param_dtype)
        self.positions = (
            LearnedPositions(config.max_len, config.position_offset, config.hidden, rngs, param_dtype)
            if config.rope is None
            else None
        )
        self.layers = stack.stacked_layers(config, rngs, lambda rngs: Layer(config, rngs, param_dtype, dropout))
        self.norm = make_norm(config, config.hidden, param_dtype) if config.pre_norm else None
        self.head = (
            None if config.tied else Linear(width, config.vocab_size, ("embed", "vocab"), rngs, param_dtype=param_dtype)
        )
        # Not along "embed" twice: an axis of the mesh divides one dimension.
        between = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.project_in = between(width, inner, (None, "embed")) if width != inner else None
        self.project_out = between(inner, width, ("embed", None)) if width != inner else None

    @property
    def embedding_scale(self) -> float:
        """What token embeddings are multiplied by; embeddings that are given instead of tokens are not."""
        return self.config.hidden**0.5 if self.config.scale_embeddings else 1.0

    def embed(self, tokens: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """(B, T) ids -> (B, T, E) in `dtype` (default: that of the parameters), as `hidden` takes them."""
        x = hint(self.embedding(tokens, dtype), "batch", None, None)
        return x * jnp.asarray(self.embedding_scale, x.dtype) if self.config.scale_embeddings else x

    def placed(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeddings (B,T,E) -> the first layer's input (B,T,D), with the learned positions (B,T), if any."""
        x = x if self.project_in is None else self.project_in(x)
        return x if self.positions is None else x + self.positions(positions, x.dtype)

    def final(self, x: jax.Array) -> jax.Array:
        """The last layer's output (B,T,D) -> what `logits` takes (B,T,E)."""
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def hidden(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        key: jax.Array | None = None,
        blocks: Blocks | None = None,
        chains: Chains | None = None,
    ) -> jax.Array:
        """Embeddings (B,T,E), positions (B,T), mask (B,1,T,T) True = sees -> `final` states (B,T,E).

        With a `key` there is dropout, drawn anew in every layer; without one nothing drops. With `blocks`, the mask
        is that of the blocks. `chains`: as `self.chains` makes them.
        """

        def noise(index: jax.Array | int) -> AbstractContextManager[None]:
            return drawing(None if key is None else jax.random.fold_in(key, index))

        run = self.layer_of(positions, mask, blocks, chains)

        def body(layer: Layer, window: Window, x: jax.Array, own: Parts) -> tuple[jax.Array, Parts]:
            with noise(own["index"]):
                return run(layer, window, x), {}

        with noise(self.config.layers):
            x = dropout(self.placed(x, positions), self.dropout)
        x, _ = self.scan_layers(body, x, {"index": jnp.arange(self.config.layers)})
        return self.final(x)

    def chains(self, groups: jax.Array, branches: jax.Array) -> Chains | None:
        """What the tokens of packed rows (B,T) follow (`Chains.of`), where layers have a recurrence that must know."""
        delta = self.config.delta
        return None if delta is None else Chains.of(groups, branches, delta.taps)

    def layer_of(
        self, positions: jax.Array, mask: jax.Array, blocks: Blocks | None = None, chains: Chains | None = None
    ) -> Callable[[Layer, Window, jax.Array], jax.Array]:
        """(layer, window, x) -> the layer's output, for tokens at `positions` (B,T) that see `mask` (B,1,T,T)."""
        queries, keys = (lambda x: x, lambda x: x) if blocks is None else (blocks.queries, blocks.keys)
        rotary, masks = self.rotary(positions), self.masks(mask, queries(positions), keys(positions))

        def run(layer: Layer, window: Window, x: jax.Array) -> jax.Array:
            if layer.attention is None:
                return layer.recur(x, chains)[0]
            q, k, v, gate = layer.project(x, rotary[window])
            return layer.combine(x, self.attend(queries(q), keys(k), keys(v), masks[window]), gate)

        return run

    def masks(self, mask: jax.Array, queries: jax.Array, keys: jax.Array) -> dict[Window, jax.Array]:
        """For each window of this decoder, `mask` (B,1,T,S) within it; positions queries (B,T), keys (B,S)."""
        return {window: windowed(mask, queries, keys, window) for window in set(self.config.windows)}

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array,
        implementation: Implementation | None = None,
    ) -> jax.Array:
        """`attention.attend` with this decoder's scale and soft cap."""
        return attend(q, k, v, mask, self.scale, implementation or self.attention, self.config.attention_cap)

    @property
    def scale(self) -> float:
        """What scores of attention are multiplied by."""
        config = self.config
        return (config.head_dim if config.query_scalar is None else config.query_scalar) ** -0.5

    def output_weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The vocabulary projection, (E, V), in `dtype`: take it once where logits are computed in chunks."""
        if self.head is None:
            return weight(self.embedding.table, dtype).T
        return weight(self.head.kernel, dtype)

    def logits(self, h: jax.Array, output_weight: jax.Array | None = None) -> jax.Array:
        """`final` states (..., E) -> logits (..., V) in float32.

        Their gradient is multiplied in the dtype of h, as that of any other product.
        """
        logits = _project(h, self.output_weight(h.dtype) if output_weight is None else output_weight)
        cap = self.config.logit_cap
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return hint(logits, "batch", *(None,) * (logits.ndim - 2), "vocab") if logits.ndim > 1 else logits

    def rotary(self, positions: jax.Array) -> dict[Window, Rotary | None]:
        """For each window of this decoder, (B, T) positions -> what `Layer.project` needs to know of them."""
        config = self.config
        made = {rope: rope and rope.angles(positions, config.head_dim) for rope in (config.rope, config.local_rope)}
        return {w: made[config.rope if w is None else config.local_rope or config.rope] for w in set(config.windows)}

    def scan_layers(
        self, body: Body, carry: Any, xs: Parts | None = None, last: Body | None = None
    ) -> tuple[Any, Parts]:
        """Run `body(layer, window, carry, own) -> (carry, made)` through the layers; (last carry, all that was made).

        `last`: the body of the last layer where layers are unrolled; its carry may have another shape.

        `xs` is a table of parts (see `stack`), of which each layer is given its own; so is what the layers make. A
        step of the scan runs one period of layers, each with its own window and parts, known when the step is traced.
        The body is rematerialised, layer by layer, as the model says.
        """
        config, given = self.config, xs or {}
        windows, period = config.windows, config.period
        alone = isinstance(self.layers, nnx.List)
        graphs, state = ([], {}) if alone else stack.of_kinds(config, self.layers)

        def layer_step(place: int, graph: nnx.GraphDef, body: Body = body) -> Callable[[Any, Any], tuple[Any, Any]]:
            def step(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
                layer_state, own = inputs
                return body(nnx.merge(graph, layer_state), windows[place % len(windows)], carry, own)

            return rematerialised(step, self.remat, in_scan=self.scan)

        def taken(parts: Parts, layer: int) -> dict[str, Any]:
            return stack.taken(config, parts, layer)

        if self.scan:
            steps = [layer_step(place, graph) for place, graph in enumerate(graphs)]

            def run(carry: Any, inputs: tuple[Parts, Parts]) -> tuple[Any, Parts]:
                made = []
                for place, step in enumerate(steps):
                    parts, own = (taken(each, place) for each in inputs)
                    carry, one = step(carry, (nnx.State(parts), own))
                    made.append(one)
                return carry, stack.gathered(made)

            groups = config.layers // period
            inputs = stack.folded(state, groups), stack.folded(given, groups)
            carry, made = jax.lax.scan(run, carry, inputs, length=groups)
            return carry, stack.unfolded(made)
        made = []
        for index in range(config.layers):
            if isinstance(self.layers, nnx.List):
                graph, own = nnx.split(self.layers[index])
            else:
                graph, own = graphs[index % period], nnx.State(taken(state, index))
            step = layer_step(index, graph, last if last is not None and index == config.layers - 1 else body)
            carry, one = step(carry, (own, taken(given, index)))
            made.append(one)
        return carry, stack.gathered(made)

    def unstacked(self) -> "Decoder":
        """The decoder with arrays of its own for each layer, unrolled: a slice of a stacked array is a copy."""
        if isinstance(self.layers, nnx.List):
            return self
        found = nnx.merge(*nnx.split(self))
        graphs, state = stack.of_kinds(self.config, self.layers)
        each = enumerate(stack.separate(self.config, state))
        found.layers = nnx.List(nnx.merge(graphs[n % len(graphs)], nnx.State(own)) for n, own in each)
        found.scan = False
        return found

    def __call__(
        self,
        tokens: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V) float32 of ids (B, T) or embeddings (B, T, E), padded on either side.

        attention_mask (B, T) of 0/1, default all ones. Positions count from the first real token; what stands
        at padding means nothing. Raises UserError for a prompt beyond the learned positions.
        """
        graph, state = nnx.split(self)
        prompt, valid = as_prompt(tokens, inputs_embeds, attention_mask)
        self.check_length(self.prompt_positions(valid))
        return _logits(graph, state, prompt, valid, hints.current())

    def all_hidden(
        self,
        tokens: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """(L+1, B, T, D): the embeddings, then each layer's output, the last one after the final norm, if any."""
        prompt, valid = as_prompt(tokens, inputs_embeds, attention_mask)
        positions = self.prompt_positions(valid)
        self.check_length(positions)
        x, chains = self.placed(self.embed_prompt(prompt), positions), self.chains(valid, jnp.zeros_like(valid))
        run = self.layer_of(positions, padding_mask(valid), None, chains)

        def body(layer: Layer, window: Window, x: jax.Array, _: Parts) -> tuple[jax.Array, Parts]:
            x = run(layer, window, x)
            return x, {"output": x}

        last, found = self.scan_layers(body, x)
        return jnp.concatenate([x[None], found["output"][:-1], (last if self.norm is None else self.norm(last))[None]])

    def embed_prompt(self, prompt: jax.Array) -> jax.Array:
        """Ids (B, T) or embeddings (B, T, E) -> embeddings."""
        return self.embed(prompt) if prompt.ndim == 2 else hint(prompt, "batch", None, None)

    def prompt_positions(self, valid: jax.Array) -> jax.Array:
        """Positions (B, T) of a prompt's tokens, for `__call__` and `all_hidden`."""
        if self.positions_count_padding:
            return jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
        return positions_from_mask(valid)

    def check_length(self, positions: jax.Array, new: int = 0) -> None:
        """Raise UserError if the learned positions do not reach to `new` tokens after a prompt's (B, T), or these come
        where cached keys would have to be turned otherwise (`LongScaling`).

        Inside a traced function nothing can be raised: a position beyond the table gives NaN there.
        """
        if isinstance(positions, Tracer):
            return
        stretch = self.config.rope and self.config.rope.stretch
        if self.positions is not None:
            room, known = self.config.max_len, "the model's learned positions"
        elif isinstance(stretch, LongScaling) and stretch.short != stretch.long:
            room, known = stretch.original_max_len, "its short context, or more than that in the prompt"
            positions = jnp.where(positions.max(1) < room, positions.max(1), 0)  # of those that begin in it
        else:
            return
        longest = int(positions.max()) + 1
        if longest + new > room:
            found = f"{longest} tokens" + (f" and {new} to generate" if new else "")
            raise UserError("the prompt", found, f"at most {room}, {known}", "shorten the prompt or generate less")


@jax.custom_vjp
def _project(h: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(h, weight, preferred_element_type=jnp.float32)


def _project_forward(h: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(h, weight), (h, weight)


def _project_backward(inputs: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(jnp.matmul, *inputs)[1](cotangent.astype(inputs[0].dtype))


_project.defvjp(_project_forward, _project_backward)


def as_prompt(
    tokens: jax.Array | None, inputs_embeds: jax.Array | None, attention_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Ids (B,T) or embeddings (B,T,E), whichever was given, and the mask (B,T); ValueError otherwise."""
    if (tokens is None) == (inputs_embeds is None):
        raise ValueError("give either tokens or inputs_embeds")
    prompt = jnp.asarray(tokens if inputs_embeds is None else inputs_embeds)
    rank = 2 if inputs_embeds is None else 3
    if prompt.ndim != rank:
        raise ValueError(f"expected {rank} dimensions, found shape {prompt.shape}")
    valid = jnp.ones(prompt.shape[:2], jnp.int32) if attention_mask is None else jnp.asarray(attention_mask)
    if valid.shape != prompt.shape[:2]:
        raise ValueError(f"attention_mask has shape {valid.shape}, the prompt {prompt.shape[:2]}")
    return prompt, valid


@partial(jax.jit, static_argnums=(0, 4))
def _logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    prompt: jax.Array,
    valid: jax.Array,
    placement: hints.Placement | None,
) -> jax.Array:
    with hints.placed(placement):
        model = nnx.merge(graph, state)
        x, chains = model.embed_prompt(prompt), model.chains(valid, jnp.zeros_like(valid))
        h = model.hidden(x, model.prompt_positions(valid), padding_mask(valid), chains=chains)
        return model.logits(h)
