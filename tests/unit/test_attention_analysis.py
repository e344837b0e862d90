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
from elm_jax.config import resolve
from elm_jax.errors import UserError
from elm_jax.evaluation import attention_picture
from elm_jax.evaluation.attention import Attention, _mean_weights, _spans, _symbol_spans
from elm_jax.evaluation.attention_picture import draw_attention
from elm_jax.models.connectors import SIGNAL_KINDS, build_signal_connector
from elm_jax.models.decoder import Decoder
from elm_jax.models.encoders import ENCODERS, build_encoder
from elm_jax.models.encoders.merl import Conv
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
    q, k, *_ = merged.project(x, llm.rotary(jnp.arange(T)[None])[None])
    scores = np.einsum("thd,shd->hts", q[0], np.repeat(k[0], 2, axis=1)) * config.head_dim**-0.5
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert found == pytest.approx((weights / weights.sum(-1, keepdims=True)).mean(0), abs=1e-5)


def test_a_pretrained_model_is_asked_nothing_and_others_are() -> None:
    assert _question("What is it?", "sft") == "What is it?" and _question(None, "pretrain") == ""
    for asked, phase in (("What is it?", "pretrain"), (None, "sft")):
        with pytest.raises(UserError, match="--question"):
            _question(asked, phase)


LEADS, SAMPLES, PATCH = 3, 200, 25
SIZES = {"num_leads": LEADS, "seq_len": SAMPLES}
MAE = SIZES | {"embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
FIELDS: dict[str, dict[str, Any]] = {
    "merl": {"num_leads": LEADS, "resnet_type": "resnet18", "width": 8},
    "st_mem": MAE | {"patch_size": PATCH},
    "mtae": MAE | DECODER | {"patch_size": PATCH},
    "mlae": MAE | DECODER,
    "siglip_ecg": SIZES | TOWER | {"patch_size": PATCH},
    "merl_vit": SIZES | {"patch_size": PATCH, "width": 16, "depth": 1, "heads": 1, "mlp_dim": 16},
    "ecg_coca": SIZES | {"patch_size": PATCH, "width": 16, "layers": 1, "heads": 2},
    **dict.fromkeys(
        ("mae_vit", "nepa", "dit", "dit_text"), SIZES | {"d_model": 16, "n_heads": 2, "dim_ff": 16, "num_layers": 1}
    ),
}
IMAGES = {"clip", "clip_patches", "dinov2", "vit", "siglip", "siglip2", "mlp_mixer"}
SYMBOLS = {"next_token", "signal2vec"}


def spans_of(
    name: str | None, tokens: int, fields: Any = None, shape: tuple[int, int] = (LEADS, SAMPLES)
) -> Any:
    views = {"ecg": SimpleNamespace(some_leads=False)}
    signal = SimpleNamespace(shape=shape, length=shape[1], tokens=None, views=views)
    config = resolve({"elm": "mlp_llava" if name else "patch_elf", "encoder": {"name": name, "tokens": tokens}})
    model: Any = SimpleNamespace(assembly=SimpleNamespace(signal=signal, encoders={"ecg": fields or {}}), config=config)
    return _spans(model, np.zeros(tokens, np.int32), {})


def drawn(spans: Any) -> np.ndarray:
    """(N, C, L) bool: the samples that each token stands for."""
    inside = np.zeros((len(spans), LEADS, SAMPLES), bool)
    for token, parts in zip(inside, spans, strict=True):
        for a, b, c, d in parts:
            assert a < b and c < d and not token[a:b, c:d].any()
            token[a:b, c:d] = True
    return inside


def read(module: Any) -> np.ndarray:
    """(N, C, L) bool: the samples that each of an encoder's or connector's outputs changes with."""

    def outputs(signal: jax.Array) -> jax.Array:
        y = module(signal[None])[0]
        return y @ jax.random.normal(jax.random.key(1), y.shape[-1:])

    gradient = jax.jit(jax.jacrev(outputs))(jax.random.uniform(jax.random.key(2), (LEADS, SAMPLES)))
    return np.asarray(gradient) != 0


def without_mixing(name: str, tokens: int) -> Any:
    """The encoder with nothing that carries one position's values to another: its embeddings, then its pooling."""
    encoder: Any = build_encoder(name, FIELDS[name], tokens, nnx.Rngs(0))
    for _, part in nnx.iter_graph(encoder):
        if isinstance(part, Conv):
            side = part.kernel.shape[0] // 2
            part.kernel.set_value(jnp.zeros_like(part.kernel[...]).at[side].set(part.kernel[side]))
    for part in ("transformer", "decoder", "encoder", "layers"):
        if hasattr(encoder, part):
            setattr(encoder, part, lambda x: x)
    return encoder


# Tokens: one; that divide the positions (24 of ST-MEM, 8 of MTAE and SigLIP, 3 of MLAE, 13 of MERL), with and without
# CLS, and that do not; more than there are.
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 13, 24, 30])
@pytest.mark.parametrize("name", FIELDS)
def test_a_token_stands_for_the_samples_that_are_pooled_to_it(name: str, tokens: int) -> None:
    found, expected = drawn(spans_of(name, tokens, FIELDS[name])), read(without_mixing(name, tokens))
    if name in ("mtae", "mlae", "ecg_coca"):
        expected[~expected.any((1, 2))] = True  # CLS alone, which has no place
    if name == "merl":  # of its positions, 16 samples apart, the middles are left
        middles = np.arange(SAMPLES) % 16 == 0
        assert np.array_equal(found & middles, expected)
        ends = [(parts[0][2], parts[0][3]) for parts in spans_of(name, tokens, FIELDS[name])]
        assert all((a % 16 == 8 or a == 0) and (b % 16 == 8 or b == SAMPLES) for a, b in ends), "half way between"
    else:
        assert np.array_equal(found, expected)
    assert found.any(0).all(), "no part of the ECG is left out"


@pytest.mark.parametrize("kind", SIGNAL_KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_a_connectors_token_stands_for_the_samples_that_it_reads(kind: str, tokens: int) -> None:
    connector = build_signal_connector(kind, LEADS, SAMPLES, tokens, 16, rngs=nnx.Rngs(0))
    assert np.array_equal(drawn(spans_of(None, tokens)), read(connector))


def test_tokens_of_the_shipped_sizes_stand_where_their_patches_are() -> None:
    shape, sizes = (12, 2500), {"num_leads": 12, "seq_len": 2500}
    one = [[(0, 12, 25 * i, 25 * i + 25)] for i in range(100)]
    assert spans_of("siglip_ecg", 100, sizes, shape) == one
    leads = [[(i, i + 1, 0, 2500)] for i in range(12)]
    assert spans_of("mlae", 12, sizes, shape) == [leads[0], *(leads[i - 1] + leads[i] for i in range(1, 12))]
    assert spans_of("mlae", 13, sizes, shape) == [[(0, 12, 0, 2500)], *leads]
    threes = [leads[i] + leads[i + 1] + leads[i + 2] for i in range(0, 12, 3)]
    assert spans_of("mlae", 5, {**sizes, "patch_size": 3}, shape) == [[(0, 12, 0, 2500)], *threes]


def test_the_token_of_an_image_stands_for_all_of_it_and_every_encoder_is_known() -> None:
    assert spans_of("clip", 1) == [[(0, LEADS, 0, SAMPLES)]]
    assert {name for name, kind in ENCODERS.items() if kind.processing} == IMAGES
    signals = set(ENCODERS) - IMAGES - SYMBOLS
    alike = {"resnet18_any": "merl", "orah": "siglip_ecg"}
    assert {*FIELDS, *alike} == {name for name, kind in ENCODERS.items() if kind.pooled} == signals
    assert all(ENCODERS[name].pooled is ENCODERS[other].pooled for name, other in alike.items())


def test_the_tokens_of_a_short_ecg_stand_for_its_own_samples() -> None:
    signal = SimpleNamespace(shape=(12, 320), length=320, tokens=None, views={"ecg": SimpleNamespace(some_leads=True)})
    config = resolve({"elm": "mlp_llava", "encoder": {"name": "resnet18_any", "tokens": 2}})
    model: Any = SimpleNamespace(assembly=SimpleNamespace(signal=signal, encoders={"ecg": {}}), config=config)
    spans = _spans(model, np.zeros(2, np.int32), {"ecg": {"samples": np.int32(160)}})
    assert [parts[0][2:] for parts in spans] == [(0, 72), (72, 160)]


def test_symbols_stand_for_what_they_spell_lead_after_lead() -> None:
    coder = SimpleNamespace(lengths=np.array([1, 60, 90]))
    tokens = SimpleNamespace(coder=coder, llm_ids=np.array([10, 11, 12], np.int32))
    signal: Any = SimpleNamespace(shape=(3, 100), tokens=tokens)
    expected = [[(0, 1, 0, 90)], [(0, 1, 90, 100), (1, 2, 0, 50)], [(1, 2, 50, 51)]]
    assert _symbol_spans(signal, np.array([12, 11, 10])) == expected


def test_weights_are_spread_over_the_signal() -> None:
    found = Attention(["a", "e", "e", "b"], np.array([0.1, 0.6, 0.2, 0.1]), [[1, 2]],
                      [[[(0, 2, 0, 5)], [(0, 2, 5, 10)]]], 3)  # fmt: skip
    assert found.ecg_share == pytest.approx(0.8) and found.uniform_share == pytest.approx(2 / 3)
    spread = found.over_signal(0, (2, 10))
    assert np.all(spread[:, :5] == 1) and spread[:, 5:] == pytest.approx(np.full((2, 5), 1 / 3))


def test_overlapping_tokens_share_their_samples() -> None:
    edges = [(0, 312), (296, 632), (616, 952), (936, 1250)]
    spans = [[(0, 2, a, b)] for a, b in edges]
    even = Attention(list("abcd"), np.full(4, 0.2), [[0, 1, 2, 3]], [spans], 4)
    assert even.over_signal(0, (2, 1250)) == pytest.approx(np.ones((2, 1250))), "equal weights are the same everywhere"
    one = Attention(list("abcd"), np.array([0.0, 0.4, 0.2, 0.0]), [[0, 1, 2, 3]], [spans], 4)
    spread = one.over_signal(0, (2, 1250))[0]
    assert spread[[100, 300, 400, 620, 700, 940, 1000]] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])


def test_the_picture_has_seconds_and_a_colour_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(attention_picture, "FigureCanvasAgg", lambda figure: drawn.append(figure))
    found = Attention(["a", "<signal>"], np.array([0.4, 0.6]), [[1]], [[[(0, 12, 0, 500)]]], 1)
    draw_attention(found, 0, np.zeros((12, 500)), 50.0, tuple(range(12)), "Why?", tmp_path / "attention.png")
    labels = [ax.get_xlabel() for ax in drawn[0].axes]
    assert labels.count("time in s") == 2, "under each column"
    (bar,) = (ax for ax in drawn[0].axes if ax.get_ylabel().startswith("attention"))
    assert bar.get_ylim() == (0, 1)


def test_words_that_look_like_a_formula_are_drawn_as_they_are(tmp_path: Path) -> None:
    tokens = ["$\\boxed", "{yes}$", "<signal>"]
    found = Attention(tokens, np.array([0.2, 0.3, 0.5]), [[2]], [[[(0, 1, 0, 500)]]], 1)
    draw_attention(found, 0, np.zeros((12, 500)), 50.0, (0,), "Is it $\\boxed{so}$?", tmp_path / "attention.png")
    assert (tmp_path / "attention.png").is_file()
