"""A dataset whose ECGs are symbols in the text: truncation, shared prefixes, bad records, augmentation, the index."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_jax.config import DataConfig
from elm_jax.data.batch import Batch
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.ecg_ids import EcgIds
from elm_jax.data.ecg_tokens import EcgTokens, add_ecg_tokens
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.sources import Record, load_records
from elm_jax.data.specs import signal_spec
from elm_jax.errors import UserError
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import add_tokens, render

SAMPLES = 60
QUESTION = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
LONG = [
    turn
    for i in range(6)
    for turn in ({"from": "human", "value": f"Question {i}, and more of it?"}, {"from": "gpt", "value": f"answer {i}"})
]


def dataset_tokenizer() -> Any:
    tokenizer = demo_tokenizer()
    add_tokens(tokenizer, "sft")
    return tokenizer


class Made:
    """A folder with recordings, an ECG-Byte file and datasets of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        EcgByte([bytes([letter] * 2) for letter in b"abcdefghijklmnopqrstuvwxyz"]).save(folder / "bpe.json")
        for turns, name in ((4, "a"), (5, "b")):  # of slow sines many symbols repeat, and merge
            signal = np.round(np.sin(np.linspace(0, turns, SAMPLES)), 1)
            np.save(folder / f"{name}.npy", np.tile(signal, (12, 1)))
        np.save(folder / "flat.npy", np.zeros((12, SAMPLES)))

    def tokens(self, tokenizer: Any, least: int) -> EcgTokens:
        return add_ecg_tokens(tokenizer, self.folder / "bpe.json", least)

    def dataset(
        self, paths: list[Any], texts: list[Any], *, least: int = 8, augments: bool = False, **changes: Any
    ) -> Dataset:
        rows = [
            {"ecg_path": path, "text": text, "name": "x", "patient_id": str(i)}
            for i, (path, text) in enumerate(zip(paths, texts, strict=True))
        ]
        (self.folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(
            names=("records.jsonl",), root=str(self.folder), representation="symbolic", segment_len=SAMPLES,
            leads=("II",), val_fraction=0.0, max_len=changes.pop("max_len", 256), augment_ecg=augments,
            system_prompt="You read ECGs.",
        )  # fmt: skip
        tokenizer = dataset_tokenizer()
        spec = signal_spec(data, 0, tokens=self.tokens(tokenizer, least))
        text = replace(text_spec(data, "qwen2", 1, "sft", ()), **changes)
        return Dataset(load_records(data, "train", 0), tokenizer, text, spec, augments)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def batch(dataset: Dataset, share: str, max_bad: float = 0.0, epoch: int = 0) -> tuple[Batch, list[str]]:
    """The one step of an epoch in which all conversations share a row, and the bad records in it."""
    assert dataset.text.max_len is not None
    index = dataset.length_index(share, max_bad)
    plan = Plan(index, rows=1, max_len=4 * dataset.text.max_len, pack=True, seed=0, shuffle=False)
    loaded = StepSource(dataset, plan, steps=epoch + 1)[epoch]
    return Batch(*(x[0] if not isinstance(x, dict) else x for x in loaded.batch)), [bad.id for bad in loaded.bad]


@pytest.mark.parametrize("augments", [False, True])
def test_the_index_says_which_ecgs_are_cut(made: Made, augments: bool) -> None:
    whole = made.dataset(["a.npy"], [QUESTION], max_len=None).render(0)
    room = len(whole.ids) if not augments else 2 * len(whole.ids)
    for max_len, cut in ((room, False), (len(whole.ids) - 20, True)):
        index = made.dataset(["a.npy"], [QUESTION], max_len=max_len, augments=augments).length_index("system", 0.0)
        assert index.cut.tolist() == index.cut_ecgs.tolist() == [cut] and not index.lost_answers.any()


def test_symbols_take_the_room_that_the_text_leaves(made: Made) -> None:
    whole = made.dataset(["a.npy"], [QUESTION])
    ecg = whole.signals(0)[0]["ecg"]
    rendered = whole.render(0)
    text = len(rendered.ids) - len(ecg)
    assert isinstance(ecg, np.ndarray) and 20 < len(ecg) < SAMPLES
    cut = made.dataset(["a.npy"], [QUESTION], max_len=text + 20).render(0)
    assert len(cut.ids) == text + 20 and np.isin(ecg[:20], cut.ids).all()
    assert cut.ids[cut.supervised].tolist() == rendered.ids[rendered.supervised].tolist()


def test_text_gives_way_to_the_least_of_an_ecg(made: Made) -> None:
    few, many = (made.dataset(["a.npy"], [LONG], least=least, max_len=96).render(0) for least in (2, 40))
    assert len(few.ids) <= 96 and len(many.ids) <= 96
    assert many.supervised.sum() < few.supervised.sum(), "earlier turns go"
    with pytest.raises(UserError, match=r"40 tokens, 3\d of them for ECGs .*room for the text beside"):
        made.dataset(["a.npy"], [LONG], least=50, max_len=40).render(0)
    with pytest.raises(UserError, match=r"20 tokens, 3\d of them for ECGs .*room for the text beside"):
        made.dataset(["a.npy"], [LONG], least=50, max_len=20).render(0)


def test_questions_about_one_recording_share_its_symbols(made: Made) -> None:
    dataset = made.dataset(["a.npy", "a.npy", "b.npy"], [QUESTION, QUESTION, QUESTION])
    ecgs = [dataset.signals(i)[0]["ecg"] for i in (0, 2)]
    for share, copies in (("none", 3), ("system", 3), ("ecg", 2)):
        row, bad = batch(dataset, share)
        symbols = np.isin(row.tokens[0], dataset.signal.tokens.llm_ids)  # type: ignore[union-attr]
        assert not bad and symbols.sum() == sum(map(len, ecgs)) + (copies == 3) * len(ecgs[0]), share
        assert (row.signal_slot == -1).all() and row.signals == {}
        assert (row.target_weights > 0).sum() == sum(dataset.render(i).supervised.sum() for i in range(3))


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
def test_a_bad_record_leaves_the_others_as_they_are(made: Made, share: str) -> None:
    dataset = made.dataset(["b.npy", "a.npy"], [QUESTION, QUESTION])
    index = dataset.length_index(share, 0.0)
    plan = Plan(index, rows=1, max_len=512, pack=True, seed=0, shuffle=False)
    good = StepSource(dataset, plan, steps=1)[0].batch
    (made.folder / "b.npy").unlink()  # after it was measured
    loaded = StepSource(dataset, plan, steps=1)[0]
    assert [bad.id for bad in loaded.bad] == [dataset.records[0].id]
    of_second = good.branch_ids[0, 0] == 2 if share == "system" else good.group_ids[0, 0] == 2
    shared = (good.branch_ids[0, 0] == 0) & (good.group_ids[0, 0] == 1) if share == "system" else np.zeros(1, bool)
    for part in (of_second, shared & (share == "system")):
        np.testing.assert_array_equal(loaded.batch.tokens[0, 0] * part, good.tokens[0, 0] * part)
    second = dataset.render(1)
    assert loaded.batch.target_weights.sum() == second.supervised.sum()


def test_augmented_symbols_stay_within_the_plan(made: Made) -> None:
    paths, texts = ["a.npy", "flat.npy", "b.npy", "noise"], [QUESTION, LONG, LONG, QUESTION]
    dataset = made.dataset(paths, texts, augments=True, least=30, max_len=128)
    index = dataset.length_index("ecg", 0.0)
    seen = set()
    for epoch in range(12):
        for i in range(len(paths)):
            signals = dataset.signals(i, epoch)
            made_of = dataset.conversation(i, signals, int(index.length[i]))
            assert len(made_of.ids) <= index.length[i] and made_of.supervised.sum() == index.targets[i]
            seen.add((i, len(made_of.ids)))
        batch(dataset, "ecg", epoch=epoch)
    assert len(seen) > len(paths), "some were augmented"
    np.testing.assert_equal(dataset.signals(0, 3)[0], dataset.signals(0, 3)[0])
    still = made.dataset(paths, texts, least=30, max_len=128)
    np.testing.assert_equal(still.signals(0, 3)[0], still.signals(0)[0])


def test_the_fingerprint_changes_with_what_may_change_a_length(made: Made) -> None:
    first = made.dataset(["a.npy"], [QUESTION])
    assert made.dataset(["a.npy"], [QUESTION]).fingerprint == first.fingerprint
    assert made.dataset(["a.npy"], [QUESTION], least=9).fingerprint != first.fingerprint
    assert made.dataset(["a.npy"], [QUESTION], augments=True).fingerprint != first.fingerprint
    os.utime(made.folder / "a.npy", (1, 1))
    assert made.dataset(["a.npy"], [QUESTION]).fingerprint != first.fingerprint


def test_a_fingerprint_is_what_older_runs_have_in_their_checkpoints() -> None:
    """Of which they could not be gone on with under another one."""
    data = DataConfig(root="/recordings", representation="symbolic", leads=("II",), segment_len=SAMPLES, max_len=256)
    tokens = EcgTokens(EcgByte([b"aa", b"bb"]), np.arange(258, dtype=np.int32), 8)
    text, signal = text_spec(data, "qwen2", 1, "sft", ()), signal_spec(data, 0, tokens=tokens)
    record = Record(("noise",), QUESTION, "x", "0", "x:0", 0)
    assert Dataset([record], None, text, signal).fingerprint == "8f75001e100ab1e6af490bb7f8b09eff"
    of_encoder = replace(signal, ids=EcgIds(tokens.coder, 64, (1,)))
    assert Dataset([record], None, text, of_encoder).fingerprint != "8f75001e100ab1e6af490bb7f8b09eff"


def test_an_ecg_that_has_changed_since_it_was_measured_is_named(made: Made) -> None:
    dataset = made.dataset(["a.npy"], [QUESTION])
    length = int(dataset.length_index("none", 0.0).length[0])
    np.save(made.folder / "a.npy", np.zeros((12, SAMPLES)))
    with pytest.raises(UserError, match=r"record records.jsonl:0.*its ECG has changed"):
        dataset.conversation(0, dataset.signals(0), length)


def test_an_index_with_unreadable_ecgs_is_not_kept(made: Made, tmp_path: Path) -> None:
    dataset = made.dataset(["a.npy", "missing.npy"], [QUESTION, QUESTION])
    index = dataset.length_index("none", 0.5, tmp_path / "cache")
    assert index.length[1] == 0 and not list((tmp_path / "cache").glob("*.arrow"))
    np.save(made.folder / "missing.npy", np.load(made.folder / "b.npy"))
    assert dataset.length_index("none", 0.5, tmp_path / "cache").length.all()
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_the_references_truncation_is_of_one_ecg_and_needs_an_answer(made: Made) -> None:
    options: dict[str, Any] = {"compat": ("truncate_tokens",)}
    two = made.dataset([["a.npy", "b.npy"]], [QUESTION], max_len=400, **options).render(0)
    ours = made.dataset([["a.npy", "b.npy"]], [QUESTION], max_len=400).render(0)
    np.testing.assert_array_equal(two.ids, ours.ids)
    one = made.dataset(["a.npy"], [LONG], max_len=128, least=16, **options).render(0)
    assert len(one.ids) == 128 and one.supervised.any()
    (place,) = render(QUESTION, dataset_tokenizer(), "qwen2", "You read ECGs.").signal_positions[0]
    with pytest.raises(UserError, match="room for a token of the answer behind the ECG"):
        made.dataset(["a.npy"], [QUESTION], max_len=int(place) + 14, least=12, **options).render(0)


def test_without_signal_tokens_there_are_no_symbols(made: Made) -> None:
    dataset = made.dataset(["a.npy"], [QUESTION], signal_tokens=0)
    expected = render(QUESTION, dataset.tokenizer, "qwen2", "You read ECGs.", signal_tokens=0, n_ecgs=0, max_len=256)
    np.testing.assert_array_equal(dataset.render(0).ids, expected.ids)
    assert batch(dataset, "ecg")[0].signals == {}
