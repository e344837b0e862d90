"""The ResNet-18 for any leads and lengths: what is absent changes nothing, and a mixed batch trains in one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from texts import write_records

from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import LEADS, in_slots, read_ecg
from elm_jax.errors import UserError
from elm_jax.exchange.export import export
from elm_jax.inference.session import read_input
from elm_jax.keys import DataConfig
from elm_jax.models.encoders import build_encoder, merl
from elm_jax.models.functional import structure_of
from elm_jax.runtime.mesh import make_mesh
from elm_jax.training import loop
from elm_jax.weights.encoders import load_encoder, to_published

RATE, SECONDS, WIDTH = 50, 10, 4
SOME = (("I",), ("I", "II", "V1"), LEADS)  # in a batch, of 5 and of 10 s
CASES = [(names, seconds) for names in SOME for seconds in (5, 10)]


def ecg(rng: np.random.Generator, names: tuple[str, ...], seconds: int) -> dict[str, np.ndarray]:
    signal = rng.standard_normal((len(names), seconds * RATE), dtype=np.float32)
    return in_slots(signal, names, LEADS, SECONDS * RATE)


def stacked(ecgs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([each[name] for each in ecgs]) for name in ecgs[0]}


def shuffled(rng: np.random.Generator, ecgs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same leads in other rows, with anything where nothing is."""
    signal, leads, samples = (ecgs[name].copy() for name in ("signal", "leads", "samples"))
    signal[leads == 0] = np.nan
    for own, end, named in zip(signal, samples, leads, strict=True):
        own[:, end:] = 1e9
        order = rng.permutation(len(own))
        own[:], named[:] = own[order], named[order]
    return {"signal": signal, "leads": leads, "samples": samples}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """A layout of two blocks, with a stride, which compiles in a fraction of the time of eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(merl.LAYOUTS, "small", (merl.basic, (1, 1)))
        yield


SIZES: dict[str, Any] = {"resnet_type": "small", "width": WIDTH}


@pytest.fixture(scope="module")
def drawn(small: None) -> tuple[Any, dict[str, jax.Array]]:
    """The encoder with arrays that are none of them as they begin."""
    structure = structure_of(lambda: build_encoder("resnet18_any", SIZES, 2, nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    arrays = {name: 0.3 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in structure.leaves.items()}
    return structure, {n: jnp.asarray(abs(a) + 0.5 if n.endswith(("var", "scale")) else a) for n, a in arrays.items()}


def run(drawn: Any, signals: Any, weights: Any = None, train: bool = True) -> tuple[Any, dict[str, Any]]:
    """Embeddings, and the arrays afterwards."""
    structure, arrays = drawn

    @jax.jit
    def go(arrays: Any, signals: Any, weights: Any) -> Any:
        encoder = structure.bind(arrays)
        return encoder(signals, weights, train=train), structure.arrays(encoder)

    return go(arrays, signals, weights)


def same(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * float(np.abs(other).max()))


def test_what_is_absent_changes_nothing(drawn: Any) -> None:
    """Neither where its rows are, nor what lies in them or beyond an end, nor how far the batch is padded; in training
    too, where statistics are those of the samples that are there."""
    rng = np.random.default_rng(0)
    batch = stacked([ecg(rng, *case) for case in CASES])
    expected = run(drawn, batch)
    assert np.isfinite(expected[0]).all() and expected[0].shape == (len(CASES), 2, 2 * WIDTH)
    same(run(drawn, shuffled(rng, batch)), expected, 1e-6)
    longer = {**batch, "signal": np.pad(batch["signal"], ((0, 0), (0, 0), (0, 37)))}
    same(run(drawn, longer), expected)
    used = np.concatenate([np.full(len(CASES), 2.0), [0]]).astype(np.float32)
    unused = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), batch)
    found = run(drawn, unused, jnp.asarray(used))
    same(found[0][:-1], expected[0])


def test_a_signal_is_encoded_as_alone_at_its_own_length(drawn: Any) -> None:
    rng = np.random.default_rng(2)
    ecgs = [ecg(rng, *case) for case in CASES]
    together = run(drawn, stacked(ecgs), train=False)[0]
    for place in (0, 2, 4):  # of 5 s
        own = {**ecgs[place], "signal": ecgs[place]["signal"][:, : 5 * RATE]}
        same(run(drawn, stacked([own]), train=False)[0][0], together[place])
    other = {**ecgs[0], "leads": np.where(ecgs[0]["leads"] == 1, 2, ecgs[0]["leads"])}
    assert np.abs(run(drawn, stacked([other]), train=False)[0][0] - together[0]).max() > 1e-3  # II is not I


def test_as_merl_where_all_leads_are_there() -> None:
    signals = np.random.default_rng(3).standard_normal((2, 12, 130), dtype=np.float32)
    theirs = load_encoder("merl", **SIZES)
    arrays = structure_of(lambda: theirs.module).arrays(theirs.module)
    ours = load_encoder("resnet18_any", to_published("merl", arrays), **SIZES)
    same(ours(signals), theirs(signals), 1e-5)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
def test_on_a_mesh(drawn: Any) -> None:
    batch = stacked([ecg(np.random.default_rng(4), *case) for case in CASES])
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    same(run(drawn, jax.device_put(batch, sharding)), run(drawn, batch))


def test_leads_that_are_not_there() -> None:
    signal = np.ones((2, 50), np.float32)
    for names in (("I", "V9"), ("I", "I"), ("I",)):
        with pytest.raises(UserError, match="leads: found 2 rows for I.*a row for each, of I, II"):
            in_slots(signal, names, LEADS, 50)
    encoder = load_encoder("resnet18_any", **SIZES)
    for leads in ([[1, 13]], [[2, 2]]):
        with pytest.raises(UserError, match=r"encoder input leads, signal 0: found \[.*each of 1 to 12 once at most"):
            encoder({"signal": signal[None], "leads": np.array(leads), "samples": np.array([50])})
    with pytest.raises(UserError, match="found shape .1, 2, 50.*12 leads.*give signal, leads, samples"):
        encoder(signal[None])
    with pytest.raises(UserError, match="found leads, signal; expected signal and leads and samples"):
        encoder({"signal": signal[None], "leads": np.array([[1, 2]])})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of the cases, and a question about each."""
    folder, rng = tmp_path_factory.mktemp("some"), np.random.default_rng(5)
    for place, (names, seconds) in enumerate(CASES):
        signal = rng.standard_normal((len(names), 2 * RATE * seconds), dtype=np.float32)
        np.save(folder / f"ecg_{place}.npy", np.array({"ecg": signal, "leads": names, "target_sf": 2 * RATE}))
    turns = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
    write_records(folder, [turns] * len(CASES), [f"ecg_{place}.npy" for place in range(len(CASES))])
    return folder


def test_a_recording_says_which_leads_it_has_and_how_long_it_is(folder: Path) -> None:
    data = DataConfig(root=str(folder), sampling_rate=RATE, segment_len=SECONDS * RATE)
    whole = signal_spec(data, 0)
    spec = replace(whole, some_leads=True)
    for place, (names, seconds) in enumerate(CASES):
        found = spec.load(f"ecg_{place}.npy", 0)
        assert isinstance(found, dict)
        assert found["leads"].tolist() == [1 + LEADS.index(lead) if lead in names else 0 for lead in LEADS]
        assert found["samples"] == seconds * RATE and not found["signal"][:, seconds * RATE :].any()
        assert found["signal"][found["leads"] > 0].max() == pytest.approx(1, abs=1e-4)
        assert spec.load_raw(f"ecg_{place}.npy", 0).shape == (12, SECONDS * RATE)
    assert "I, II, V1 alone" in read_input(str(folder / "ecg_2.npy"), spec).summary
    assert read_ecg(folder / "ecg_2.npy", some_leads=True).leads == ("I", "II", "V1")
    retrieving: Any = object()  # by features of twelve leads
    for needs_all in (whole, replace(spec, retrieval=retrieving), replace(spec, further={"other": whole})):
        with pytest.raises(UserError, match="ecg_2.npy: found no lead III, aVR.*expected all twelve standard leads"):
            needs_all.load("ecg_2.npy", 0)
    two = replace(spec, leads=(1, 6))
    assert dict(two.load("ecg_2.npy", 0))["leads"].tolist() == [2, 7]
    with pytest.raises(UserError, match="ecg_0.npy: found leads I; expected one of II, V1"):
        two.load("ecg_0.npy", 0)
    np.save(folder / "other.npy", np.array({"ecg": np.ones((1, 99)), "leads": ["V9"], "target_sf": RATE}))
    with pytest.raises(UserError, match="no lead I, .* among V9; expected one of the twelve standard leads"):
        spec.load("other.npy", 0)
    np.save(folder / "short.npy", np.array({"ecg": np.ones((1, 49)), "leads": ["I"], "target_sf": RATE}))
    with pytest.raises(UserError, match="short.npy: found 49 samples at 50 Hz; expected at least 50"):
        spec.load("short.npy", 0)


@pytest.mark.slow
def test_leads_and_lengths_of_all_kinds_train_in_one_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the encoder and without, from its exported file; then, too, its outputs are kept."""
    runs.prepare(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh(runs.config(tmp_path).mesh, jax.devices()[:1]))
    usual = {
        "data__names": ["records.jsonl"], "data__root": str(folder), "data__val_fraction": 0.0, "train__steps": 2,
        "encoder__name": "resnet18_any", "encoder__config": {"resnet_type": "tiny", "width": 8}, "encoder__tokens": 2,
        "data__sampling_rate": RATE, "data__segment_len": SECONDS * RATE, "data__max_len": 256,
    }  # fmt: skip
    config = runs.config(tmp_path / "all", **usual, update="encoder,connector,llm")
    assert loop.train(config)
    lines = runs.logged(tmp_path / "all")
    assert [line["recordings"] for line in lines.values()] == [len(CASES)] * 2
    assert all(np.isfinite(line["loss"]) for line in lines.values())
    export(config, tmp_path / "out")
    frozen = runs.config(
        tmp_path / "frozen", **usual, update="connector,llm", encoder__checkpoint=str(tmp_path / "out"),
        encoder__cache=True,
    )  # fmt: skip
    assert loop.train(frozen)
    assert all(np.isfinite(line["loss"]) for line in runs.logged(tmp_path / "frozen").values())
