"""The length index: what it says, when it is made again, and what it does about records that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import chat_tokenizer, write_records

from elm_jax import stopping
from elm_jax.config import DataConfig
from elm_jax.data import lengths
from elm_jax.data.dataset import Dataset, read_system_prompt, text_spec
from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.loader import unusable
from elm_jax.data.represent import SignalSpec
from elm_jax.data.sources import Records, load_records
from elm_jax.data.specs import signal_spec
from elm_jax.errors import Absent, UserError
from elm_jax.text.render import TextSpec, add_tokens

ANSWERED = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
UNANSWERED = ANSWERED[:1]
ASKED = [[{"from": "human", "value": f"Is this normal, {i}?"}, ANSWERED[1]] for i in range(6)]


def dataset(folder: Path, using: Any = None, **changes: Any) -> Dataset:
    data = DataConfig(
        names=("records.jsonl",), root=str(folder), max_len=256, val_fraction=0.0, system_prompt="You read ECGs."
    )
    text = dataclasses.replace(text_spec(data, "qwen2", 4, "sft", ()), **changes)
    return Dataset(load_records(data, "train", 0), using or chat_tokenizer(), text, signal_spec(data, 0))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records that were rendered."""
    seen: list[int] = []
    render = Dataset.rendered

    def count(self: Dataset, index: int, *rest: Any) -> Any:
        seen.append(index)
        return render(self, index, *rest)

    monkeypatch.setattr(Dataset, "rendered", count)
    return seen


def assert_same(found: Any, expected: Any) -> None:
    for name, column in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), column, err_msg=name)
        assert getattr(found, name).dtype == column.dtype


# -- what it says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
def test_the_index_says_what_rendering_gives(tmp_path: Path, share: str) -> None:
    late = [{"from": "human", "value": "From <ecg> to <ecg>: worse?"}, {"from": "gpt", "value": "no"}]
    paths = ["a.npy", "a.npy", "b.npy", ["a.npy", "b.npy"], ["a.npy", "b.npy"], "noise", "noise"]
    write_records(tmp_path, [ANSWERED, ANSWERED, ANSWERED, late, ANSWERED, ANSWERED, ANSWERED], paths)
    made = dataset(tmp_path)
    index = made.length_index(share, 0.0)
    for i in range(len(made)):
        rendered = made.render(i)
        assert index.length[i] == len(rendered.ids) and index.targets[i] == rendered.supervised.sum() > 0
        assert index.ecgs[i] == len(rendered.signal_positions)
        assert index.prefix[i] <= np.argmax(rendered.supervised)
        inside = (rendered.signal_positions < index.prefix[i]).all(axis=1).sum()
        assert index.prefix_ecgs[i] == (inside if share == "ecg" and rendered.signal_end else 0)
    for i in range(len(made)):
        for j in range(i):
            if index.prefix[i] and index.key[i] == index.key[j]:
                assert index.prefix[i] == index.prefix[j]
                shared = slice(0, int(index.prefix[i]))
                np.testing.assert_array_equal(made.render(i).ids[shared], made.render(j).ids[shared])
    keys = index.key.tolist()
    assert (index.prefix > 0).all() == (share != "none")
    if share == "ecg":
        assert keys[0] == keys[1] != keys[2] and keys[4] not in keys[:4]
        assert index.prefix_ecgs.tolist() == [1, 1, 1, 0, 2, 1, 1], "ECGs within the question are not shared"
        assert keys[5] != keys[6], "each record's noise is its own"


def test_the_index_says_what_max_len_takes(tmp_path: Path) -> None:
    """Of conversations of one, two and three questions, and of one with a long question and one with a long answer."""
    long_question = [{"from": "human", "value": "Is it so? " * 40}, ANSWERED[1]]
    long_answer = [ANSWERED[0], {"from": "gpt", "value": "yes " * 150}]
    write_records(tmp_path, [ANSWERED, ANSWERED * 2, ANSWERED * 3, long_question, long_answer])
    whole = dataset(tmp_path, max_len=None)
    assert whole.length_index("ecg", 0.0).cuts == {"conversations": 0, "share": 0.0, "answers": 0, "with_ecgs_cut": 0}
    two = int(np.flatnonzero(whole.render(1).supervised)[-1]) + 1  # what follows the last answer is no part of it
    index = dataset(tmp_path, max_len=two).length_index("ecg", 0.0)
    assert index.cut.tolist() == [False, False, True, True, True]
    assert index.lost_answers.tolist() == [0, 0, 1, 0, 0]
    assert index.cuts == {"conversations": 3, "share": 0.6, "answers": 1, "with_ecgs_cut": 0}
    assert dataset(tmp_path, max_len=two - 1).length_index("ecg", 0.0).lost_answers.tolist() == [0, 1, 2, 0, 0]


def test_a_record_takes_few_bytes(tmp_path: Path) -> None:
    write_records(tmp_path, [ANSWERED] * 100)
    index = dataset(tmp_path).length_index("ecg", 0.0)
    assert sum(column.nbytes for column in vars(index).values()) <= 40 * 100


# -- when it is made again ------------------------------------------------------------------------------------


def test_the_second_time_it_is_read(tmp_path: Path, measured: list[int]) -> None:
    write_records(tmp_path, ASKED)
    first = dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache")
    assert measured == list(range(6))
    measured.clear()
    assert_same(dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache"), first)
    other = dataset(tmp_path).length_index("none", 0.0, tmp_path / "cache")
    assert measured == [], "neither the same nor another share needs measuring"
    assert_same(other, dataset(tmp_path).length_index("none", 0.0))
    assert measured == list(range(6)), "without a cache it is made anew"
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", None], ids=["empty", "half", "another table"])
def test_a_damaged_length_index_is_measured_again(tmp_path: Path, content: bytes | None, caplog) -> None:
    write_records(tmp_path, ASKED)
    first = dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    if content is None:
        pq.write_table(pa.table({"length": [1, 2]}), kept)
    else:
        kept.write_bytes(content)
    assert_same(dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache"), first)
    assert "made again" in caplog.text
    caplog.clear()
    assert_same(dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache"), first)
    assert not caplog.text


def larger_tokenizer() -> Any:
    made = demo_tokenizer()
    add_tokens(made, "sft")
    made.add_tokens(["normal"])
    return made


def rewritten(folder: Path) -> None:
    write_records(folder, [*ASKED[:5], UNANSWERED + [{"from": "gpt", "value": "no"}]])


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (None, {"system_prompt": "Another."}),
        (None, {"signal_tokens": 5}),
        (None, {"max_len": 200}),
        (None, {"family": "plain"}),
        (None, {"explicit_thinking": True}),
        (None, {"using": larger_tokenizer}),
        (rewritten, {}),
        (lambda folder: write_records(folder, ASKED, ["other.npy"] * 6), {}),
        (lambda folder: write_records(folder, ASKED[:5]), {}),
    ],
    ids=["prompt", "signal_tokens", "max_len", "family", "thinking", "tokenizer", "text", "paths", "fewer"],
)
def test_what_may_change_a_length_makes_it_anew(
    tmp_path: Path, measured: list[int], change: Callable[[Path], None] | None, options: dict[str, Any]
) -> None:
    write_records(tmp_path, ASKED)
    dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache")
    measured.clear()
    if change:
        change(tmp_path)
    if "using" in options:
        options = {"using": options["using"]()}
    changed = dataset(tmp_path, **options)
    changed.length_index("ecg", 0.0, tmp_path / "cache")
    assert measured == list(range(len(changed)))


def test_a_saved_tokenizer_makes_the_same_index(tmp_path: Path, measured: list[int]) -> None:
    """A run keeps its tokenizer, and reads that one when it goes on."""
    from transformers import AutoTokenizer

    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_records(tmp_path, [ANSWERED] * 4)
    first = dataset(tmp_path).length_index("ecg", 0.0, tmp_path / "cache")
    again = dataset(tmp_path, using=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    measured.clear()
    assert_same(again.length_index("ecg", 0.0, tmp_path / "cache"), first)
    assert measured == []


def test_a_kept_index_knows_the_fingerprint_and_reads_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path, ASKED)
    first = dataset(tmp_path)
    first.length_index("ecg", 0.0, tmp_path / "cache")
    assert first.fingerprint == dataset(tmp_path).fingerprint, "measured with the lengths as record by record"
    again = dataset(tmp_path)
    monkeypatch.setattr(Records, "each", None)
    monkeypatch.setattr(Records, "make", None)
    again.length_index("ecg", 0.0, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint


def high(leads: np.ndarray, *_: Any) -> str:
    """How high an ECG is, in words."""
    return "high " * int(leads.max())


def test_what_the_package_writes_of_an_ecg_is_kept_until_its_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path, [ANSWERED] * 4, ["a.npy"] * 4)
    np.save(tmp_path / "a.npy", np.full((12, 2500), 3, np.float32))
    read: list[str] = []
    load = SignalSpec.recorded
    monkeypatch.setattr(SignalSpec, "recorded", lambda self, path, key: read.append(path) or load(self, path, key))

    def reads() -> int:
        made = dataset(tmp_path)
        made.signal = dataclasses.replace(made.signal, texts={"words": high})
        assert (made.length_index("none", 0.0, tmp_path / "cache").length > 0).all()
        return len(read)

    assert [reads(), reads()] == [1, 2], "a function of the user's is asked at every start, of each ECG once"
    monkeypatch.setattr(high, "__module__", "elm_jax.ecg.words")
    assert [reads(), reads()] == [3, 3]
    monkeypatch.setattr(lengths, "_code", lambda room: room)
    assert reads() == 4


def test_an_ecg_of_which_other_words_are_written_than_were_planned_is_told(tmp_path: Path) -> None:
    write_records(tmp_path, [ANSWERED], ["a.npy"])
    made = dataset(tmp_path)
    made.signal = dataclasses.replace(made.signal, texts={"words": high})
    np.save(tmp_path / "a.npy", np.full((12, 2500), 3, np.float32))
    length = int(made.length_index("none", 0.0).length[0])
    assert len(made.conversations(0, made.signals(0), length)[0].ids) == length
    np.save(tmp_path / "a.npy", np.full((12, 2501), 5, np.float32))
    with pytest.raises(UserError, match=rf"records.jsonl:0: found .* the run.s plan has {length}: its ECG has"):
        made.conversations(0, made.signals(0), length)


def with_a_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elm_jax.data.lengths.cores", lambda: 2)
    monkeypatch.setattr("elm_jax.data.lengths.SHARE", 100)
    monkeypatch.setattr("elm_jax.data.lengths.CHUNK", 16)


@pytest.mark.slow
def test_a_helper_measures_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad records and their limit, too."""
    texts = [[{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"{i % 7}"}] for i in range(400)]
    write_records(tmp_path, [*texts[:150], UNANSWERED, *texts[150:300], UNANSWERED, *texts[300:]])
    alone, helped = dataset(tmp_path), dataset(tmp_path)
    expected = alone.length_index("ecg", 0.1)
    with_a_helper(monkeypatch)
    answers: list[int] = []
    answer = lengths._Helper.answer
    monkeypatch.setattr(lengths._Helper, "answer", lambda self: answers.append(1) or answer(self))
    assert_same(helped.length_index("ecg", 0.1), expected)
    assert helped.fingerprint == alone.fingerprint
    with pytest.raises(UserError, match=r"record records.jsonl:301: "):
        helped.length_index("ecg", 1.5 / 402)
    assert answers, "a helper has measured some"


def test_a_helper_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed may be started again; one that fails by itself would fail for ever."""
    write_records(tmp_path, [ANSWERED] * 300)
    with_a_helper(monkeypatch)
    for does, error, says in (
        ("kill -9 $$", Absent, "which measured some of them, ended with status -9"),
        ("exit 1", AssertionError, "status 1"),
    ):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
        with pytest.raises(error, match=says):
            dataset(tmp_path).length_index("ecg", 0.0)


@pytest.mark.parametrize("what", ["sticks", "fails"])
def test_what_happens_to_a_helper_is_told_here(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: a recording whose read sticks, and a table that cannot be reached."""
    write_records(tmp_path, [ANSWERED] * 300)
    found = dataset(tmp_path)
    chunk, first = lengths._Meter(found).chunk(0, 16), multiprocessing.Event()

    def measure(self: Any, *part: int) -> Any:
        if os.getpid() == parent:
            first.wait(60)
            return chunk
        first.set()
        if what == "fails":
            raise Absent("a table", "no way there", "a table", "try again")
        with stopping.reading("a.npy"):
            time.sleep(60)

    class Forked:
        """A helper's process that knows of `measure`."""

        def __init__(self, command: list[str], pass_fds: list[int], **_: Any) -> None:
            self.pid = os.fork()
            if not self.pid:
                lengths._serve(pass_fds[0])
                os._exit(0)

        def kill(self) -> None:
            os.kill(self.pid, signal.SIGKILL)

        def wait(self, _: float = 0) -> int:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    parent = os.getpid()
    with_a_helper(monkeypatch)
    monkeypatch.setattr(lengths._Meter, "chunk", measure)
    monkeypatch.setattr("subprocess.Popen", Forked)
    says = {"sticks": r"^a.npy: found being read for .* at most data.timeout=0.2 s", "fails": "^a table: found no way"}
    with pytest.raises(Absent, match=says[what]):
        found.length_index("ecg", 0.0, timeout=0.2)


# -- records that cannot be used ------------------------------------------------------------------------------


def test_a_record_without_an_answer_is_named(tmp_path: Path) -> None:
    write_records(tmp_path, [ANSWERED, UNANSWERED, ANSWERED])
    with pytest.raises(UserError, match=r"record records.jsonl:1: .*answer"):
        dataset(tmp_path).length_index("ecg", 0.0)


@pytest.mark.parametrize("text", ["Sinus rhythm.", json.dumps("Sinus rhythm.")])
def test_a_plain_string_is_a_text_of_pretraining_and_no_answer_to_an_empty_question(tmp_path: Path, text: str) -> None:
    write_records(tmp_path, [text, ANSWERED])
    found = dataset(tmp_path)
    for use in (found.render, found.prompts):
        with pytest.raises(UserError, match=r"records.jsonl:0.*phase sft.*'Sinus.*without a question.*from and value"):
            use(0)
        use(1)
    with pytest.raises(UserError, match="records.jsonl:0.*config.objective=pretrain"):
        found.length_index("none", 0.0)
    assert "Sinus rhythm." in dataset(tmp_path, phase="pretrain").render(0).prompt


def test_few_are_left_out_and_the_limit_holds_for_the_cache_too(tmp_path: Path) -> None:
    write_records(tmp_path, [ANSWERED, UNANSWERED, ANSWERED, UNANSWERED])
    made = dataset(tmp_path)
    index = made.length_index("ecg", 0.5, tmp_path / "cache")
    assert (index.length > 0).tolist() == [True, False, True, False]
    with pytest.raises(UserError, match=r"record records.jsonl:3: "):
        made.length_index("ecg", 0.25, tmp_path / "cache")
    with pytest.raises(UserError, match=r"record records.jsonl:3: "):
        made.length_index("ecg", 0.25)


@pytest.mark.parametrize("path", ["", [], None, ["ecg_0.npy", 1]], ids=["empty", "none", "null", "number"])
def test_a_malformed_path_is_a_bad_record(tmp_path: Path, path: Any) -> None:
    write_records(tmp_path, [ANSWERED] * 3, ["ecg_0.npy", path, "ecg_0.npy"])
    made = dataset(tmp_path)
    assert (made.length_index("ecg", 0.5, tmp_path / "cache").length > 0).tolist() == [True, False, True]
    with pytest.raises(UserError, match=r"record records.jsonl:1: .*ecg_path"):
        made.length_index("ecg", 0.1, tmp_path / "cache")
    assert [bad.id for bad in unusable(made, made.length_index("ecg", 0.5))] == ["records.jsonl:1"]
    with pytest.raises(UserError, match=r"record records.jsonl:1: .*ecg_path"):
        made.prompts(1)


# -- the specs ------------------------------------------------------------------------------------------------


def test_text_only_has_no_signals(tmp_path: Path) -> None:
    write_records(tmp_path, [ANSWERED])
    made = dataset(tmp_path, signal_tokens=0)
    assert made.signals(0) == [] and made.length_index("ecg", 0.0).ecgs.tolist() == [0]
    assert text_spec(DataConfig(perturb="only_text"), "qwen2", 4, "sft", ()).signal_tokens == 0


def test_noise_is_a_records_own_and_depends_on_the_seed(tmp_path: Path) -> None:
    write_records(tmp_path, [ANSWERED, ANSWERED], ["noise", "noise"])
    made = dataset(tmp_path)
    other = Dataset(made.records, made.tokenizer, made.text, dataclasses.replace(made.signal, seed=1))
    shown = (made.signals(0), made.signals(0), made.signals(1), other.signals(0))
    first, again, second, reseeded = (ecgs[0]["ecg"] for ecgs in shown)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second) and not np.array_equal(first, reseeded)
    assert first.shape == made.signal.shape == (12, 2500) and first.dtype == np.float32


def test_a_system_prompt_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Read the ECG.\n")
    assert read_system_prompt(str(path)) == "Read the ECG."
    assert read_system_prompt("Read it.") == "Read it." and read_system_prompt("") is read_system_prompt(None) is None
    with pytest.raises(UserError, match="data.system_prompt"):
        read_system_prompt(str(tmp_path / "gone.md"))


@pytest.mark.slow
def test_looking_up_a_cached_index_costs_little_beside_making_it(tmp_path: Path) -> None:
    texts = [[{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"{i}"}] for i in range(5000)]
    write_records(tmp_path, texts)
    made, spent = dataset(tmp_path), []
    for _ in range(2):
        begin = time.process_time()
        made.length_index("ecg", 0.0, tmp_path / "cache")
        spent.append((time.process_time() - begin) / len(made))
    print(f"seconds a record: {spent[0]:.1e} to make, {spent[1]:.1e} to look up")
    assert spent[0] < 2e-3 and spent[1] < spent[0] and spent[1] < 4e-4


def test_specs_are_plain_values() -> None:
    """They are part of the index's fingerprint and cross processes."""
    assert json.dumps(dataclasses.asdict(TextSpec("qwen2", 4)))
