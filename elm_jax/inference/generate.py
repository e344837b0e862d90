"""`generate`: continue a batch of prompts on the device, in one program. (Many prompts in turn: `engine`.)

B batch, P prompt slots, D width.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.inference.decoding import (
    ENDLESS,
    Model,
    Prompts,
    Start,
    decode,
    empty_rows,
    make_cache,
    prefill_and_sample,
)
from elm_jax.inference.sampling import Sampling
from elm_jax.models import hints
from elm_jax.models.attention import positions_from_mask
from elm_jax.models.decoder import Decoder, as_prompt


def generate(
    llm: Decoder,
    tokens: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue prompts: ids (B, P) or embeddings (B, P, D) -> ids (B, max_new_tokens) int32.

    Args:
        attention_mask: (B, P) of 0/1, padded on either side; a row of zeros gives nothing.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: drawn from the fewest tokens whose probabilities reach top_p.
        eos_ids: a row ends with the first of these, which is still in the output; -1 follows.
        key: of `jax.random`, needed where temperature is above 0.
    Prompts are padded to a few lengths, so that compilations stay few; the other arguments, max_new_tokens
    and the number of eos_ids excepted, compile nothing anew.
    Raises UserError for values out of range, and where the learned positions of a model do not suffice.
    """
    _check(max_new_tokens, temperature, top_p, key)
    prompt, valid = as_prompt(tokens, inputs_embeds, attention_mask)
    llm.check_length(positions_from_mask(valid), max_new_tokens)
    spare = bucket(prompt.shape[1]) - prompt.shape[1]
    prompt = jnp.pad(prompt, ((0, 0), (0, spare)) + ((0, 0),) * (prompt.ndim - 2))
    valid = jnp.pad(valid.astype(bool), ((0, 0), (0, spare)))
    sampling = Sampling.of(temperature, top_p, key=key)
    ends, model = jnp.asarray(tuple(eos_ids), jnp.int32), Model(*nnx.split(llm), hints.current())
    return generate_from_prompt(model, prompt, valid, sampling, ends, max_new_tokens)


def bucket(length: int, least: int = 64) -> int:
    """The padded length: a multiple of `least`, and of an eighth of the next power of two."""
    step = max(least, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


@partial(jax.jit, static_argnames=("max_new_tokens",))
def generate_from_prompt(
    model: Model, prompt: jax.Array, valid: jax.Array, sampling: Sampling, eos_ids: jax.Array, max_new_tokens: int
) -> jax.Array:
    """The jitted core of `generate`. Ids (B, P) or embeddings (B, P, D) -> (B, max_new_tokens)."""
    with hints.placed(model.placement):
        x, lengths = nnx.merge(model.graph, model.state).embed_prompt(prompt), valid.sum(-1, dtype=jnp.int32)
        # What is padding goes to the end, in whatever places it was.
        x = jnp.take_along_axis(x, jnp.argsort(~valid, axis=-1, stable=True)[:, :, None], axis=1)
        rows, nothing = len(x), jnp.zeros_like(lengths)
        known, new = (make_cache(model, rows, places, x.dtype, "batch") for places in (x.shape[1], max_new_tokens))
        number, begun = jnp.arange(rows), empty_rows(known, new, None)
        start = Start(number, jnp.full(rows, max_new_tokens, jnp.int32), number[:, None], None)
        prompts = Prompts(x, lengths, nothing)
        begun, first = prefill_and_sample(model, begun, None, prompts, nothing, start, sampling, eos_ids)
        _, rest = decode(model, begun, sampling, eos_ids, max_new_tokens, max_new_tokens - 1, ENDLESS, x.dtype)
        return jnp.concatenate([first.tokens[:, None], rest.tokens[:, :-1]], axis=1)


def _check(max_new_tokens: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    where = "generate"
    if max_new_tokens < 1:
        raise UserError(where, f"max_new_tokens = {max_new_tokens}", "at least 1", "raise it")
    if not temperature >= 0:
        raise UserError(where, f"temperature = {temperature}", "0 or more", "use 0 for greedy decoding")
    if not 0 < top_p <= 1:
        raise UserError(where, f"top_p = {top_p}", "above 0 and at most 1", "use 1 to leave nothing out")
    if temperature > 0 and key is None:
        raise UserError(
            where, f"temperature = {temperature} without key", "a key", "give key=jax.random.key(seed)"
        )
