"""A mixture of experts in the place of an MLP: a router sends each token to a few of many MLPs (arXiv:1701.06538).

As Qwen3-MoE has it: scores of all experts and their softmax in float32, the best k of them, which are divided by their
sum if `normalised`; the experts' outputs, each times its share, are added up.

Only the chosen experts compute. The pairs of a token and an expert are sorted by expert and cut into blocks, each of
one expert: a loop multiplies block after block. (But on TPUs, `jax.lax.ragged_dot` computes every expert for every
token.)

B rows, T tokens, D width, E experts, k of them for a token, I their inner width, P pairs, b pairs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.models.hints import copies, hint, weight
from elm_jax.models.layers import ACTIVATIONS, Activation, Init

BLOCK = 128  # b, of many pairs; fewer pairs have smaller blocks


@dataclass(frozen=True)
class ExpertSizes:
    """count: E. chosen: k. inner: I. normalised: whether the shares of a token add up to 1."""

    count: int
    chosen: int
    inner: int
    normalised: bool


class Kernels(nnx.Module):
    """One kernel (I, O) of each expert."""

    def __init__(
        self, shape: tuple[int, int, int], axes: tuple[str, str], init: Init, rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike,
    ) -> None:  # fmt: skip
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32).astype(param_dtype), axes=axes)

    def each(self, dtype: jax.typing.DTypeLike, rows: int) -> jax.Array:
        """(W, E, I, O), once for each of the W parts of a batch of `rows`: blocks select among them."""
        return copies(weight(self.kernel, dtype), self.kernel.axes, rows)


class Experts(nnx.Module):
    """(B, T, D) -> (B, T, D); see the module. On a mesh every device has all experts, of each a part of I."""

    def __init__(
        self, width: int, sizes: ExpertSizes, rngs: nnx.Rngs, *, activation: Activation, shrink: float,
        param_dtype: jax.typing.DTypeLike,
    ) -> None:  # fmt: skip
        self.sizes = sizes
        self.activation: Activation = activation
        count, inner = sizes.count, sizes.inner
        narrow, wide = (jax.nn.initializers.normal(std) for std in (width**-0.5, shrink * inner**-0.5))
        router = narrow(rngs.params(), (width, count), jnp.float32)
        self.router = nnx.Param(router.astype(param_dtype), axes=("embed", None))
        self.gate = Kernels((count, width, inner), ("embed", "mlp"), narrow, rngs, param_dtype)
        self.up = Kernels((count, width, inner), ("embed", "mlp"), narrow, rngs, param_dtype)
        self.down = Kernels((count, inner, width), ("mlp", "embed"), wide, rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, kernels = len(x), (self.gate, self.up, self.down)
        each = tuple(kernel.each(x.dtype, rows) for kernel in kernels)
        share, chosen = self.routed(x)
        ways = len(each[0])  # the parts of the batch: none sends its tokens to another

        def parts(x: jax.Array) -> jax.Array:
            x = x.reshape(ways, -1, x.shape[-1])
            return hint(x, "batch", None, None) if ways > 1 else x

        out = jax.vmap(self._mixed)(parts(x), parts(share.astype(x.dtype)), parts(chosen), *each)
        return hint(out.reshape(x.shape), "batch", None, None)

    def routed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (B, T, D) -> shares (B, T, k) float32 and their experts (B, T, k)."""
        scores = jnp.matmul(x.astype(jnp.float32), weight(self.router, jnp.float32), precision="highest")
        share, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self.sizes.chosen)
        return share / share.sum(-1, keepdims=True) if self.sizes.normalised else share, chosen

    def _mixed(
        self, x: jax.Array, share: jax.Array, chosen: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
    ) -> jax.Array:
        """Of tokens x (N, D), their shares and experts (N, k); kernels (E, I, O)."""
        count, k = chosen.shape
        block = min(BLOCK, max(8, 1 << (count * k // len(gate)).bit_length()))
        order, place, owner = _laid_out(chosen.reshape(-1), len(gate), block)
        # Every pair has a row of its own, so that its gradient is no sum over other rows.
        pairs = jnp.repeat(x, k, axis=0)
        laid = jnp.where(order[:, None] >= 0, pairs.at[order].get(mode="fill", fill_value=0), 0)
        inner = ACTIVATIONS[self.activation](grouped(laid, gate, owner)) * grouped(laid, up, owner)
        out = grouped(inner, down, owner)[place].reshape(count, k, -1)
        return (out * share[..., None]).sum(1)


def _laid_out(expert: jax.Array, count: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where pairs with these experts (P,) lie: in blocks of one expert each, which may have gaps at their ends.

    Returns the pair in each place, P where there is none; the place of each pair; the expert of each block.
    """
    pairs = len(expert)
    blocks = min(-(-pairs // block) + count, pairs)  # as many as there can be
    sizes = jnp.bincount(expert, length=count)
    taken = -(-sizes // block)
    last = jnp.cumsum(taken)  # blocks up to and with those of each expert
    order = jnp.argsort(expert, stable=True)
    rank = jnp.arange(pairs) - (jnp.cumsum(sizes) - sizes)[expert[order]]
    place = (last - taken)[expert[order]] * block + rank
    laid = jnp.full(blocks * block, pairs).at[place].set(order, unique_indices=True)
    owner = jnp.minimum(jnp.searchsorted(last, jnp.arange(blocks), side="right"), count - 1)
    return laid, jnp.zeros(pairs, jnp.int32).at[order].set(place, unique_indices=True), owner


@jax.custom_vjp
def grouped(x: jax.Array, kernels: jax.Array, owner: jax.Array) -> jax.Array:
    """x (blocks x b, I), of which each block is of one of the experts, `owner` (blocks,); kernels (E, I, O)."""

    def product(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, block[0] @ kernels[block[1]]

    return jax.lax.scan(product, None, (_blocks(x, owner), owner))[1].reshape(len(x), -1)


def _grouped_forward(x: jax.Array, kernels: jax.Array, owner: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return grouped(x, kernels, owner), (x, kernels, owner)


def _grouped_backward(
    inputs: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """A kernel's gradient is summed in float32, block by block and in place."""
    x, kernels, owner = inputs

    def add(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, cotangent, owner = block
        return total.at[owner].add(jnp.matmul(x.T, cotangent, preferred_element_type=jnp.float32)), None

    total = jnp.zeros(kernels.shape, jnp.float32)
    total, _ = jax.lax.scan(add, total, (_blocks(x, owner), _blocks(cotangent, owner), owner))
    back = grouped(cotangent, jnp.swapaxes(kernels, 1, 2), owner)
    return back, total.astype(kernels.dtype), np.zeros(owner.shape, jax.dtypes.float0)


grouped.defvjp(_grouped_forward, _grouped_backward)


def _blocks(x: jax.Array, owner: jax.Array) -> jax.Array:
    return x.reshape(len(owner), -1, x.shape[-1])
