"""From the encoder's width to the LLM's, and into the LLM's input.

Dimension letters: B rows, T tokens, S signal slots, N signal tokens per ECG, E encoder width, D model width.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, nearest
from elm_jax.models.layers import Axes, Linear
from elm_jax.weights.rules import Rule


class LinearConnector(nnx.Module):
    """(..., E) -> (..., D), in the dtype of the input."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        self.projection = _linear(in_width, out_width, ("signal", "embed"), rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x)


class MlpConnector(nnx.Module):
    """(..., E) -> hidden -> exact GELU -> (..., D), in the dtype of the input."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        self.hidden = _linear(in_width, hidden, ("signal", "mlp"), rngs, param_dtype)
        self.projection = _linear(hidden, out_width, ("mlp", "embed"), rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(jax.nn.gelu(self.hidden(x), approximate=False))


# The published weights of each kind.
RULES: dict[str, tuple[Rule, ...]] = {
    "linear": (
        Rule("projection.weight", "projection.kernel", transpose=True),
        Rule("projection.bias", "projection.bias"),
    ),
    "mlp": (
        Rule("projection.0.weight", "hidden.kernel", transpose=True),
        Rule("projection.0.bias", "hidden.bias"),
        Rule("projection.2.weight", "projection.kernel", transpose=True),
        Rule("projection.2.bias", "projection.bias"),
    ),
}


def build_connector(
    kind: str,
    in_width: int,
    out_width: int,
    hidden: int | None = None,
    *,
    rngs: nnx.Rngs,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
) -> LinearConnector | MlpConnector:
    """A freshly initialised connector; `hidden` (of "mlp") defaults to `out_width`.

    Raises UserError for a kind that does not exist and for `hidden` with a kind that has none.
    """
    if kind == "mlp":
        inner = out_width if hidden is None else hidden
        return MlpConnector(in_width, out_width, inner, rngs=rngs, param_dtype=param_dtype)
    if kind != "linear":
        fix = nearest(kind, RULES) or "choose one of them"
        raise UserError("connector", repr(kind), f"one of {', '.join(RULES)}", fix)
    if hidden is not None:
        fix = "remove it or choose a model with an MLP connector"
        raise UserError("connector.hidden", str(hidden), "None for a linear connector", fix)
    return LinearConnector(in_width, out_width, rngs=rngs, param_dtype=param_dtype)


def splice(text: jax.Array, signals: jax.Array, slot: jax.Array, compat: Iterable[str] = ()) -> jax.Array:
    """Token embeddings (B, T, D) with signal embeddings (B, S·N, D) where `slot` (B, T) int32 says so.

    slot: index into the row's signal embeddings, -1 for text. The result has the dtype of `text`.
    compat: with "skip_zero_signals" an embedding that is exactly zero leaves the text's in its place.
    """
    if signals.shape[1] == 0:
        return text
    chosen = jnp.take_along_axis(signals, jnp.maximum(slot, 0)[..., None], axis=1)
    used = slot >= 0
    if behaviours.enabled("skip_zero_signals", compat):
        used &= jnp.any(chosen != 0, axis=-1)
    return jnp.where(used[..., None], chosen.astype(text.dtype), text)


def _linear(
    in_width: int, out_width: int, axes: Axes, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike
) -> Linear:
    """A Linear with torch's default initialisation: kernel and bias uniform within 1/sqrt(in_width)."""
    layer = Linear(in_width, out_width, axes, rngs, bias=True, param_dtype=param_dtype)
    bound = in_width**-0.5
    for param in (layer.kernel, layer.bias):
        assert param is not None
        value = jax.random.uniform(rngs.params(), param.shape, jnp.float32, -bound, bound)
        param.set_value(value.astype(param_dtype))
    return layer
