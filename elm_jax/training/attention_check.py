"""The attention that a run is to use is held against the reference path before the run uses it.

Fused kernels are other people's compiled code, chosen by shape and by device: each process tries the one that
`choose_attention` names on its own device, at the run's own sizes, forward and backward.

B rows of a device, T tokens, H heads and K key/value heads of a device, d head size.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.assemble import Assembly, with_attention
from elm_jax.data.batch import BLOCK
from elm_jax.data.plan import LEAST_BLOCKS, token_buckets
from elm_jax.errors import UserError, one_line
from elm_jax.models import attention
from elm_jax.models.decoder import DecoderConfig
from elm_jax.runtime import distributed
from elm_jax.runtime.mesh import batch_ways

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v, mask -> (B,T,H,d)
Packed = tuple[np.ndarray, np.ndarray, np.ndarray]  # groups, branches and positions (B,T) int32 of packed rows

# Largest error allowed, of `error_of`, by dtype: about five times what the reference path itself has in that dtype.
BOUNDS = {"bfloat16": 0.02, "float16": 0.003, "float32": 1e-4}
# A packed row: (group, branch, part of the row); group 0 is padding, branch 0 a group's prefix.
LAYOUT = ((1, 0, 0.2), (1, 1, 0.1), (1, 2, 0.15), (2, 0, 0.15), (3, 0, 0.1), (3, 1, 0.1), (3, 2, 0.1), (0, 0, 0.1))
HEARD = (1, 2)  # the branch whose gradients alone may reach only what it sees


@dataclass(frozen=True)
class Sizes:
    """Of one device's part of a step's attention."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any

    def __str__(self) -> str:
        return f"{(self.rows, self.tokens, self.heads, self.head_dim)} {jnp.dtype(self.dtype).name}"


@dataclass(frozen=True)
class Choice:
    """What a run attends with, and why. `refused`: what it was to use instead, and what is wrong with that."""

    implementation: str
    reason: str
    error: float | None = None
    refused: str | None = None

    def __str__(self) -> str:
        return f"attention: {self.implementation} ({self.reason})"


def checked_attention(assembly: Assembly, mesh: Any, rows: int) -> tuple[Assembly, Choice]:
    """The assembly with an attention that computes what the reference path does on a step of so many rows, and the
    choice to log.

    Raises:
        UserError: `llm.attention` names an implementation that does not.
    """
    config, llm = assembly.config, assembly.llm
    if llm is None:
        return assembly, Choice("none", "an encoder alone")
    dtype = jnp.dtype(config.llm.compute_dtype)
    asked = config.llm.attention
    chosen = attention.choose_attention(asked, llm.head_dim, dtype, softcap=llm.attention_cap)
    if chosen == "xla":
        return assembly, Choice("xla", "asked for" if asked == "xla" else _obstacle(llm, dtype))
    tensor = mesh.shape["tensor"]
    sizes = Sizes(
        rows // config.optim.accum_steps // batch_ways(mesh), token_buckets(config.data.max_len)[-1],
        llm.heads // tensor, llm.kv_heads // tensor, llm.head_dim, dtype,
    )  # fmt: skip
    choice = settle(asked, chosen, sizes, llm)
    return (assembly if choice.implementation == chosen else with_attention(assembly, "xla")), choice


def settle(asked: str, chosen: attention.Implementation, sizes: Sizes, llm: DecoderConfig) -> Choice:
    """Try `chosen` at these sizes; all processes come to the same conclusion. Raises UserError where it was asked for
    by name and fails."""
    scale = (llm.head_dim if llm.query_scalar is None else llm.query_scalar) ** -0.5

    def attend(implementation: attention.Implementation) -> Attend:
        return lambda q, k, v, mask: attention.attend(q, k, v, mask, scale, implementation, llm.attention_cap)

    error, wrong, bound = math.inf, "", BOUNDS[jnp.dtype(sizes.dtype).name]
    try:
        error = max(
            error_of(attend(chosen), attend("xla"), sizes, window, blocks)
            for window in set(llm.windows) for blocks in _ways(sizes.tokens)
        )  # fmt: skip
    except Exception as failure:  # whatever a kernel's compiler or its driver raises
        wrong = f"{type(failure).__name__}: {one_line(str(failure))[:200]}"
    found = distributed.gather([wrong, error if math.isfinite(error) else None])
    wrong = next((one for one, _ in found if one), "")
    error = max(math.inf if one is None else one for _, one in found)
    if not wrong and error <= bound:
        return Choice(chosen, f"checked on {sizes}: max error {error:.2g} of {bound:g} allowed", error)
    wrong = wrong or f"max error {error:.2g} on {sizes}, {bound:g} allowed"
    if asked != "auto":
        raise UserError(
            f"llm.attention={asked}", f"{chosen} attention that fails its check here ({wrong})",
            "what the reference path computes", "set llm.attention=auto or xla",
        )  # fmt: skip
    return Choice("xla", f"{chosen} is refused: {wrong}", None if math.isinf(error) else error, chosen)


def _ways(tokens: int) -> tuple[bool, ...]:
    """Whether rows of so many tokens are attended to in blocks: they may be either way where they are long."""
    return (False, True) if tokens % BLOCK == 0 and tokens >= LEAST_BLOCKS * BLOCK else (False,)


def error_of(
    attend: Attend, reference: Attend, sizes: Sizes, window: int | None = None, in_blocks: bool = False,
    packed: Packed | None = None,
) -> float:  # fmt: skip
    """How far `attend` is from `reference` in float32, on random inputs and the mask of packed rows; inf where it is
    not finite, or where a gradient reaches a token through the mask. `in_blocks`: `attend` gets `attention.Blocks`.
    `packed`: the rows, whose first group must have the branch HEARD (default: `packed_row`).

    Of outputs and of the gradients of q, k and v: for each token the norm of the difference, by the token's own norm or
    the root mean square of all tokens', whichever is larger; the largest of all.
    """
    group, branch, positions = (jnp.asarray(x) for x in packed or packed_row(sizes.rows, sizes.tokens))
    mask = attention.windowed(attention.packed_mask(group, branch), positions, positions, window)
    if in_blocks:
        attend = _in_blocks(attend, group, branch, positions, window)
    q, k, v, weights = _inputs(sizes)
    heard = (group == HEARD[0]) & (branch == HEARD[1])
    alone = jnp.where(heard[..., None, None], weights, jnp.zeros((), weights.dtype))
    run = jax.jit(functools.partial(_with_gradients, attend))
    found = run(q, k, v, mask, weights)
    expected = jax.jit(functools.partial(_by_head, reference))(q, k, v, mask, weights)
    leaks = jax.jit(_largest_hidden)(run(q, k, v, mask, alone)[2:], mask, heard)
    error = max(float(e) for e in jax.tree.map(jax.jit(_largest), found, expected))
    return error if math.isfinite(error) and float(leaks) == 0 else math.inf


def _in_blocks(attend: Attend, group: Any, branch: Any, positions: Any, window: int | None) -> Attend:
    """`attend` on each block of queries and the blocks of keys that it sees."""
    rows, tokens = group.shape
    count = tokens // BLOCK
    pairs = rows, count, BLOCK, count, BLOCK  # as one program, which never holds all pairs of tokens
    seen = np.asarray(jax.jit(lambda g, b: attention.packed_mask(g, b).reshape(pairs).any((2, 4)))(group, branch))
    order = np.argsort(~seen, axis=-1, kind="stable")[..., : seen.sum(-1).max()]
    blocks = attention.Blocks(jnp.asarray(np.where(np.take_along_axis(seen, order, -1), order, -1), jnp.int32))
    mask = attention.packed_mask(group, branch, blocks)
    mask = attention.windowed(mask, blocks.queries(positions), blocks.keys(positions), window)

    def blocked(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
        return attend(blocks.queries(q), blocks.keys(k), blocks.keys(v), mask).reshape(q.shape)

    return blocked


def packed_row(rows: int, tokens: int) -> Packed:
    """Rows that have all that a packed row can have (LAYOUT)."""
    ends = np.round(np.cumsum([part for *_, part in LAYOUT]) * tokens).astype(int)
    starts = np.concatenate([[0], ends[:-1]])
    place = np.minimum(np.searchsorted(ends, np.arange(tokens), side="right"), len(LAYOUT) - 1)
    prefix = {group: ends[n] - starts[n] for n, (group, branch, _) in enumerate(LAYOUT) if branch == 0}
    before = np.array([prefix[group] if branch else 0 for group, branch, _ in LAYOUT])
    positions = np.arange(tokens) - starts[place] + before[place]
    each = np.array([g for g, *_ in LAYOUT])[place], np.array([b for _, b, _ in LAYOUT])[place], positions
    group, branch, positions = (np.broadcast_to(x, (rows, tokens)).astype(np.int32) for x in each)
    return group, branch, positions


def _inputs(sizes: Sizes) -> list[jax.Array]:
    """q, k, v and the weights of the outputs in the loss, normally distributed."""
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    keys = jax.random.split(jax.random.key(0), len(heads))
    shapes = [(sizes.rows, sizes.tokens, count, sizes.head_dim) for count in heads]
    return [jax.random.normal(key, shape, sizes.dtype) for key, shape in zip(keys, shapes, strict=True)]


def _with_gradients(attend: Attend, q: Any, k: Any, v: Any, mask: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    """The outputs, and the gradients of q, k and v."""
    out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return out, *backward(weights.astype(out.dtype))


def _by_head(attend: Attend, q: Any, k: Any, v: Any, mask: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    """`_with_gradients` in float32, one row and one key/value head at a time: it needs little memory."""
    rows, tokens, kv_heads, dim = k.shape

    def apart(x: jax.Array) -> jax.Array:  # -> (B·K, 1, T, heads of a key/value head, d)
        x = x.reshape(rows, tokens, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4)
        return x.reshape(rows * kv_heads, 1, tokens, -1, dim)

    def together(x: jax.Array) -> jax.Array:
        return x.reshape(rows, kv_heads, tokens, -1, dim).transpose(0, 2, 1, 3, 4).reshape(rows, tokens, -1, dim)

    def one(parts: Any) -> tuple[jax.Array, ...]:
        row, q, k, v, weights = parts
        q, k, v, weights = (x.astype(jnp.float32) for x in (q, k, v, weights))
        return _with_gradients(attend, q, k, v, mask[row][None], weights)

    row = jnp.repeat(jnp.arange(rows), kv_heads)
    return tuple(together(x) for x in jax.lax.map(one, (row, *(apart(x) for x in (q, k, v, weights)))))


def _largest(found: jax.Array, expected: jax.Array) -> jax.Array:
    def norms(x: jax.Array) -> jax.Array:
        return jnp.sqrt((x * x).sum(axis=(-2, -1)))

    own = norms(expected)
    scale = jnp.maximum(own, jnp.sqrt((own * own).mean()))
    return (norms(found.astype(jnp.float32) - expected) / scale).max()


def _largest_hidden(gradients: tuple[jax.Array, ...], mask: jax.Array, heard: jax.Array) -> jax.Array:
    """The largest gradient of k and v at tokens that no token of `heard` (B,T) sees."""
    seen = (mask[:, 0] & heard[:, :, None]).any(axis=1)
    return jnp.stack([jnp.where(seen[..., None, None], 0, jnp.abs(x)).max() for x in gradients]).max()


def _obstacle(llm: DecoderConfig, dtype: Any) -> str:
    """Why it is the reference path."""
    try:
        attention.choose_attention("cudnn", llm.head_dim, dtype, softcap=llm.attention_cap)
    except UserError as error:
        return error.found
    raise AssertionError("the reference path was chosen although cuDNN can run")


def tell(choice: Choice) -> None:
    """Print a choice; a refusal as a warning."""
    print(f"{'warning: ' if choice.refused else ''}{choice}", file=sys.stderr)
