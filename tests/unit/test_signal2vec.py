"""signal2vec: a vector for each id, how they are learnt, and an ELM that starts from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import nnx

from elm_jax.data.ecg_ids import PADDED, SPECIAL
from elm_jax.errors import UserError
from elm_jax.exchange.export import export
from elm_jax.models.encoders import build_encoder
from elm_jax.models.functional import structure_of
from elm_jax.runtime.mesh import make_mesh
from elm_jax.symbols.coder import EcgByte
from elm_jax.training import loop
from elm_jax.weights.encoders import load_encoder
from elm_jax.weights.safetensors import Safetensors

V, LONGEST = 6, 8
SIZES: dict[str, Any] = {"vocab_size": V + SPECIAL, "dim": 4, "max_seq_len": LONGEST}
BEGIN, END = V + 1, V + 2


def test_each_id_has_its_vector_and_padding_zeros() -> None:
    table = np.random.default_rng(0).standard_normal((V, 4), dtype=np.float32)
    ids = np.array([[BEGIN, 3, 0, 5, 3, END, PADDED, PADDED], [BEGIN, 1, END, *[PADDED] * 5]], np.int32)
    beside = {"freq": np.ones(V, np.float32), "vocab_size": np.float32(V)}
    whole = load_encoder("signal2vec", {"embeddings": table, **beside}, LONGEST, **SIZES)(ids)
    np.testing.assert_array_equal(whole[0], [*table[[3, 0, 5, 3]], *np.zeros((4, 4))])
    np.testing.assert_array_equal(whole[1], [table[1], *np.zeros((7, 4))])
    bins = load_encoder("signal2vec", {"embeddings": table}, 2, **SIZES)(ids)
    np.testing.assert_allclose(bins[0], [table[[3, 0]].mean(0), table[[5, 3]].mean(0)], rtol=1e-6)
    np.testing.assert_allclose(bins[1], [table[1], table[1]], rtol=1e-6)
    with pytest.raises(UserError, match="encoder input: found shape .*at most 8 ids.*raise encoder.config.max_seq_len"):
        load_encoder("signal2vec", {"embeddings": table}, 2, **SIZES)(np.zeros((1, 9), np.int32))
    with pytest.raises(UserError, match=r"embeddings float32\[5, 4\]"):
        load_encoder("signal2vec", {"embeddings": table[1:]}, **SIZES)


def test_ids_that_stand_together_get_near_vectors() -> None:
    """And the mean error of pairs is that of the formula where all vectors are alike: (1 + negatives) log 2."""
    sizes = {**SIZES, "pairs": 64, "window": 2, "subsample": 1.0, "min_count": 1, "max_seq_len": 32}
    rng = np.random.default_rng(1)
    structure = structure_of(lambda: build_encoder("signal2vec.pretraining", sizes, 1, nnx.Rngs(0)))
    arrays = structure.arrays(load_encoder("signal2vec.pretraining", **sizes).module)
    ids = jnp.asarray(np.stack([rng.integers(3 * (row % 2), 3 * (row % 2) + 3, 32) for row in range(8)]), jnp.int32)

    @jax.jit
    def step(arrays: Any, key: jax.Array) -> Any:
        def loss(arrays: Any) -> Any:
            model: Any = structure.bind(arrays)
            return model.pair_errors(ids, key, True).mean(), structure.arrays(model)

        (value, after), slope = jax.value_and_grad(loss, has_aux=True)(arrays)
        return value, {name: x - 2.0 * slope[name] * (name != "counts") for name, x in after.items()}

    values = []
    for number in range(60):
        value, arrays = step(arrays, jax.random.key(number))
        values.append(float(value))
    assert values[0] == pytest.approx(6 * np.log(2), rel=0.02) and values[-1] < 0.8 * values[0]
    np.testing.assert_array_equal(arrays["counts"], 60 * np.bincount(np.asarray(ids).ravel(), minlength=V))
    vectors = np.asarray(arrays["embeddings"])
    alike = vectors @ vectors.T
    assert alike[:3, :3].min() > alike[:3, 3:].max() and alike[3:, 3:].min() > alike[:3, 3:].max()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    runs.prepare(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    yield


@pytest.mark.slow  # trains three times, and exports
@pytest.mark.usefixtures("here")
def test_vectors_are_learnt_and_an_elm_reads_them(tmp_path: Path) -> None:
    EcgByte([bytes([letter]) * 2 for letter in b"abcdefghijklmnopqrstuvwxyz"]).save(tmp_path / "ecg_byte.json")
    own = {
        "encoder__name": "signal2vec", "encoder__config": {"dim": 8, "max_seq_len": 320},
        "data__representation": "symbolic", "data__ecg_tokenizer": str(tmp_path / "ecg_byte.json"),
        "data__leads": ["II", "V1"], "data__segment_len": 100, "data__sampling_rate": 10, "train__steps": 2,
        "train__save_every": 2, "data__names": ["demo:train=16,val=4,test=4"], "data__max_len": 128,
    }  # fmt: skip
    made = runs.config(tmp_path / "alone", **own, objective="signal2vec", update="encoder")
    assert loop.train(made)
    assert next(iter(runs.logged(tmp_path / "alone").values()))["loss"] == pytest.approx(6 * np.log(2), rel=0.05)
    export(made, tmp_path / "out", "latest")
    assert set(Safetensors(tmp_path / "out" / "encoder.safetensors")) == {"embeddings", "difference", "counts"}
    for update in ("connector,llm", "encoder,connector,llm"):
        elm = runs.config(
            tmp_path / update.partition(",")[0], **own, update=update, encoder__tokens=4,
            encoder__checkpoint=str(tmp_path / "out"),
        )  # fmt: skip
        assert loop.train(elm)
