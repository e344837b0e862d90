"""A model with two encoders: the signal's and an image's, in one ECG's places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import nnx

from elm_jax import cli
from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config, resolve, to_dict
from elm_jax.data.batch import BatchShape, Group, collate
from elm_jax.ecg.names import LEADS
from elm_jax.elms import ELMS, View, register_view
from elm_jax.errors import UserError
from elm_jax.evaluation.controls import Question, Source
from elm_jax.export import main as export_main
from elm_jax.import_weights import main as import_main
from elm_jax.inference.model import TrainedModel
from elm_jax.text.turns import Words, with_words
from elm_jax.training.loop import train
from elm_jax.training.state import split_names

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32,
       "patch_size": 16}  # fmt: skip
TWO = {
    "elm": "two", "encoder__tokens": 2, "encoders": {"image": {"name": "vit", "config": VIT}},
    "update": ["connector", "encoder.image", "llm"], "connector__hidden": 16,
    "data__names": ["demo:train=16,val=8,test=8"],
    "llm__scratch": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp": 32, "max_len": 256},
    "train__batch_size": 8, "train__steps": 4, "train__save_every": 2, "optim__schedule": "constant",
    "llm__compute_dtype": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def elm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meaning = "Two encoders and a language model"
    views = {
        "ecg": View(meaning, None, encoder=True, connector="mlp"),
        "image": View(meaning, "rgb", encoder=True, connector="linear"),
    }
    monkeypatch.setitem(ELMS, "two", views)
    runs.prepare(monkeypatch, tmp_path / "cache")


def config(workdir: Path, **changes: Any) -> Config:
    return runs.config(workdir, **{**TWO, **changes})


def drawn(assembly: Assembly) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for n, x in assembly.structure.leaves.items()}


def test_an_ecgs_embeddings_are_those_of_its_views_one_after_the_other(tmp_path: Path) -> None:
    assembly = assemble(config(tmp_path / "run"))
    elm, dataset = assembly.structure.bind(drawn(assembly)), assembly.dataset("train")
    conversations = [dataset.conversation(i, dataset.signals(i), 0) for i in range(2)]
    assert assembly.text.signal_tokens == 3 and all(c.signal_positions.shape == (1, 3) for c in conversations)
    rows = [[Group(0, [c]) for c in conversations]]
    batch = collate(rows, BatchShape(256, 2, 64), dataset.signal.layout)
    slots = batch.signal_slot[0]
    assert slots[slots >= 0].tolist() == list(range(6))
    found = elm.signal_embeddings(jax.tree.map(jnp.asarray, batch.signals), jnp.ones((1, 2)))
    expected = []
    for each in conversations:
        ((ecg, image),) = [(signals["ecg"], signals["image"]) for signals in each.signals or []]
        expected.append(elm.connector["ecg"](elm.encoder["ecg"](ecg[None]))[0])
        expected.append(elm.connector["image"](elm.encoder["image"](image[None]))[0])
    np.testing.assert_allclose(found[0], np.concatenate(expected), rtol=2e-5, atol=1e-5)


def test_an_encoder_learns_from_the_ecgs_alone_that_have_its_view(tmp_path: Path) -> None:
    assembly = assemble(config(tmp_path / "run"))
    dataset, arrays, found = assembly.dataset("train"), drawn(assembly), []
    whole = dataset.conversation(0, dataset.signals(0), 0)
    part = dataset.conversation(1, [{"image": dataset.signals(1)[0]["image"]}], 0)
    for conversations in ([whole], [whole, part], [whole, whole]):
        elm = assembly.structure.bind(arrays)
        batch = collate([[Group(0, [c]) for c in conversations]], BatchShape(256, 2, 64), dataset.signal.layout)
        elm.hidden(jax.tree.map(jnp.asarray, batch), {"encoder.ecg"})
        found.append(jax.tree.leaves(nnx.state(elm.encoder["ecg"], nnx.BatchStat)))
    alone, with_another, twice = found
    jax.tree.map(np.testing.assert_array_equal, alone, with_another)
    assert any((one != two).any() for one, two in zip(alone, twice, strict=True))  # unbiased, of more


def test_one_encoder_may_learn_and_the_other_not(tmp_path: Path) -> None:
    structure = assemble(config(tmp_path / "run")).structure
    trained, moving, frozen = split_names(structure, ("connector", "encoder.image"))
    assert {structure.leaves[n].part for n in trained} == {"connector.ecg", "connector.image", "encoder.image"}
    assert moving == ["encoder.image.mask_token"]
    assert {structure.leaves[n].part for n in frozen} == {"encoder.ecg", "llm"}
    trained, moving, _ = split_names(structure, ("encoder",))
    assert {structure.leaves[n].part for n in trained} == {"encoder.ecg", "encoder.image"} and moving


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"update": ["encoder.found"]}, "update: found encoder.found; expected no encoder.found with elm=two"),
        ({"encoders": {}}, "encoders.image.name: found None; expected an ECG encoder for elm=two"),
        ({"encoders": {"picture": {"name": "vit"}}}, "encoders: found picture; expected one of image"),
        ({"encoders": {"image": {"size": 3}}}, "encoders.image.size: found an unknown key"),
        ({"encoders": {"image": {"name": "vit", "cache": True}}}, "encoders.image.cache: found True; expected nothing"),
        ({"encoder__cache": True, "update": ["llm"]}, "encoder.cache: found True; expected false for elm=two"),
        ({"elm": "mlp_llava", "update": ["llm"]}, "encoders: found image; expected nothing for elm=mlp_llava"),
    ],
)
def test_what_fits_no_view_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        assemble(config(tmp_path / "run", **changes))
    assert told in str(error.value)


@pytest.mark.slow  # long: trains twice, answers, exports and imports
def test_such_a_model_trains_goes_on_evaluates_and_comes_back_from_an_export(tmp_path: Path) -> None:
    whole, parts = config(tmp_path / "whole"), config(tmp_path / "parts", train__steps=2)
    train(whole)
    train(parts)
    train(replace(parts, train=replace(parts.train, steps=4)))
    ours, again = (TrainedModel(c, "latest") for c in (whole, parts))
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name], err_msg=name)
    assert resolve(to_dict(whole)) == whole
    dataset = ours.assembly.dataset("test")
    answers = {}
    for condition in ("real", "zeros", "shuffled", "text_only"):
        prompts, unread = Source(dataset, condition).load([Question(0, 0, "")])
        assert not unread
        (answers[condition],) = prompts.values()
    shapes = {view: np.shape(x) for view, x in answers["real"].signals[0].items()}
    assert shapes == {"ecg": (12, 500), "image": (32, 32, 3)}
    for view in ("ecg", "image"):
        assert not np.array_equal(answers["real"].signals[0][view], answers["shuffled"].signals[0][view])
        assert not np.array_equal(answers["real"].signals[0][view], answers["zeros"].signals[0][view])
    assert answers["text_only"].signals == []
    assert all(isinstance(ours.answers([prompt], whole.eval)[0], str) for prompt in answers.values())
    out, back = tmp_path / "out", tmp_path / "back"
    assert cli.guard(export_main, ["--checkpoint", whole.workdir, "--step", "latest", "--out", str(out)]) == 0
    parts = {f"{part}.{view}.safetensors" for part in ("encoder", "connector") for view in ("ecg", "image")}
    assert parts <= {file.name for file in out.iterdir()}
    pytest.importorskip("torch", reason="elm.pt is written and read by it")
    assert cli.guard(import_main, [str(out / "elm.pt"), "--out", str(back), *runs.flags(back, **TWO)[:-1]]) == 0
    again = TrainedModel(replace(whole, workdir=str(back)), "latest")
    words = len(ours.assembly.tokenizer)  # a checkpoint of the reference has no more rows
    for name, array in ours.arrays.items():
        rows = slice(words) if name == "llm.embedding.table" else slice(None)
        np.testing.assert_array_equal(array[rows], again.arrays[name][rows], err_msg=name)


def amplitude(signal: np.ndarray, rate: float, leads: Sequence[str]) -> str:
    return f"Amplitude {np.ptp(signal):.3f} mV at {rate:g} Hz in {len(leads)} leads."


def test_what_a_view_writes_is_of_the_ecg_that_the_model_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = View("", writes="text", text=amplitude)
    monkeypatch.setitem(ELMS, "written", {**ELMS["base_elf"], "words": written})
    changes = {"elm": "written", "encoder__name": None, "encoder__config": {}, "encoder__tokens": 1, "encoders": {}}
    assembly = assemble(config(tmp_path / "run", **changes, update=["connector", "llm"], connector__hidden=None))
    assert {leaf.part for leaf in assembly.structure.leaves.values()} == {"connector", "llm"}
    dataset = assembly.dataset("test")

    def words(condition: str) -> str:
        (prompt,) = Source(dataset, condition).load([Question(0, 0, "")])[0].values()
        return str(assembly.tokenizer.decode(prompt.rendered.ids))

    def told(record: int) -> str:
        return amplitude(dataset.signal.load_raw(dataset.records[record].ecg_paths[0], 0), 50, LEADS)

    assert told(0) in words("real") and told(0) in assembly.tokenizer.decode(dataset.render(0).ids)
    shuffled = Source(dataset, "shuffled")
    assert told(0) != told(shuffled.other[0]) and told(shuffled.other[0]) in words("shuffled")
    assert "Amplitude 0.000 mV" in words("zeros") and "Amplitude" not in words("text_only")
    for condition in ("shuffled", "zeros", "noise", "text_only"):
        assert told(0) not in words(condition)


@pytest.mark.parametrize(
    ("elm", "views", "told"),
    [
        ("llava", ELMS["mlp_llava"], "another name of linear_llava"),
        ("mlp_llava", ELMS["mlp_llava"], "a name of the package"),
        ("mine", {}, "views that write nothing"),
        ("mine", {"words": View("", writes="text", text=amplitude)}, "views that write text"),
        ("mine", {**ELMS["ecg_byte"], "image": ELMS["mlp_llava"]["ecg"]}, "views that write tokens, slots"),
        ("mine", {**ELMS["mlp_llava"], "more": ELMS["ecg_byte"]["ecg"]}, "views that write slots, tokens"),
        ("mine", {**ELMS["mlp_llava"], "words": View("", writes="text")}, "a function `text` where it writes text"),
        ("mine", {"lora": ELMS["mlp_llava"]["ecg"]}, "an identifier other than lora"),
    ],
)
def test_views_that_no_model_can_have_are_not_registered(elm: str, views: dict[str, View], told: str) -> None:
    with pytest.raises(UserError, match=told):
        register_view(elm, views)
    assert "mine" not in ELMS


def test_what_a_view_writes_stands_at_the_users_marks_alone() -> None:
    turns = [{"role": "user", "content": "Look: <ecg> so?"}, {"role": "assistant", "content": "The <ecg> shows it."}]
    assert [turn.text for turn in with_words(turns, [Words("W ")])] == ["Look: <ecg> W so?", "The <ecg> shows it."]
    turns[0]["content"] = "What is it?"
    assert [turn.text for turn in with_words(turns, [Words("W ")])] == ["W What is it?", "The <ecg> shows it."]
