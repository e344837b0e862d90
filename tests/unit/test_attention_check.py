"""The attention of a run is held against the reference path first: what is right passes, what is wrong is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import fake_config
from tiny_llms import WINDOW, tiny_config

from elm_jax.assemble import assemble
from elm_jax.errors import UserError
from elm_jax.models import attention
from elm_jax.runtime.mesh import make_mesh
from elm_jax.training import attention_check
from elm_jax.training.attention_check import BOUNDS, HEARD, Attend, Sizes, error_of, packed_row, settle

SIZES = Sizes(rows=2, tokens=64, heads=4, kv_heads=2, head_dim=16, dtype=jnp.bfloat16)
SCALE = SIZES.head_dim**-0.5
BOUND = BOUNDS["bfloat16"]
plain = attention.attend


def reference(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    return plain(q, k, v, mask, SCALE, "xla")


@jax.custom_vjp
def fused(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    """What a fused kernel rounds to its dtype: weights, their gradients, and the output that the backward pass uses."""
    return _fused_forward(q, k, v, mask)[0]


def _weights(q: Any, k: Any, mask: jax.Array) -> jax.Array:
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * SCALE
    return jax.nn.softmax(jnp.where(mask, scores, -1e9))


def _fused_forward(q: Any, k: Any, v: Any, mask: jax.Array) -> tuple[jax.Array, Any]:
    each = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("bhts,bshd->bthd", _weights(q, k, mask).astype(v.dtype), each)
    return out, (q, k, v, mask, out)


def _fused_backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, mask, out = kept
    times = q.shape[2] // k.shape[2]
    keys, values = (jnp.repeat(x, times, axis=2) for x in (k, v))
    weights = _weights(q, k, mask)
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)[..., None]
    felt = jnp.einsum("bthd,bshd->bhts", g, values, preferred_element_type=jnp.float32)
    inner = (weights * (felt - delta) * SCALE).astype(q.dtype)

    def summed(x: jax.Array) -> jax.Array:
        return x.reshape(*k.shape[:3], times, -1).sum(3).astype(k.dtype)

    dq = jnp.einsum("bhts,bshd->bthd", inner, keys)
    dk = summed(jnp.einsum("bhts,bthd->bshd", inner, q, preferred_element_type=jnp.float32))
    dv = summed(jnp.einsum("bhts,bthd->bshd", weights.astype(q.dtype), g, preferred_element_type=jnp.float32))
    return dq, dk, dv, None


fused.defvjp(_fused_forward, _fused_backward)


def causal(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    return reference(q, k, v, jnp.tril(jnp.ones_like(mask)))


def one_key_too_many(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    return reference(q, k, v, mask | jnp.roll(mask, 1, axis=-1))


def one_key_too_few(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    tokens = mask.shape[-1]
    return reference(q, k, v, mask.at[..., tokens // 10].set(jnp.eye(tokens, dtype=bool)[tokens // 10]))


def other_scale(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    return plain(q, k, v, mask, 1.1 * SCALE, "xla")


def heads_in_another_order(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    return reference(q, jnp.flip(k, 2), jnp.flip(v, 2), mask)


def no_gradient_of_keys(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    return reference(q, jax.lax.stop_gradient(k), v, mask)


def nothing_at_padding(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
    alone = mask[:, 0].sum(-1) == 1
    return jnp.where(alone[..., None, None], jnp.nan, reference(q, k, v, mask))


@pytest.mark.parametrize("attend", [reference, fused])
@pytest.mark.parametrize("window", [None, 8])
def test_rounding_passes(attend: Attend, window: int | None) -> None:
    assert 0 < error_of(attend, reference, SIZES, window) < BOUND / 2


@pytest.mark.parametrize("attend", [causal, one_key_too_many, one_key_too_few, other_scale, heads_in_another_order,
                                    no_gradient_of_keys, nothing_at_padding])  # fmt: skip
def test_what_computes_something_else_fails(attend: Attend) -> None:
    assert error_of(attend, reference, SIZES) > BOUND


@pytest.mark.parametrize("window", [None, WINDOW])
def test_blocks_of_keys_are_checked_too(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check, "BLOCK", 8)
    assert attention_check._ways(64) == (False, True) and attention_check._ways(60) == (False,)
    assert error_of(fused, reference, SIZES, window, in_blocks=True) < BOUND

    def wrong(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
        return fused(q, k, v, mask if k.shape[1] == SIZES.tokens else mask.at[..., 0].set(True))

    assert error_of(wrong, reference, SIZES, window) < BOUND < error_of(wrong, reference, SIZES, window, in_blocks=True)


def test_a_leak_too_small_to_see_in_the_outputs_is_seen() -> None:
    """A hidden token that gets a millionth of the weight."""

    def leaking(q: Any, k: Any, v: Any, mask: jax.Array) -> jax.Array:
        return (reference(q, k, v, mask).astype(jnp.float32) + 1e-6 * v.mean((1, 2), keepdims=True)).astype(q.dtype)

    assert error_of(leaking, reference, SIZES) == np.inf


def test_the_row_has_prefixes_branches_a_group_without_and_padding() -> None:
    group, branch, positions = packed_row(1, 40)
    kinds = set(zip(group[0].tolist(), branch[0].tolist(), strict=True))
    assert {(1, 0), HEARD, (2, 0), (3, 2), (0, 0)} <= kinds and group.shape == (1, 40)
    first = positions[(group == 1) & (branch == 2)]
    assert first[0] == ((group == 1) & (branch == 0)).sum()  # a branch goes on where the prefix ended


# -- what follows from it -------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Attend], None]:
    """kernel(attend): `attend` is what "cudnn" stands for, and is there."""

    def use(attend: Attend) -> None:
        def choose(q: Any, k: Any, v: Any, mask: Any, scale: float, implementation: str, softcap: Any) -> jax.Array:
            return attend(q, k, v, mask) if implementation == "cudnn" else plain(q, k, v, mask, scale, "xla", softcap)

        monkeypatch.setattr(attention, "attend", choose)
        monkeypatch.setattr(attention, "choose_attention", lambda name, *_, **__: "xla" if name == "xla" else "cudnn")

    return use


LLM = tiny_config("llama", head_dim=16)


def test_a_kernel_that_is_right_is_used_and_the_reason_says_why(kernel: Callable[[Attend], None]) -> None:
    kernel(fused)
    choice = settle("auto", "cudnn", SIZES, LLM)
    assert str(choice).startswith("attention: cudnn (checked on (2, 64, 4, 16) bfloat16: max error 0.0")
    assert choice.refused is None and choice.error is not None and 0 < choice.error < BOUND


def test_a_kernel_that_is_wrong_is_refused(kernel: Callable[[Attend], None]) -> None:
    kernel(other_scale)
    choice = settle("auto", "cudnn", SIZES, LLM)
    assert (choice.implementation, choice.refused) == ("xla", "cudnn")
    assert str(choice).startswith("attention: xla (cudnn is refused: max error ")
    with pytest.raises(UserError, match=r"llm.attention=cudnn: found .* fails its check .* set llm.attention=auto"):
        settle("cudnn", "cudnn", SIZES, LLM)


def test_a_kernel_that_cannot_run_is_refused_in_its_own_words(kernel: Callable[[Attend], None]) -> None:
    def broken(*_: Any) -> jax.Array:
        raise RuntimeError("no engine\nfor this shape")

    kernel(broken)
    assert settle("auto", "cudnn", SIZES, LLM).reason == "cudnn is refused: RuntimeError: no engine for this shape"


def test_each_window_of_the_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int | None] = []
    monkeypatch.setattr(attention_check, "error_of", lambda *args: windows.append(args[3]) or 0.0)
    settle("auto", "cudnn", SIZES, tiny_config("gemma2"))
    assert set(windows) == {WINDOW, None}


def test_the_run_takes_the_sizes_of_its_devices_and_the_reference_path_instead(
    kernel: Callable[[Attend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden": 32, "layers": 1, "heads": 8, "kv_heads": 4, "mlp": 32, "max_len": 256}
    config = fake_config(
        llm__name="demo", llm__scratch=sizes, llm__remat="none", data__max_len=100, train__batch_size=16,
        optim__accum_steps=2, elm="base_elf", encoder={"name": None}, mesh={"data": 2, "fsdp": 2, "tensor": 2},
        update=("connector", "llm"),
    )  # fmt: skip
    assembly, mesh = assemble(config), make_mesh(config.mesh)
    same, choice = attention_check.checked_attention(assembly, mesh, 16)
    assert same is assembly and str(choice) == "attention: xla (platform cpu)"
    seen: list[Sizes] = []
    monkeypatch.setattr(attention_check, "error_of", lambda *args: seen.append(args[2]) or np.inf)
    kernel(fused)
    other, choice = attention_check.checked_attention(assembly, mesh, 16)
    assert seen == [Sizes(2, 104, 4, 2, 4, jnp.dtype(jnp.bfloat16))]
    assert choice.refused == "cudnn" and other.config.llm.attention == "xla" and config.llm.attention == "auto"
    assert other.structure.leaves == assembly.structure.leaves


def test_what_one_process_finds_wrong_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that differ between processes would wait for each other for ever."""
    gathered = [["", 0.001], ["RuntimeError: no engine", None]]
    monkeypatch.setattr(attention_check, "distributed", SimpleNamespace(gather=lambda _: gathered))
    monkeypatch.setattr(attention_check, "error_of", lambda *_: 0.001)
    assert settle("auto", "cudnn", SIZES, LLM).implementation == "xla"
