"""LoRA: low-rank additions to the linear layers of a decoder, y = x W + (x A) B · alpha / rank.

Which module of ours is called what in a Hugging Face model follows from the family's weight rules.
"""

from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError, nearest
from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.families import family_of, rules_of
from elm_jax.models.hints import weight
from elm_jax.models.layers import Axes, Linear
from elm_jax.models.names import Rule
from elm_jax.models.noise import dropout


@dataclass(frozen=True)
class LoraSpec:
    """The adapter of a model; its scale is alpha / rank.

    targets: "all" projections of the layers, "peft" for those that PEFT adapts in this family, or Hugging Face
    module names, comma-separated ("q_proj,v_proj"; "attn.c_proj" where a last name stands for several).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = "all"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Lora(nnx.Module):
    """(..., I) -> (..., O): (dropout(x) @ a) @ b · scale, in the dtype of x.

    a (…, I, r) is uniform within 1/√I, b (…, r, O) zero: at first the layer is as it was. `leading` are the axes
    of stacked layers, `axes` those of the layer's kernel (I, O).
    """

    def __init__(
        self,
        spec: LoraSpec,
        shape: tuple[int, int],
        axes: Axes,
        rngs: nnx.Rngs,
        *,
        leading: tuple[int, ...] = (),
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        inputs, outputs = shape
        bound = inputs**-0.5  # Kaiming's for a leaky slope of √5
        a = jax.random.uniform(rngs.params(), (*leading, inputs, spec.rank), jnp.float32, -bound, bound)
        self.a = nnx.Param(a.astype(param_dtype), axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((*leading, spec.rank, outputs), param_dtype), axes=(None, axes[1]))
        self.scale, self.rate = spec.scale, spec.dropout

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = dropout(x, self.rate) @ weight(self.a, x.dtype)
        return (inner @ weight(self.b, x.dtype)) * self.scale


def add_lora(decoder: Decoder, spec: LoraSpec, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike = jnp.float32) -> None:
    """Give the linear layers of `decoder` that `spec.targets` means a `lora`.

    Raises:
        UserError: a target that this family has not.
    """
    for path in target_modules(decoder.config, spec.targets):
        linear: Linear = reduce(getattr, path.split("."), decoder)
        *leading, inputs, outputs = linear.kernel.shape
        axes = linear.kernel.axes
        linear.lora = Lora(spec, (inputs, outputs), axes, rngs, leading=tuple(leading), param_dtype=param_dtype)


def target_modules(config: DecoderConfig, targets: str, where: str = "llm.lora.targets") -> dict[str, Rule]:
    """The modules of ours ("layers.attention.q") that `targets` means, each with the rule of its kernel.

    Experts are none: they are no linear layers, here or in Transformers.

    Raises:
        UserError: a target that this model has not; `where` names what asked for it.
    """
    family = family_of(config.model_type)
    modules = {
        rule.ours.removesuffix(".kernel"): rule
        for rule in rules_of(config)
        if rule.leading == 1 and rule.ours.endswith(".kernel")
    }
    if targets == "all":
        return modules
    asked = [t.strip() for t in (family.peft if targets == "peft" else targets).split(",")]
    names = sorted({their_module(rule).split(".")[-1] for rule in modules.values()})
    for target in asked:
        if not any(_means(target, rule) for rule in modules.values()):
            fix = nearest(target, names) or "choose among these"
            raise UserError(
                where, repr(target), f"all, peft, or linear layers of {config.model_type}: {', '.join(names)}", fix
            )
    return {path: rule for path, rule in modules.items() if any(_means(target, rule) for target in asked)}


def their_module(rule: Rule) -> str:
    """The Hugging Face module of a kernel's rule: "model.layers.{layer}.self_attn.q_proj"."""
    return rule.theirs.removesuffix(".weight")


def is_lora(name: str) -> bool:
    """Whether an array belongs to an adapter, by its name ("llm.layers.attention.q.lora.a")."""
    return ".lora." in name


def _means(target: str, rule: Rule) -> bool:
    return f".{their_module(rule)}".endswith(f".{target}")
