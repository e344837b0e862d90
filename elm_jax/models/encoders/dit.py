"""A diffusion transformer that generates ECGs, each sample of all leads a token (trans_continuous_dit of
ECG-Neural-Networks). Sources: DiT, arXiv 2212.09748; rectified flow, 2209.03003; DDPM, 2006.11239; classifier-free
guidance, 2207.12598.

Time runs from noise to signal in the rectified flow (0 to 1), from signal to noise in DDPM (0 to 1, in `num_steps`).
B signals, C leads that are generated, L samples, D width, N signal tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.models.encoders.mae import XAVIER, token
from elm_jax.models.encoders.sequence import BlockConfig, Layers, OfBlocks
from elm_jax.models.encoders.text_tower import BERT, Paired, TextConfig, TextTower
from elm_jax.models.encoders.transformer import Attention, Mlp, TransformerConfig
from elm_jax.models.hints import weight
from elm_jax.models.layers import Held, Linear, plus
from elm_jax.models.names import Rule, bare_name
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.models.remat import rematerialised
from elm_jax.schema import key

INDEPENDENT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")  # leads of which the others are sums
ZEROS = jax.nn.initializers.zeros
NORM_EPS = 1e-5


@dataclass(frozen=True)
class DitConfig(BlockConfig):
    """Sizes, and what is generated of what; the published program's are the default."""

    num_layers: int = key(12, "blocks", limit="at least 1")
    num_leads: int = key(12, "leads of a signal", limit="at least 1")
    seq_len: int = key(2500, "L", limit="at least 1")
    loss_type: str = key("rectified_flow", "what is learnt", choices=("rectified_flow", "ddpm"))
    num_steps: int | None = key(None, "steps of generating; None is 50, or with ddpm 1000", limit="at least 1")
    beta_start: float = key(1e-4, "of ddpm: the variance of its first step", limit="above 0")
    beta_end: float = key(0.02, "of ddpm: that of its last step", limit="above 0")
    condition: str | None = key(
        None, "what is generated for: a record's label, or one lead, to which the others are made; of dit_text a text",
        choices=("label", "lead", "text"),
    )  # fmt: skip
    condition_lead: str = key("I", "that lead", choices=INDEPENDENT)
    num_label_classes: int = key(2, "labels, from 0 on", limit="at least 1")
    condition_dropout: float = key(0.1, "part of the conditions left out in training", limit="from 0 to 1")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> Self:
        found = super().from_fields(config)
        if found.condition == "lead" and found.num_leads != len(LEADS):
            raise UserError("data.leads", str(found.num_leads), "all 12 with condition=lead", "leave data.leads out")
        return found

    @classmethod
    def of_text(cls, config: Mapping[str, Any]) -> Self:
        """As `from_fields`, where the condition is a text. UserError for another."""
        if (told := config.get("condition") or "text") != "text":
            expected, fix = "text with encoder.name=dit_text", "set --config.encoder.name=dit"
            raise UserError("encoder.config.condition", str(told), expected, fix)
        return cls.from_fields({**config, "condition": "text"})

    @property
    def steps(self) -> int:
        return self.num_steps or (1000 if self.loss_type == "ddpm" else 50)

    @property
    def generated(self) -> tuple[int, ...]:
        """The leads that are generated, by their place in the signal."""
        if self.condition != "lead":
            return tuple(range(self.num_leads))
        return tuple(LEADS.index(lead) for lead in INDEPENDENT if lead != self.condition_lead)

    @property
    def block(self) -> TransformerConfig:
        return self.blocks(self.num_layers)


class Noised(NamedTuple):
    """A signal between itself and noise (B, L, C), when that is (B,), and what is predicted of it (B, L, C)."""

    signal: jax.Array
    time: jax.Array
    target: jax.Array


class DitBlock(nnx.Module):
    """x + gate · attention(norm), then x + gate · mlp(norm), each norm shifted and scaled by time and condition."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        self.attention, self.mlp = Attention(config, rngs, param_dtype), Mlp(config, rngs, param_dtype)
        self.modulation = Linear(
            config.width, 6 * config.width, ("signal", None), rngs, bias=True, init=ZEROS, param_dtype=param_dtype
        )

    def __call__(self, x: jax.Array, state: jax.Array, mask: jax.Array) -> jax.Array:
        shift, scale, gate, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(state))[:, None], 6, axis=-1)
        x = x + gate * self.attention(normed(x) * (1 + scale) + shift, mask)
        return x + gate2 * self.mlp(normed(x) * (1 + scale2) + shift2)


def normed(x: jax.Array) -> jax.Array:
    """LayerNorm without parameters, in float32, returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


def embedded_time(time: jax.Array, width: int) -> jax.Array:
    """(B,) -> (B, width) float32: cosines, then sines, of periods from 2π to 20000π."""
    half = width // 2
    angles = time.astype(jnp.float32)[:, None] * jnp.exp(-np.log(10000.0) * jnp.arange(half) / half)
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1), ((0, 0), (0, width % 2)))


class Dit(OfBlocks):
    """`width` is D. A condition is a label (B,), or signals (B, 12, L) of which one lead is it; with the tower of
    `DitText` the ids (B, T) of a text."""

    config: DitConfig

    def make(self, config: DitConfig, rngs: nnx.Rngs, param_dtype: Any, linear: Layers) -> None:
        width, leads = self.width, len(config.generated)
        self.signal = linear(leads, width, (None, "embed"))
        self.position = token(rngs, param_dtype, config.seq_len, width)
        self.time_in = linear(width, 4 * width, ("signal", "mlp"))
        self.time_out = linear(4 * width, width, ("mlp", "signal"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(block_rngs: nnx.Rngs) -> DitBlock:
            return DitBlock(config.block, block_rngs, param_dtype)

        self.blocks = stacked(rngs)
        self.modulation = linear(width, 2 * width, ("signal", None), init=ZEROS)
        self.head = linear(width, leads, ("embed", None), init=ZEROS)
        if config.condition is not None:
            self.null = nnx.Param(jnp.zeros(width, param_dtype), axes=(None,))
        if config.condition == "label":
            self.label = token(rngs, param_dtype, config.num_label_classes, width)
        elif config.condition == "lead":
            self.lead = linear(1, width, (None, "embed"))
            self.lead_position = token(rngs, param_dtype, config.seq_len, width)
        if config.loss_type == "ddpm":
            betas = np.linspace(config.beta_start, config.beta_end, config.steps, dtype=np.float32)
            held = partial(Held, axes=(None,))
            self.betas, self.alphas = held(jnp.asarray(betas)), held(jnp.asarray(1 - betas))
            self.alphas_cumprod = held(jnp.asarray(np.cumprod(1 - betas)))

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, leads, L) -> (B, N, D) float32: N bins of time of what the blocks make of a signal without noise, for no
        condition. weights, train: without effect."""
        return adaptive_average_pool(self.clean_features(self.of(signals)), self.tokens)

    def clean_features(self, x: jax.Array) -> jax.Array:
        """(B, L, C) without noise -> (B, L, D), for no condition."""
        time = jnp.full(len(x), 0.0 if self.config.loss_type == "ddpm" else 1.0)
        return self.features(x, time, self.nothing(len(x)))

    def of(self, signals: jax.Array) -> jax.Array:
        """What is generated of signals (B, leads, L): (B, L, C)."""
        if signals.ndim != 3 or signals.shape[1:] != (self.config.num_leads, self.config.seq_len):
            expected = f"(batch, {self.config.num_leads} leads, {self.config.seq_len} samples)"
            raise UserError("encoder input", f"shape {signals.shape}", expected, "set num_leads and seq_len so")
        return signals[:, jnp.array(self.config.generated)].swapaxes(1, 2)

    def nothing(self, count: int) -> jax.Array | None:
        """The embedding of no condition; None where there never is one."""
        if self.config.condition is None:
            return None
        return jnp.broadcast_to(weight(self.null, jnp.float32), (count, self.width))

    def conditions(self, given: Any) -> jax.Array:
        """The embedding (B, D) float32 of conditions."""
        if self.config.condition == "label":
            return weight(self.label, jnp.float32)[given]
        lead = given[:, LEADS.index(self.config.condition_lead), :, None].astype(self.dtype)
        return plus(self.lead(lead), self.lead_position).astype(jnp.float32).mean(1)

    def _state(self, time: jax.Array, condition: jax.Array | None) -> jax.Array:
        """(B, D), by which the norms are shifted and scaled."""
        state = self.time_out(jax.nn.silu(self.time_in(embedded_time(time, self.width).astype(self.dtype))))
        return state if condition is None else state + condition.astype(state.dtype)

    def features(
        self, x: jax.Array, time: jax.Array, condition: jax.Array | None = None, valid: jax.Array | None = None
    ) -> jax.Array:
        """(B, L, C) at times (B,) -> (B, L, D) behind the blocks and a norm; `valid` (B, L) places are seen."""
        state = self._state(time, condition)
        return self._blocks(x, state, valid)

    def _blocks(self, x: jax.Array, state: jax.Array, valid: jax.Array | None) -> jax.Array:
        mask = jnp.ones((1, 1, 1, 1), bool) if valid is None else valid[:, None, None, :]
        graph, blocks = nnx.split(self.blocks)
        run = rematerialised(lambda block, x: nnx.merge(graph, block)(x, state, mask), "full")
        x = plus(self.signal(x.astype(self.dtype)), self.position)
        return normed(jax.lax.scan(lambda x, block: (run(block, x), None), x, blocks)[0])

    def predict(
        self, x: jax.Array, time: jax.Array, condition: jax.Array | None = None, valid: jax.Array | None = None
    ) -> jax.Array:
        """As `features`, -> (B, L, C) float32: the flow, or with ddpm the noise."""
        state = self._state(time, condition)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(state))[:, None], 2, axis=-1)
        return self.head(self._blocks(x, state, valid) * (1 + scale) + shift).astype(jnp.float32)

    def guided(self, x: jax.Array, time: jax.Array, condition: jax.Array | None, guidance: float) -> jax.Array:
        """`predict`, led away from what it would be without the condition: guidance 1 is with it, 0 without."""
        without = self.nothing(len(x))
        if condition is None or guidance == 1.0:
            return self.predict(x, time, without if condition is None else condition)
        free = self.predict(x, time, without)
        return free + guidance * (self.predict(x, time, condition) - free)

    def noised(self, x: jax.Array, noise: jax.Array, time: jax.Array) -> Noised:
        """Signals (B, L, C) at a time (B,): from 0 to 1, or with ddpm the number of a step."""
        at = time[:, None, None]
        if self.config.loss_type == "ddpm":
            kept = weight(self.alphas_cumprod, jnp.float32)[at]
            return Noised(jnp.sqrt(kept) * x + jnp.sqrt(1 - kept) * noise, time / self.config.steps, noise)
        return Noised((1 - at) * noise + at * x, time, x - noise)

    def times(self, key: jax.Array, count: int) -> jax.Array:
        """(B,) as `noised` takes them, drawn evenly."""
        if self.config.loss_type == "ddpm":
            return jax.random.randint(key, (count,), 0, self.config.steps)
        return jax.random.uniform(key, (count,))

    def clean(self, x: jax.Array, time: jax.Array, predicted: jax.Array) -> jax.Array:
        """What of signals at a time, as `noised` takes it, and of what is predicted of them the signal is."""
        at = time[:, None, None]
        if self.config.loss_type == "ddpm":
            kept = weight(self.alphas_cumprod, jnp.float32)[at]
            return (x - jnp.sqrt(1 - kept) * predicted) / jnp.sqrt(kept)
        return x + (1 - at) * predicted

    def rebuild_from(
        self, x: jax.Array, noise: jax.Array, level: float, condition: jax.Array | None = None, guidance: float = 1.0
    ) -> jax.Array:
        """Signals (B, L, C) with noise, at a time from 0 to 1, and rebuilt from that in one step."""
        whole = jnp.full(len(x), level)
        time = (whole * self.config.steps).astype(jnp.int32) if self.config.loss_type == "ddpm" else whole
        there = self.noised(x, noise, time)
        return self.clean(there.signal, time, self.guided(there.signal, there.time, condition, guidance))

    def generate(
        self, start: jax.Array, key: jax.Array, condition: jax.Array | None = None, guidance: float = 1.0,
        steps: int | None = None, noise: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Noise (B, L, C) -> signals (B, L, C), in `steps` of the flow (None: the config's), or in all of ddpm's.

        noise: (steps - 1, B, L, C), of ddpm's steps in their order, in place of what is drawn from `key`.
        """
        if self.config.loss_type == "ddpm":
            return self._denoised(start, key, condition, guidance, noise)
        steps = steps or self.config.steps

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            return x + self.guided(x, jnp.full(len(x), (i + 0.5) / steps), condition, guidance) / steps

        return jax.lax.fori_loop(0, steps, step, start)

    def _denoised(
        self, x: jax.Array, key: jax.Array, condition: jax.Array | None, guidance: float, noise: jax.Array | None
    ) -> jax.Array:
        beta, alpha, kept = (weight(a, jnp.float32) for a in (self.betas, self.alphas, self.alphas_cumprod))
        before, steps = jnp.concatenate([jnp.ones(1), kept[:-1]]), self.config.steps

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            at = steps - 1 - i
            time = jnp.full(len(x), at)
            predicted = self.guided(x, time / steps, condition, guidance)
            signal = jnp.clip(self.clean(x, time, predicted), 0.0, 1.0)
            mean = jnp.sqrt(before[at]) * beta[at] * signal + jnp.sqrt(alpha[at]) * (1 - before[at]) * x
            spread = jnp.sqrt(beta[at] * (1 - before[at]) / (1 - kept[at]))
            drawn = jax.random.normal(jax.random.fold_in(key, at), x.shape) if noise is None else noise[i]
            return mean / (1 - kept[at]) + jnp.where(at > 0, spread, 0.0) * drawn

        return jax.lax.fori_loop(0, steps, step, x)


class DitText(Dit):
    """The condition is a text, as the mean of what a frozen tower makes of its tokens."""

    def __init__(
        self, sizes: tuple[DitConfig, TextConfig], tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        config, text = sizes
        super().__init__(config, tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.text = TextTower(text, rngs=rngs, dtype=dtype, param_dtype=param_dtype, pool="mean")
        self.text_in = Linear(
            self.text.width, self.width, (None, "embed"), rngs, bias=True, init=XAVIER, param_dtype=param_dtype
        )

    def conditions(self, given: Any) -> jax.Array:
        return self.of_texts(self.text(given))

    def of_texts(self, pooled: jax.Array) -> jax.Array:
        """What a tower makes of texts (B, W) -> (B, D) float32."""
        return self.text_in(pooled.astype(self.dtype)).astype(jnp.float32)


def dit_errors(
    model: Dit, signals: jax.Array, given: Any, key: jax.Array, train: bool, drawn: tuple[jax.Array, ...] | None = None
) -> jax.Array:
    """(B,) float32: the mean squared error of what is predicted of signals (B, leads, L) at times and with noise from
    `key`; in training some conditions are left out. drawn: noise, times and what these are chosen by (B,) instead."""
    x, keys = model.of(signals).astype(jnp.float32), jax.random.split(key, 3)
    noise, times, chosen = drawn or (
        jax.random.normal(keys[0], x.shape), model.times(keys[1], len(x)), jax.random.uniform(keys[2], (len(x),))
    )  # fmt: skip
    there, condition = model.noised(x, noise, times), None
    if model.config.condition is not None:
        condition = model.conditions(given)
        if train:
            left_out = (chosen < model.config.condition_dropout)[:, None]
            condition = jnp.where(left_out, cast(jax.Array, model.nothing(len(x))), condition)
    return ((model.predict(there.signal, there.time, condition) - there.target) ** 2).mean((1, 2))


def without_text(name: str) -> str | None:
    """A checkpoint's name as the rules have it; None for what only embeds texts."""
    return None if bare_name(name).startswith("condition_embedder.") else bare_name(name)


PAIRED = Paired(BERT, "condition_embedder.text_feature_extractor.", frozen=-1, pool="mean")
_MODULES = {
    "signal": "input_proj", "time_in": "time_mlp.0", "time_out": "time_mlp.2", "modulation": "final_adaLN.1",
    "head": "output_proj", "lead": "condition_embedder.proj", "text_in": "condition_embedder.proj",
    "blocks.attention.o": "layers.{layer}.self_attn.out_proj", "blocks.mlp.fc1": "layers.{layer}.ff.0",
    "blocks.mlp.fc2": "layers.{layer}.ff.2", "blocks.modulation": "layers.{layer}.adaLN_modulation.1",
}  # fmt: skip
_ARRAYS = {
    "position": "pos_emb.weight", "null": "null_cond_emb", "label": "condition_embedder.emb.weight",
    "lead_position": "condition_embedder.pos_emb.weight", "betas": "betas", "alphas": "alphas",
    "alphas_cumprod": "alphas_cumprod",
}  # fmt: skip


@PAIRED.with_rule
def weight_rule(name: str) -> Rule:
    """The rule of our array `name`, such as blocks.mlp.fc1.kernel."""
    if name in _ARRAYS:
        return Rule(_ARRAYS[name], name)
    module, _, leaf = name.rpartition(".")
    theirs = {"kernel": "weight", "bias": "bias"}[leaf]
    if module == "blocks.attention.qkv":
        return Rule(f"layers.{{layer}}.self_attn.in_proj_{theirs}", name, leaf == "kernel")
    return Rule(f"{_MODULES[module]}.{theirs}", name, leaf == "kernel")
