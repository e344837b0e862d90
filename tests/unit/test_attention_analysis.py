"""Attention read off a decoder, and the parts of a signal that its tokens stand for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.analyze import _question
from elm_jax.errors import UserError
from elm_jax.evaluation.attention import Attention, _mean_weights, _spans
from elm_jax.evaluation.attention_picture import draw_attention
from elm_jax.models.decoder import Decoder
from elm_jax.models.families import scratch_config

T, HIDDEN = 11, 16


def test_weights_are_the_softmax_that_the_layers_use() -> None:
    config = scratch_config({"hidden": HIDDEN, "layers": 1, "heads": 4, "kv_heads": 2, "mlp": 32, "max_len": 32}, 8)
    llm = Decoder(config, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, T, HIDDEN))
    found = np.asarray(_mean_weights(llm, x))[0]
    assert found.shape == (T, T) and found.sum(1) == pytest.approx(np.ones(T), abs=1e-5)
    assert np.all(found[np.triu_indices(T, 1)] == 0), "nobody sees what comes after"
    layer = jax.tree.map(lambda leaf: leaf[0], nnx.split(llm.layers)[1])
    merged = nnx.merge(nnx.split(llm.layers)[0], layer)
    q, k, _ = merged.project(x, llm.rotary(jnp.arange(T)[None]))
    scores = np.einsum("thd,shd->hts", q[0], np.repeat(k[0], 2, axis=1)) * config.head_dim**-0.5
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert found == pytest.approx((weights / weights.sum(-1, keepdims=True)).mean(0), abs=1e-5)


def test_a_pretrained_model_is_asked_nothing_and_others_are() -> None:
    assert _question("What is it?", "sft") == "What is it?" and _question(None, "pretrain") == ""
    for asked, phase in (("What is it?", "pretrain"), (None, "sft")):
        with pytest.raises(UserError, match="--question"):
            _question(asked, phase)


def model(elm: str, encoder: str | None, **spec: Any) -> Any:
    signal = SimpleNamespace(shape=(3, 100), tokens=None, **spec)
    config = SimpleNamespace(elm=elm, encoder=SimpleNamespace(name=encoder))
    return SimpleNamespace(assembly=SimpleNamespace(signal=signal), config=config)


@pytest.mark.parametrize(
    ("elm", "encoder", "expected"),
    [
        ("mlp_llava", "merl", [[(0, 3, 0, 50)], [(0, 3, 50, 100)]]),
        ("patch_elf", None, [[(0, 3, 0, 50)], [(0, 3, 50, 100)]]),
        ("mlp_llava", "st_mem", [[(0, 1, 0, 100), (1, 2, 0, 50)], [(1, 2, 50, 100), (2, 3, 0, 100)]]),
        ("mlp_llava", "clip", [[(0, 3, 0, 100)]] * 2),
    ],
)
def test_tokens_stand_for_parts_of_the_signal(elm: str, encoder: str | None, expected: Any) -> None:
    assert _spans(model(elm, encoder), np.zeros(2, np.int32), 2) == expected


def test_symbols_stand_for_what_they_spell_lead_after_lead() -> None:
    coder = SimpleNamespace(lengths=np.array([1, 60, 90]))
    one = model("ecg_byte", None)
    one.assembly.signal.tokens = SimpleNamespace(coder=coder, llm_ids=np.array([10, 11, 12], np.int32))
    expected = [[(0, 1, 0, 90)], [(0, 1, 90, 100), (1, 2, 0, 50)], [(1, 2, 50, 51)]]
    assert _spans(one, np.array([12, 11, 10]), 3) == expected


def test_weights_are_spread_over_the_signal() -> None:
    found = Attention(["a", "e", "e", "b"], np.array([0.1, 0.6, 0.2, 0.1]), [[1, 2]],
                      [[[(0, 2, 0, 5)], [(0, 2, 5, 10)]]], 3)  # fmt: skip
    assert found.ecg_share == pytest.approx(0.8) and found.uniform_share == pytest.approx(2 / 3)
    spread = found.over_signal(0, (2, 10))
    assert np.all(spread[:, :5] == 1) and spread[:, 5:] == pytest.approx(np.full((2, 5), 1 / 3))


def test_words_that_look_like_a_formula_are_drawn_as_they_are(tmp_path: Path) -> None:
    tokens = ["$\\boxed", "{yes}$", "<signal>"]
    found = Attention(tokens, np.array([0.2, 0.3, 0.5]), [[2]], [[[(0, 1, 0, 500)]]], 1)
    draw_attention(found, 0, np.zeros((12, 500)), 50.0, (0,), "Is it $\\boxed{so}$?", tmp_path / "attention.png")
    assert (tmp_path / "attention.png").is_file()
