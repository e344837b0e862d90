"""Gated DeltaNet (Yang et al., arXiv:2412.06464) in attention's place: it has a state of one size, and no keys to keep.

As Qwen3.5 has it. Per value head, with keys and queries of length 1 and everything in float32, a token does

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(dk)

Tokens go through it in chunks: within one, what each token adds to S is the solution of a triangular system.

A row may hold several conversations, and branches behind a shared prefix (`data.batch`). What a token follows is its
`Chains`: in a chunk they start with the state of the token before it, with that after the prefix of its group, or anew.

B rows, T tokens, N chunks of C tokens, K key heads of size dk, V value heads of size dv, D width, W taps of the
convolution, F its features: 2 K dk + V dv.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models.hints import hint, weight
from elm_jax.models.layers import Linear, RMSNorm

CHUNK = 64
_LEAST_SQUARE = 1e-6
# Of float32 on every device: the default is TF32 on NVIDIA's and bfloat16 on TPUs.
_product = partial(jnp.einsum, precision="highest")


@dataclass(frozen=True)
class DeltaSizes:
    """taps: W. A key head serves `value_heads / key_heads` value heads, which follow each other."""

    taps: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def features(self) -> int:
        """F"""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class Recurrent(NamedTuple):
    """What a layer keeps of the tokens before."""

    inputs: jax.Array  # (B, W - 1, F): the last inputs of the convolution
    state: jax.Array  # (B, V, dk, dv) float32

    @classmethod
    def empty(cls, sizes: DeltaSizes, leading: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Recurrent:
        """Before the first token; `leading` axes end with B."""
        state = (*leading, sizes.value_heads, sizes.key_dim, sizes.value_dim)
        return cls(jnp.zeros((*leading, sizes.taps - 1, sizes.features), dtype), jnp.zeros(state, jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chains:
    """What each token of a row follows.

    valid: (B, T); what is not stands for no token, and changes nothing.
    before: (B, T, W) places of the inputs of the convolution, the token's own last, in a row with W - 1 of a past
    before it; a place where there is none is -1.
    sees: (B, N, C, C) whether a token of a chunk follows another of it, or is it.
    goes_on, forks: (B, N, C) whether what a token follows goes back to the token before the chunk; to its
    group's prefix, which has ended before that.
    read: (B, N, C) which token's state is that after the prefix, if it ends in this chunk; keeps: (B, N) whether that
    of an earlier chunk holds on.
    """

    valid: jax.Array
    before: jax.Array
    sees: jax.Array
    goes_on: jax.Array
    forks: jax.Array
    read: jax.Array
    keeps: jax.Array

    @classmethod
    def of(cls, groups: jax.Array, branches: jax.Array, taps: int) -> Chains:
        """Those of packed rows: (B, T) groups (0 = padding) and branches (0 = the group's prefix)."""
        groups, branches = jnp.asarray(groups), jnp.asarray(branches)
        made = jax.vmap(partial(_of_row, taps=taps))(groups, branches)
        return cls(groups > 0, *made)

    @classmethod
    def behind_past(cls, valid: jax.Array, taps: int) -> Chains:
        """Those of rows (B, T) that go on from a past, each one conversation; after it, what is not `valid`."""
        ones = jnp.ones(valid.shape, jnp.int32)
        one = cls.of(ones, ones * 0, taps)
        tokens = jnp.arange(valid.shape[1])[:, None] + jnp.arange(taps)
        return cls(valid, jnp.broadcast_to(tokens, (*valid.shape, taps)), one.sees, one.goes_on.at[:, 0].set(True),
                   one.forks, one.read, one.keeps)  # fmt: skip


def _of_row(groups: jax.Array, branches: jax.Array, taps: int) -> tuple[jax.Array, ...]:
    """`Chains` without `valid`, of (T,) groups and branches."""
    count, index = len(groups), jnp.arange(len(groups))
    same = (groups[1:] == groups[:-1]) & (branches[1:] == branches[:-1])
    start = jax.lax.cummax(jnp.where(jnp.append(False, same), 0, index))  # of the token's own segment
    in_prefix = (branches == 0) & (groups > 0)
    # Of each token, the last token of the last prefix up to there; it is its own group's, or that has none.
    end = jax.lax.cummax(jnp.where(in_prefix, index, -1))
    end = jnp.where((end >= 0) & (groups[end] == groups), end, -1)
    back = jnp.arange(taps - 1, -1, -1)
    beyond = back - (index - start)[:, None]  # how many tokens before the segment's first
    prefix = jnp.where(branches > 0, end, -1)[:, None]
    at_prefix = prefix + 1 - beyond
    has = (prefix >= 0) & (at_prefix >= 0)
    has &= jnp.where(has, groups[jnp.maximum(at_prefix, 0)], -1) == groups[:, None]
    place = jnp.where(beyond <= 0, index[:, None] - back, jnp.where(has, at_prefix, -taps))
    before = jnp.where(place >= 0, place + taps - 1, -1)

    size = min(CHUNK, count)
    padded = [jnp.pad(x, (0, -count % size), mode="edge").reshape(-1, size) for x in (groups, branches)]
    group, branch = padded
    alike = group[:, :, None] == group[:, None, :]
    reached = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    sees = alike & reached & jnp.tril(jnp.ones((size, size), bool))
    last_group, last_branch = (jnp.append(-1, x[:-1, -1])[:, None] for x in padded)  # of the chunk before
    known = group == last_group
    goes_on = known & ((last_branch == 0) | (branch == last_branch))
    ends = group[:, -1:]  # of the group that goes on after the chunk
    mine = (branch == 0) & (group == ends)
    read = mine & (jnp.cumsum(mine, axis=1) == mine.sum(1, keepdims=True))
    keeps = ~mine.any(1) & (ends == last_group)[:, 0]
    return before, sees, goes_on, known & ~goes_on, read, keeps


class GatedDeltaNet(nnx.Module):
    """(B, T, D) -> (B, T, D); see the module.

    Projections compute in the dtype of x; the convolution, the decays and the recurrence in float32.
    """

    def __init__(
        self, width: int, sizes: DeltaSizes, norm_eps: float, rngs: nnx.Rngs, *, shrink: float,
        param_dtype: jax.typing.DTypeLike,
    ) -> None:  # fmt: skip
        self.sizes, values = sizes, sizes.value_heads
        inner, linear = values * sizes.value_dim, partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.qkv = linear(width, sizes.features, ("embed", "heads"))
        self.z = linear(width, inner, ("embed", "heads"))
        self.b = linear(width, values, ("embed", None))
        self.a = linear(width, values, ("embed", None))
        taps = jax.random.normal(rngs.params(), (sizes.features, 1, sizes.taps)) * sizes.taps**-0.5
        self.taps = nnx.Param(taps.astype(param_dtype), axes=("heads", None, None))
        rates = jax.random.uniform(rngs.params(), (values,), minval=0.01, maxval=16.0)
        self.log_rates = nnx.Param(jnp.log(rates).astype(param_dtype), axes=(None,))
        self.step_bias = nnx.Param(jnp.ones((values,), param_dtype), axes=(None,))
        self.norm = RMSNorm(sizes.value_dim, norm_eps, param_dtype)
        self.out = linear(inner, width, ("heads", "embed"), init=jax.nn.initializers.normal(shrink * inner**-0.5))

    def __call__(self, x: jax.Array, chains: Chains, past: Recurrent | None = None) -> tuple[jax.Array, Recurrent]:
        """x (B, T, D) -> (B, T, D), and what is to be kept where each row is one conversation behind `past`."""
        sizes, (rows, count) = self.sizes, x.shape[:2]
        keys, values, dk = sizes.key_heads, sizes.value_heads, sizes.key_dim
        mixed, inputs = self._convolved(self.qkv(x), chains, past)
        q, k, v = jnp.split(jax.nn.silu(mixed), (keys * dk, 2 * keys * dk), axis=-1)
        q, k = (jnp.repeat(_unit(part.reshape(rows, count, keys, dk)), values // keys, axis=2) for part in (q, k))
        g = -jnp.exp(weight(self.log_rates, jnp.float32)) * jax.nn.softplus(
            self.a(x).astype(jnp.float32) + weight(self.step_bias, jnp.float32)
        )
        beta = jax.nn.sigmoid(self.b(x).astype(jnp.float32))
        g, beta = (jnp.where(chains.valid[..., None], part, 0) for part in (g, beta))
        parts = q * dk**-0.5, k, v.reshape(rows, count, values, -1), g, beta
        q, k, v, g, beta = (hint(part, "batch", None, "heads", *(None,) * (part.ndim - 3)) for part in parts)
        out, state = delta_rule(q, k, v, g, beta, chains, None if past is None else past.state)
        gated = self.norm(out) * jax.nn.silu(self.z(x).astype(jnp.float32).reshape(out.shape))
        return self.out(gated.astype(x.dtype).reshape(rows, count, -1)), Recurrent(inputs, state)

    def _convolved(self, x: jax.Array, chains: Chains, past: Recurrent | None) -> tuple[jax.Array, jax.Array]:
        """Inputs (B, T, F) -> their convolution along the chains, float32, and the last of them (B, W - 1, F)."""
        kernel = weight(self.taps, jnp.float32)[:, 0]
        room = kernel.shape[1] - 1
        known = jnp.zeros((len(x), room, x.shape[-1]), x.dtype) if past is None else past.inputs.astype(x.dtype)
        whole = jnp.concatenate([known, x], axis=1)
        out = x.astype(jnp.float32) * kernel[:, -1]
        for tap in range(room):
            place = chains.before[..., tap, None]
            there = jnp.take_along_axis(whole.astype(jnp.float32), jnp.maximum(place, 0), axis=1)
            out += jnp.where(place >= 0, there, 0) * kernel[:, tap]
        kept = chains.valid.sum(1, dtype=jnp.int32)[:, None] + jnp.arange(room)
        return out, jnp.take_along_axis(whole, kept[..., None], axis=1)


def delta_rule(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, chains: Chains,
    state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """q, k (B,T,V,dk), v (B,T,V,dv), g and beta (B,T,V), all float32 -> outputs (B,T,V,dv), the last state (B,V,dk,dv).

    g are the logarithms of the decays, at most 0. `state`: before the first token; None: zero.
    """
    rows, count, heads = g.shape
    size = chains.sees.shape[-1]

    def chunked(x: jax.Array) -> jax.Array:
        """(B, T, V, ...) -> (B, N, V, C, ...)"""
        x = jnp.pad(x, [(0, 0), (0, -count % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, size, *x.shape[2:]), 3, 2)

    q, k, v, g, beta = (chunked(x) for x in (q, k, v, g, beta))
    sees = chains.sees[:, :, None]  # (B, N, 1, C, C)
    decay = _product("bnij,bnhj->bnhi", chains.sees.astype(g.dtype), g)  # since what the chunk starts with
    # Masked before the exponential, which would overflow.
    pairs = jnp.exp(jnp.where(sees, decay[..., :, None] - decay[..., None, :], -jnp.inf))
    starts = jnp.stack([chains.goes_on, chains.forks], axis=-1)[:, :, None].astype(g.dtype)  # (B, N, 1, C, 2)
    reach = jnp.exp(decay)[..., None] * starts
    # Keys and queries as those of both states that a chunk may start with, one after the other.
    from_k, from_q = (_flat(x[..., None, :] * reach[..., None]) for x in (k, q))
    own = beta[..., None] * _product("bnhid,bnhjd->bnhij", k, k) * pairs
    solved = _solved(own, beta[..., None] * jnp.concatenate([v, from_k], axis=-1))
    values, minus = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    within = _product("bnhid,bnhjd->bnhij", q, k) * pairs
    # After a chunk: the state of its last token, and of the last of a prefix that ends in it.
    picks = jnp.stack([jnp.arange(size) == size - 1 + jnp.zeros_like(chains.read, jnp.int32), chains.read], 2)
    picks = picks.astype(g.dtype)  # (B, N, 2, C)
    kept = _product("bnpi,bnhis->bnhps", picks, reach)  # of what the chunk has started with
    added = _product("bnpi,bnhij->bnhpj", picks, pairs)
    lasting = chains.keeps.astype(g.dtype)

    def step(states: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, minus, from_q, within, k, kept, added, lasting = chunk
        flat = states.reshape(rows, heads, -1, states.shape[-1])
        new = values - _product("bhis,bhsd->bhid", minus, flat)
        out = _product("bhis,bhsd->bhid", from_q, flat) + _product("bhij,bhjd->bhid", within, new)
        after = _product("bhps,bhskd->bhpkd", kept, states) + _product("bhpj,bhjk,bhjd->bhpkd", added, k, new)
        held = states[:, :, 1] * lasting[:, None, None, None]
        return after.at[:, :, 1].add(held), out

    first = jnp.zeros((rows, heads, k.shape[-1], v.shape[-1]), g.dtype) if state is None else state
    states = jnp.stack([first, jnp.zeros_like(first)], axis=2)  # (B, V, 2, dk, dv)
    inputs = (jnp.moveaxis(x, 1, 0) for x in (values, minus, from_q, within, k, kept, added, lasting))
    states, out = jax.lax.scan(step, states, tuple(inputs))
    out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(rows, -1, heads, v.shape[-1])  # (B, N, C, V, dv)
    return out[:, :count], states[:, :, 0]


@jax.custom_vjp
def _solved(lower: jax.Array, right: jax.Array) -> jax.Array:
    """(I + L)^-1 right (..., C, R), of the part L of `lower` (..., C, C) below the diagonal.

    By products alone, which a mesh divides as it does others: it would gather what a solver of such systems takes.
    """
    return _solved_forward(lower, right)[0]


def _solved_forward(lower: jax.Array, right: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    size = lower.shape[-1]
    index, block = jnp.arange(size), 1
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    while block < size:  # the inverses of blocks on the diagonal make those of blocks of twice their size
        pair, half = index // (2 * block), index // block
        between = (pair[:, None] == pair) & (half[:, None] > half)
        inverse -= _product("...ij,...jk,...kl->...il", inverse, jnp.where(between, lower, 0), inverse)
        block *= 2
    solved = _product("...ij,...jr->...ir", inverse, right)
    return solved, (inverse, solved)


def _solved_backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solved = kept
    right = _product("...ij,...ir->...jr", inverse, cotangent)
    return -jnp.tril(_product("...ir,...jr->...ij", right, solved), -1), right


_solved.defvjp(_solved_forward, _solved_backward)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _LEAST_SQUARE)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)
