"""From an encoder's features, or from the signal itself, to the LLM's width, and into the LLM's input.

Dimension letters: B rows, T tokens, S signal slots, C leads, L samples, N signal tokens per ECG, P samples of a
patch, E encoder width, D model width.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, nearest
from elm_jax.models.hints import weight
from elm_jax.models.layers import Axes, Linear, plus, uniform
from elm_jax.models.names import Rule


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
    """(..., N, E) -> hidden -> exact GELU -> (..., N, D), in the dtype of the input.

    newlines: (N,) of bools, the places of a learnt vector, whatever comes in there (`encoders.clip_patches`).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        newlines: tuple[bool, ...] = (),
    ) -> None:
        self.hidden = _linear(in_width, hidden, ("signal", "mlp"), rngs, param_dtype)
        self.projection = _linear(hidden, out_width, ("mlp", "embed"), rngs, param_dtype)
        self.newlines = newlines if any(newlines) else ()
        if self.newlines:
            self.newline = _uniform((out_width,), out_width**-0.5, ("embed",), rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.projection(jax.nn.gelu(self.hidden(x), approximate=False))
        if not self.newlines:
            return y
        return jnp.where(np.array(self.newlines)[:, None], weight(self.newline, jnp.float32).astype(y.dtype), y)


class PatchConnector(nnx.Module):
    """Signals (B, C, L) -> N patches in time, each flattened lead by lead -> (B, N, D), in the dtype of the input."""

    def __init__(
        self,
        leads: int,
        samples: int,
        tokens: int,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        self.shape, self.tokens = (leads, samples), tokens
        self.projection = _linear(leads * samples // tokens, out_width, ("signal", "embed"), rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        patches = _patches(x, self.shape, self.tokens)  # (B, N, C, P)
        return self.projection(patches.reshape(*patches.shape[:2], -1))


CONV_CHANNELS, CONV_KERNELS = (64, 128), (3, 7)


class ConvConnector(nnx.Module):
    """Signals (B, C, L) -> N patches in time, each through two convolutions and a mean over time -> (B, N, D)."""

    def __init__(
        self,
        leads: int,
        samples: int,
        tokens: int,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        self.shape, self.tokens = (leads, samples), tokens
        self.conv1 = _Conv(leads, CONV_CHANNELS[0], CONV_KERNELS[0], rngs, param_dtype)
        self.conv2 = _Conv(*CONV_CHANNELS, CONV_KERNELS[1], rngs, param_dtype)
        self.projection = _linear(CONV_CHANNELS[1], out_width, ("signal", "embed"), rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        patches = _patches(x, self.shape, self.tokens).swapaxes(2, 3)  # (B, N, P, C)
        flat = patches.reshape(-1, *patches.shape[2:])
        features = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(flat))))
        mean = features.astype(jnp.float32).mean(1).astype(x.dtype)
        return self.projection(mean.reshape(*patches.shape[:2], -1))


class _Conv(nnx.Module):
    """(B, P, I) -> (B, P, O) along time, the ends padded with zeros."""

    def __init__(self, cin: int, cout: int, size: int, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike) -> None:
        bound = (cin * size) ** -0.5
        self.kernel = _uniform((size, cin, cout), bound, (None, None, "conv_out"), rngs, param_dtype)
        self.bias = _uniform((cout,), bound, ("conv_out",), rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = weight(self.kernel, x.dtype)
        y = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return plus(y, self.bias)


# The published weights of each kind; PyTorch's convolutions keep (out, in, time).
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
        Rule("image_newline", "newline"),
    ),
    "patch": (
        Rule("projection.weight", "projection.kernel", transpose=True),
        Rule("projection.bias", "projection.bias"),
    ),
    "conv": (
        Rule("conv1.weight", "conv1.kernel", transpose=True),
        Rule("conv1.bias", "conv1.bias"),
        Rule("conv2.weight", "conv2.kernel", transpose=True),
        Rule("conv2.bias", "conv2.bias"),
        Rule("fc.weight", "projection.kernel", transpose=True),
        Rule("fc.bias", "projection.bias"),
    ),
}
# What the reference puts before these names.
PREFIXES = {"linear": "projection.", "mlp": "projection.", "patch": "project_layer.", "conv": "project_layer."}
SIGNAL_KINDS = {"patch": PatchConnector, "conv": ConvConnector}  # those that read the signal itself


def build_connector(
    kind: str,
    in_width: int,
    out_width: int,
    hidden: int | None = None,
    *,
    rngs: nnx.Rngs,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    newlines: tuple[bool, ...] = (),
) -> LinearConnector | MlpConnector:
    """A freshly initialised connector behind an encoder; `hidden` (of "mlp") defaults to `out_width`; `newlines`: the
    encoder's, which an MLP alone fills.

    Raises UserError for a kind that does not exist, and for `hidden` or newlines with a kind that has none.
    """
    if kind == "mlp":
        inner = out_width if hidden is None else hidden
        return MlpConnector(in_width, out_width, inner, rngs=rngs, param_dtype=param_dtype, newlines=newlines)
    if any(newlines):
        raise UserError("encoder.config.merge", "spatial_unpad", "flat or spatial without an MLP", "choose another elm")
    if kind != "linear":
        fix = nearest(kind, ("linear", "mlp")) or "choose one of them"
        raise UserError("connector", repr(kind), "linear or mlp", fix)
    if hidden is not None:
        fix = "remove it or choose a model with an MLP connector"
        raise UserError("connector.hidden", str(hidden), "None for a linear connector", fix)
    return LinearConnector(in_width, out_width, rngs=rngs, param_dtype=param_dtype)


def build_signal_connector(
    kind: str,
    leads: int,
    samples: int,
    tokens: int,
    out_width: int,
    *,
    rngs: nnx.Rngs,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
) -> PatchConnector | ConvConnector:
    """A freshly initialised connector that reads signals (B, C, L) itself: "patch" or "conv".

    Raises UserError where the samples do not divide into `tokens` patches.
    """
    if samples % tokens:
        fitting = [n for n in range(1, 129) if samples % n == 0]
        near = min(fitting, key=lambda n: abs(n - tokens))
        raise UserError(
            "encoder.tokens", str(tokens), f"a number that divides data.segment_len={samples}",
            f"set for example --config.encoder.tokens={near}",
        )  # fmt: skip
    return SIGNAL_KINDS[kind](leads, samples, tokens, out_width, rngs=rngs, param_dtype=param_dtype)


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


def _patches(x: jax.Array, shape: tuple[int, int], tokens: int) -> jax.Array:
    """Signals (B, C, L) -> (B, N, C, P). UserError for signals of another shape."""
    if x.shape[1:] != shape:
        found, expected = f"signals of shape {x.shape}", f"(batch, {shape[0]} leads, {shape[1]} samples)"
        raise UserError("connector input", found, expected, "give signals of the model's leads and length")
    return x.reshape(x.shape[0], shape[0], tokens, -1).swapaxes(1, 2)


def _linear(
    in_width: int, out_width: int, axes: Axes, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike
) -> Linear:
    """A Linear with torch's default initialisation: kernel and bias uniform within 1/sqrt(in_width)."""
    bound = in_width**-0.5
    layer = Linear(in_width, out_width, axes, rngs, bias=True, init=uniform(bound), param_dtype=param_dtype)
    layer.bias = _uniform((out_width,), bound, axes[1:], rngs, param_dtype)
    return layer


def _uniform(
    shape: tuple[int, ...], bound: float, axes: Axes, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
) -> nnx.Param:
    return nnx.Param(uniform(bound)(rngs.params(), shape, jnp.float32).astype(dtype), axes=axes)
