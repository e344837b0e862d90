"""MERL's ECG encoder: a one-dimensional ResNet, pooled to N tokens (Liu et al. 2024, arXiv 2403.06659).

Flow: (B, C, L) signals -> (B, L/16, D) feature map -> (B, N, D). Kernels are (K, Cin, Cout) and activations
(B, L, C), the layout that was fastest on CPU among those tried and that accelerators take as it is.
Dimension letters: B signals, C leads, L samples or positions, K kernel size, N signal tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.hints import weight
from elm_jax.models.names import Rule, bare_name
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of

BN_MOMENTUM = 0.1
BN_EPS = 1e-5

# Fields of MERL's published config that describe its contrastive heads and text model, not this encoder.
# (Ours for num_encoder_tokens is the argument `tokens`.)
IGNORED_FIELDS = frozenset(
    ("proj_hidden", "proj_out", "in_channels", "num_layers", "dropout", "seq_len", "lm", "distributed")
    + ("spacial_dim", "d_model", "num_encoder_tokens")
)
# Parts of a MERL checkpoint that are not this encoder.
IGNORED_PREFIXES = (
    *("lm.", "lm_model.", "downconv.", "att_pool_head.", "linear1.", "linear2.", "proj_t."),
    "resnet.linear.",  # a classifier that nothing uses
)
IGNORED_SUFFIXES = (".num_batches_tracked",)


class Conv(nnx.Module):
    """Convolution over positions without bias: (B, L, Cin) -> (B, ceil(L / stride), Cout), K odd."""

    def __init__(
        self, cin: int, cout: int, size: int, stride: int = 1, *, rngs: nnx.Rngs, param_dtype: Any
    ) -> None:
        bound = (size * cin) ** -0.5  # torch's default for a convolution
        # Drawn flat: compiling a draw of three dimensions takes XLA more than twice as long.
        flat = jax.random.uniform(rngs.params(), (size * cin * cout,), jnp.float32, -bound, bound)
        kernel = flat.reshape(size, cin, cout).astype(param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None, "conv_out"))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = weight(self.kernel, x.dtype)
        pad = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride,), [(pad, pad)], dimension_numbers=("NWC", "WIO", "NWC")
        )


class BatchNorm(nnx.Module):
    """Normalise every channel of (B, L, C) over signals and positions; statistics and arithmetic in float32.

    In training a signal counts `weights` times: the result equals that of a batch where it is repeated as
    often, and a signal of weight 0 (an unused slot) has no influence. A batch without any weight is
    normalised by the running statistics and leaves them as they are. Under jit the batch is the global one.
    Weights (B, L) are those of each position: where they are 0 the result is 0, as beyond a signal's end.
    """

    def __init__(self, channels: int, *, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones(channels, param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype), axes=(None,))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32), axes=(None,))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32), axes=(None,))

    def __call__(self, x: jax.Array, weights: jax.Array | None, train: bool) -> jax.Array:
        values = x.astype(jnp.float32)
        mean, var = self._batch_statistics(values, weights) if train else (self.mean[...], self.var[...])
        gain = jax.lax.rsqrt(var + BN_EPS) * weight(self.scale, jnp.float32)
        values = (values - mean) * gain + weight(self.bias, jnp.float32)
        if weights is not None and weights.ndim == 2:
            values = jnp.where(weights[:, :, None] > 0, values, 0.0)
        return values.astype(x.dtype)

    def _batch_statistics(self, x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance (C,) of the batch; moves the running statistics towards them."""
        times = jnp.ones(x.shape[0]) if weights is None else weights.astype(jnp.float32)
        total = jnp.sum(times) * (x.shape[1] if times.ndim == 1 else 1)
        times = times.reshape(*times.shape, *(1,) * (3 - times.ndim))
        used, divisor = total > 0, jnp.maximum(total, 1)
        mean = jnp.sum(times * x, (0, 1)) / divisor
        # A second pass: E[x^2] - E[x]^2 loses the variance where the mean is large.
        var = jnp.sum(times * jnp.square(x - mean), (0, 1)) / divisor
        unbiased = var * total / jnp.maximum(total - 1, 1)
        step = jnp.where(used, BN_MOMENTUM, 0.0)
        old_mean, old_var = self.mean[...], self.var[...]
        self.mean.set_value(jax.lax.stop_gradient(old_mean + step * (mean - old_mean)))
        self.var.set_value(jax.lax.stop_gradient(old_var + step * (unbiased - old_var)))
        return jnp.where(used, mean, old_mean), jnp.where(used, var, old_var)


class Block(nnx.Module):
    """Convolutions with BatchNorm, added to the input; `convs` lists their (size, stride, channels out)."""

    def __init__(
        self, cin: int, convs: list[tuple[int, int, int]], *, rngs: nnx.Rngs, param_dtype: Any
    ) -> None:
        self.depth = len(convs)
        cout, stride, channels = convs[-1][2], max(conv[1] for conv in convs), cin
        self.stride = stride
        for i, (size, step, out) in enumerate(convs, start=1):
            setattr(self, f"conv{i}", Conv(channels, out, size, step, rngs=rngs, param_dtype=param_dtype))
            setattr(self, f"bn{i}", BatchNorm(out, param_dtype=param_dtype))
            channels = out
        self.shortcut = nnx.List([])
        if stride != 1 or cin != cout:
            self.shortcut.append(Conv(cin, cout, 1, stride, rngs=rngs, param_dtype=param_dtype))
            self.shortcut.append(BatchNorm(cout, param_dtype=param_dtype))

    def __call__(self, x: jax.Array, weights: jax.Array | None, train: bool) -> jax.Array:
        y, own = x, weights
        for i in range(1, self.depth + 1):
            conv = getattr(self, f"conv{i}")
            own = strided(own, conv.stride)
            y = getattr(self, f"bn{i}")(conv(y), own, train)
            if i < self.depth:
                y = jax.nn.relu(y)
        if self.shortcut:
            conv, norm = self.shortcut
            x = norm(conv(x), own, train)
        return jax.nn.relu(x + y)


def strided(weights: jax.Array | None, stride: int) -> jax.Array | None:
    """The weights of what a `Conv` of this stride leaves: position k of it stands where stride * k stood."""
    return weights if weights is None or weights.ndim == 1 else weights[:, ::stride]


def basic(channels: int, stride: int) -> list[tuple[int, int, int]]:
    """Convolutions of the shallow nets' block."""
    return [(3, stride, channels), (3, 1, channels)]


def bottleneck(channels: int, stride: int) -> list[tuple[int, int, int]]:
    """Convolutions of the deep nets' block; the stride is on the middle one."""
    return [(1, 1, channels), (3, stride, channels), (1, 1, 4 * channels)]


LAYOUTS: dict[str, tuple[Callable[[int, int], list[tuple[int, int, int]]], tuple[int, ...]]] = {
    "resnet": (basic, (2, 2, 2, 2)),
    "resnet18": (basic, (2, 2, 2, 2)),
    "resnet34": (basic, (3, 4, 6, 3)),
    "resnet50": (bottleneck, (3, 4, 6, 3)),
    "resnet101": (bottleneck, (3, 4, 23, 3)),
    "resnet152": (bottleneck, (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class MerlConfig:
    """Sizes of the encoder."""

    resnet_type: str = key("resnet101", "the layout of its blocks", choices=LAYOUTS)
    width: int = key(64, "channels of the stem", limit="from 1 to 100000")
    num_leads: int = key(12, "C", limit="from 1 to 100000")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> "MerlConfig":
        """Read `encoder.config`; UserError for an unknown field or value. IGNORED_FIELDS are let pass."""
        return cls(**sizes_of(cls, "encoder.config", config, IGNORED_FIELDS))


class Merl(nnx.Module):
    """The encoder; `tokens` is N and `width` D (2048 for resnet101, 512 for resnet18, at config.width 64)."""

    def __init__(
        self,
        config: MerlConfig,
        tokens: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        convs_of, depths = LAYOUTS[config.resnet_type]
        self.tokens, self.num_leads, self.dtype = tokens, config.num_leads, jnp.dtype(dtype)
        self.conv1 = Conv(config.num_leads, config.width, 7, 2, rngs=rngs, param_dtype=param_dtype)
        self.bn1 = BatchNorm(config.width, param_dtype=param_dtype)
        channels = config.width
        for stage, depth in enumerate(depths):
            blocks = nnx.List([])
            for i in range(depth):
                convs = convs_of(config.width * 2**stage, 2 if stage > 0 and i == 0 else 1)
                blocks.append(Block(channels, convs, rngs=rngs, param_dtype=param_dtype))
                channels = convs[-1][2]
            setattr(self, f"layer{stage + 1}", blocks)
        self.stages, self.width = len(depths), channels

    def __call__(
        self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """(B, C, L) signals -> (B, N, D) float32, computed in `dtype`. Arguments and errors as `feature_map`."""
        return adaptive_average_pool(self.feature_map(signals, weights, train), self.tokens)

    def feature_map(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) signals -> (B, L/16, D) in `dtype`.

        weights: (B,) how often each signal counts in the batch statistics (0: unused slot; None: once each).
        train: normalise by the batch's statistics and move the running ones (nnx.BatchStat) towards them.
        Raises UserError where the number of leads is not the model's.
        """
        if signals.ndim != 3 or signals.shape[1] != self.num_leads:
            expected = f"(batch, {self.num_leads} leads, samples)"
            fix = "give signals of these leads, or set encoder.config.num_leads and train it so"
            raise UserError("encoder input", f"shape {signals.shape}", expected, fix)
        return self.trunk(self.conv1(signals.astype(self.dtype).transpose(0, 2, 1)), weights, train)

    def trunk(self, x: jax.Array, weights: jax.Array | None, train: bool) -> jax.Array:
        """What the first convolution gives -> the feature map; weights (B,), or (B, L/2) of each position."""
        x = jax.nn.relu(self.bn1(x, weights, train))
        for stage in range(1, self.stages + 1):
            for block in getattr(self, f"layer{stage}"):
                x = block(x, weights, train)
                weights = strided(weights, block.stride)
        return x


# Our leaf -> the published one. Modules are named alike.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def weight_rule(name: str) -> Rule:
    """The rule of our array `name`, such as layer1.0.conv1.kernel; published kernels are (Cout, Cin, K)."""
    module, _, leaf = name.rpartition(".")
    return Rule(f"resnet.{module}.{LEAVES[leaf]}", name, transpose=leaf == "kernel")


def published_name(name: str) -> str | None:
    """A checkpoint's key without wrapper prefixes; None for what is not part of this encoder."""
    name = bare_name(name)
    return None if name.startswith(IGNORED_PREFIXES) or name.endswith(IGNORED_SUFFIXES) else name
