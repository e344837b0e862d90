"""One `attend` for every decoder, and the masks it takes.

B batch, T query tokens, S key tokens, H heads, K key/value heads, d head size; of packed rows Q blocks of b tokens and
n blocks of keys for each.
Masks are boolean, True = sees.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from elm_jax.errors import UserError
from elm_jax.models import hints

Implementation = Literal["xla", "cudnn"]
_GPU = ("gpu", "cuda")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    implementation: Implementation,
    softcap: float | None = None,
) -> jax.Array:
    """Grouped-query attention: q (B,T,H,d), k and v (B,S,K,d), mask broadcastable to (B,1,T,S) -> (B,T,H,d).

    Head h reads key/value head h // (H / K). Scores are `scale` q·k, with a `softcap` c bent to c tanh(score / c).
    The softmax is in float32. What the mask hides has weight exactly zero, and a row that sees nothing gives
    zeros ("xla") or something finite ("cudnn"). Raises UserError where "cudnn" cannot run (see `check_cudnn`).
    """
    if implementation == "cudnn":
        check_cudnn(q.shape[-1], q.dtype, hints.platform(), softcap)
        full = jnp.broadcast_to(mask, (q.shape[0], 1, q.shape[1], k.shape[1]))  # it takes no broadcast masks
        return jax.nn.dot_product_attention(q, k, v, mask=full, scale=scale, implementation="cudnn")
    return _reference(q, k, v, mask, scale, softcap)


def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
    batch, queries, heads, dim = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    weights = _weights(scores, mask[:, :, None], softcap)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)
    return out.reshape(batch, queries, heads, dim)


def attend_in_groups(
    q: jax.Array,
    prompts: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """As `attend` for one query of each of B rows, of which each A-th part, a group, has a prompt in common: what is
    known of the prompt is read once for the group.

    q (B,1,H,d); keys and values of the prompts (A,K,P,d) and (A,K,d,P), of the rows alone (B,K,N,d) and (B,K,d,N); mask
    (B,1,1,P+N) -> (B,1,H,d).
    """
    (keys, values), (own_keys, own_values) = prompts, own
    (groups, heads, places, dim), rows = keys.shape, len(q)
    q = q.reshape(rows, heads, -1, dim)
    each = q.reshape(groups, -1, *q.shape[1:])
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("agkhd,akpd->agkhp", each, keys).reshape(*q.shape[:3], places)
    scores = jnp.concatenate([scores, product("bkhd,bknd->bkhn", q, own_keys)], -1) * scale
    weights = _weights(scores, mask, softcap).astype(values.dtype)
    shared, alone = weights[..., :places].reshape(*each.shape[:4], places), weights[..., places:]
    out = product("agkhp,akdp->agkhd", shared, values).reshape(q.shape)
    out += product("bkhn,bkdn->bkhd", alone, own_values)
    return out.astype(values.dtype).reshape(rows, 1, -1, dim)


def _weights(scores: jax.Array, seen: jax.Array, softcap: float | None) -> jax.Array:
    """Scores in float32 -> how much each key weighs; of what is not seen exactly zero."""
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    return jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)


def choose_attention(
    name: str,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    platform: str | None = None,
    softcap: float | None = None,
) -> Implementation:
    """The implementation behind `llm.attention`: "auto" takes cuDNN where it runs, else the plain one.

    `platform` is that of the devices the program is for (default: this process's), `softcap` that of the model's
    scores. Raises UserError for an unknown name, or for "cudnn" where it cannot run.
    """
    where = hints.platform() if platform is None else platform
    if name == "auto":
        return "xla" if _cudnn_obstacle(head_dim, dtype, where, softcap) else "cudnn"
    if name == "cudnn":
        check_cudnn(head_dim, dtype, where, softcap)
        return "cudnn"
    if name == "xla":
        return "xla"
    raise UserError("llm.attention", f"'{name}'", "auto, xla or cudnn", "set llm.attention=auto")


def check_cudnn(
    head_dim: int, dtype: jax.typing.DTypeLike, platform: str, softcap: float | None = None
) -> None:
    """Raise UserError unless cuDNN's fused attention takes this head size, dtype and soft cap on this platform.

    Windows reach it through the mask; soft caps it does not have.
    """
    obstacle = _cudnn_obstacle(head_dim, dtype, platform, softcap)
    if obstacle:
        raise UserError(
            "llm.attention=cudnn",
            obstacle,
            "an NVIDIA GPU, bfloat16 or float16, a head size divisible by 8 up to 256, and no soft cap",
            "set llm.attention=xla, or llm.compute_dtype=bfloat16 on a GPU",
        )


def _cudnn_obstacle(
    head_dim: int, dtype: jax.typing.DTypeLike, platform: str, softcap: float | None
) -> str:
    if softcap is not None:
        return f"a model that caps its scores at {softcap:g}"
    if platform not in _GPU:
        return f"platform {platform}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"dtype {jnp.dtype(dtype).name}"
    return f"head size {head_dim}" if head_dim % 8 or head_dim > 256 else ""


def padding_mask(attention_mask: jax.Array) -> jax.Array:
    """(B, T) of 0/1, padded on either side -> causal mask (B, 1, T, T).

    Padding sees itself too, so that its rows stay finite.
    """
    valid = attention_mask.astype(bool)
    causal, itself = _triangle(valid.shape[1])
    return ((causal & valid[:, None, :]) | itself)[:, None]


@dataclass(frozen=True)
class Blocks:
    """Rows cut into blocks of queries, each beside the few blocks of keys that it may see: a batch of B·Q rows.

    So attention leaves out the pairs of blocks that the mask would hide, in whatever implementation.

    index: (B, Q, n), the blocks of keys in ascending order, then -1.
    """

    index: jax.Array

    def queries(self, x: jax.Array) -> jax.Array:
        """(B, T, ...) -> (B·Q, b, ...)."""
        return x.reshape(self.index.shape[0] * self.index.shape[1], -1, *x.shape[2:])

    def keys(self, x: jax.Array) -> jax.Array:
        """(B, T, ...) -> (B·Q, n·b, ...); what stands for no block is 0."""
        rows, queries, _ = self.index.shape
        blocks = x.reshape(rows, queries, -1, *x.shape[2:])
        # A product, whose gradient sums in float32: that of a gather would add up in the dtype of x, in any order.
        chosen = jax.nn.one_hot(self.index, queries, dtype=x.dtype)
        taken = jnp.einsum("bqns,bs...->bqn...", chosen, blocks, precision="highest", preferred_element_type=x.dtype)
        return taken.reshape(rows * queries, -1, *x.shape[2:])


def packed_mask(group_ids: jax.Array, branch_ids: jax.Array, blocks: Blocks | None = None) -> jax.Array:
    """The mask of packed rows: (B, T) groups (0 = padding) and branches (0 = prefix) -> (B, 1, T, T).

    A token sees those at or before it in its own group that belong to the prefix or to its own branch.
    Padding sees itself only. With `blocks` it is (B·Q, 1, b, n·b), and whole blocks of padding may see nothing.
    """
    slots = jnp.broadcast_to(jnp.arange(1, group_ids.shape[1] + 1), group_ids.shape)  # 0: no block
    facts = slots, group_ids, branch_ids
    query = facts if blocks is None else tuple(blocks.queries(x) for x in facts)
    key = facts if blocks is None else tuple(blocks.keys(x) for x in facts)
    (slot, group, branch), (key_slot, key_group, key_branch) = (
        tuple(x[:, :, None] for x in query), tuple(x[:, None, :] for x in key)
    )  # fmt: skip
    same_group = (group == key_group) & (group > 0)
    in_reach = (key_branch == 0) | (branch == key_branch)
    return ((same_group & in_reach & (slot >= key_slot)) | (slot == key_slot))[:, None]


def windowed(
    mask: jax.Array, queries: jax.Array, keys: jax.Array, window: int | None
) -> jax.Array:
    """`mask` (B,1,T,S) without the keys that lie `window` positions or more before the query.

    queries (B,T) and keys (B,S) are positions counted within a conversation, so that padding, packing and shared
    prefixes do not shift the window. None: the mask as it is.
    """
    if window is None:
        return mask
    return mask & (queries[:, None, :, None] - keys[:, None, None, :] < window)


def positions_from_mask(attention_mask: jax.Array) -> jax.Array:
    """(B, T) of 0/1 -> positions (B, T) int32, counted from the first real token; 0 at padding before it."""
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)


def _triangle(length: int) -> tuple[jax.Array, jax.Array]:
    index = jnp.arange(length)
    return (index[:, None] >= index)[None], (index[:, None] == index)[None]
