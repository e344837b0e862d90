"""Records: where they come from, which belong to a split, who they are about, what is refused."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.config import DataConfig
from elm_jax.data import table_files
from elm_jax.data.sources import load_records, patient_ids, patient_of
from elm_jax.data.tables import FAMILIES, open_source
from elm_jax.errors import UserError

TURNS = [{"from": "human", "value": "Rate?"}, {"from": "gpt", "value": "70"}]


def rows(count=20, patients=10, **extra):
    return [
        {"ecg_path": f"{i}.npy", "text": json.dumps(["q", f"question {i}", ["a"]]), "name": "q",
         "patient_id": f"{i % patients}", **{k: v[i % len(v)] for k, v in extra.items()}}
        for i in range(count)
    ]  # fmt: skip


def save(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(tmp_path):
    return DataConfig(names=("a.parquet",), root=str(tmp_path), val_fraction=0.0)


def load(data, split="train", seed=0):
    return load_records(data, split, seed)


def refusal(data, split="train"):
    with pytest.raises(UserError) as caught:
        list(load(data, split))
    return str(caught.value)


# ---- files


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, data, suffix):
    save(tmp_path / f"a.{suffix}", rows(3))
    records = load(replace(data, names=(f"a.{suffix}",)))
    assert len(records) == 3
    first = records[0]
    assert first.ecg_paths == ("0.npy",) and first.text == ["q", "question 0", ["a"]]
    assert (first.name, first.patient, first.id, first.dataset) == ("q", "0", f"a.{suffix}:0", 0)
    assert records[-1].id == f"a.{suffix}:2" and [r.patient for r in records[1:]] == ["1", "2"]
    with pytest.raises(IndexError):
        records[3]


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
@pytest.mark.parametrize("text", [TURNS, json.dumps(TURNS), "one; two", ["a", "b", "c"]])
def test_text_may_be_nested_or_json_or_plain(tmp_path, data, suffix, text):
    save(tmp_path / f"a.{suffix}", [{"ecg_path": "x", "text": text}])
    record = load(replace(data, names=(f"a.{suffix}",)))[0]
    assert record.text == (json.loads(text) if isinstance(text, str) and text.startswith("[") else text)
    assert record.name == ""


def test_keys_that_only_other_rows_turns_have_are_dropped(tmp_path, data):
    other = [{"role": "user", "content": "hi"}]
    schema = pa.list_(pa.struct([(k, pa.string()) for k in ("from", "value", "role", "content")]))
    table = pa.table({"ecg_path": ["a", "b"], "text": pa.array([TURNS, other], schema)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [r.text for r in load(data)] == [TURNS, other]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_several_ecgs_are_a_list_or_a_json_list(tmp_path, data, suffix):
    names = (f"a.{suffix}",)
    save(tmp_path / names[0], [{"ecg_path": json.dumps(["x.npy", "y.npy"]), "text": "t", "patient_id": "2+1"}])
    record = load(replace(data, names=names))[0]
    assert record.ecg_paths == ("x.npy", "y.npy") and record.patient == "1+2"
    save(tmp_path / f"b.{suffix}", [{"ecg_path": ["x.npy", "y.npy"], "text": "t"}])
    assert load(replace(data, names=(f"b.{suffix}",)))[0].ecg_paths == ("x.npy", "y.npy")


def test_a_folder_gives_splits_by_file_name_and_ids_that_differ(tmp_path, data):
    folder = tmp_path / "mine" / "data"
    folder.mkdir(parents=True)
    save(folder / "train-00000-of-00002.parquet", rows(4))
    save(folder / "train-00001-of-00002.parquet", rows(5))
    save(folder / "test.jsonl", rows(2))
    save(folder / "validation.json", rows(3))
    data = replace(data, names=("mine",), val_fraction=0.3)
    found = {split: load(data, split) for split in ("train", "val", "test")}
    assert {split: len(r) for split, r in found.items()} == {"train": 9, "val": 3, "test": 2}
    ids = [record.id for records in found.values() for record in records]
    assert len(set(ids)) == 14


def test_folds_are_chosen_by_name_or_column(tmp_path, data):
    folder = tmp_path / "ecg-qa-ptbxl-250-2500"  # a local copy is preferred to the hub
    folder.mkdir()
    for fold, split in product((1, 2), ("train", "test")):
        save(folder / f"fold{fold}_{split}-00000-of-00001.parquet", rows(fold * 10 + len(split)))
    names = (folder.name,)
    for fold in (1, 2):
        assert len(load(replace(data, names=names, fold=fold))) == fold * 10 + 5
        assert len(load(replace(data, names=names, fold=fold), "test")) == fold * 10 + 4
    save(tmp_path / "a.parquet", rows(9, split=["fold1_train", "fold2_train", "fold2_test"]))
    assert len(load(replace(data, fold=2), "test")) == 3
    assert "no test records" in refusal(data, "test")


def test_a_split_column_decides_and_its_names_are_checked(tmp_path, data, monkeypatch):
    save(tmp_path / "a.parquet", rows(10, split=["train", "valid", "test", "train", "dev"]))
    assert [len(load(data, split)) for split in ("train", "val", "test")] == [4, 4, 2]
    assert [record.id for record in load(data, "test")] == ["a.parquet:2", "a.parquet:7"]
    save(tmp_path / "a.parquet", rows(2, split=["train", "holdout"]))
    assert "split 'holdout'" in refusal(data)
    monkeypatch.setattr("elm_jax.data.table_files._ROWS", 2)  # in several pieces
    save(tmp_path / "b.jsonl", rows(5, split=["train", "val", "train", None, "test"]))
    assert "split None" in refusal(replace(data, names=("b.jsonl",)))


def test_without_any_sign_of_splits_all_is_train_and_test_says_what_to_do(tmp_path, data):
    save(tmp_path / "a.parquet", rows())
    assert len(load(data)) == 20
    assert "add a column split" in refusal(data, "test")


def test_a_saved_dataset_is_read(tmp_path, data):
    split = {"train": datasets.Dataset.from_list(rows(6)), "test": datasets.Dataset.from_list(rows(2))}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "saved")
    split["train"].save_to_disk(tmp_path / "one")
    assert len(load(replace(data, names=("saved",)), "test")) == 2
    assert len(load(replace(data, names=("one",)))) == 6


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"ecg_path": "a", "text": "t"}\n{"ecg_path": \n', "a.jsonl, line 2: found malformed JSON"),
        ('{"ecg_path": "a", "text": "t"}\n\n{"ecg_path": "a"}\n', "a.jsonl, line 3: found no text"),
        ("[1]\n", "a.jsonl, line 1: found a list"),
        ("\n", "no records"),
        ('{"ecg_path": "a", "text": "\ud800"}'.encode("utf-8", "surrogatepass"), "UTF-8"),
    ],
)
def test_malformed_lines_are_named(tmp_path, data, content, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refusal(replace(data, names=("a.jsonl",)))


@pytest.mark.parametrize("path", ["", [], None, ["a", 1]])
def test_a_record_with_a_malformed_path_says_so_and_is_nobodys(tmp_path, data, path):
    save(tmp_path / "a.jsonl", [{"ecg_path": path, "text": "t"}, *rows(19)])
    found = load(replace(data, names=("a.jsonl",)))
    assert "record a.jsonl:0: found ecg_path" in str(found[0].problem) and found[1].problem is None
    assert found[0].ecg_paths == () and found[0].patient == "a.jsonl:0"
    assert len(load(replace(data, names=("a.jsonl",), val_fraction=0.5))) < 20  # who is held out can be said


def test_other_bad_files_are_named(tmp_path, data):
    (tmp_path / "a.json").write_text('[{"ecg_path": "a", "text": "t"},\n {]')
    assert "a.json, line 2" in refusal(replace(data, names=("a.json",)))
    (tmp_path / "a.json").write_text("{}")
    assert "a list of records" in refusal(replace(data, names=("a.json",)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert "a.parquet" in refusal(data) and "\n" not in refusal(data)
    save(tmp_path / "a.parquet", [{"ecg_paths": "a", "text": "t"}])
    assert "did you mean 'ecg_paths'" in refusal(data)
    (tmp_path / "empty").mkdir()
    assert "no records" in refusal(replace(data, names=("empty",)))


def test_a_rewritten_file_is_read_anew_whatever_its_time_says(tmp_path, data):
    path, seen = tmp_path / "a.parquet", []
    for answer in ("yes", "noo"):
        save(path, [{"ecg_path": "x.npy", "text": answer}])
        os.utime(path, ns=(10**18, 10**18))
        seen.append(load(data)[0].text)
    assert seen == ["yes", "noo"]


URL = "http://127.0.0.1:9/ecg.png"


@pytest.fixture
def connections(monkeypatch):
    """Addresses that something tried to reach."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("socket.socket.connect", connect)
    return tried


def save_with_image(path, kind, column):
    """A table of one record, whose `column` is an image that lies at URL; the library would fetch it to save it."""
    told = {"ecg_path": {"dtype": "string", "_type": "Value"}, "text": {"dtype": "string", "_type": "Value"}}
    told[column] = {"_type": "Image"}
    table = pa.table({"ecg_path": ["x.npy"], "text": ["t"]} | {column: [{"bytes": None, "path": URL}]})
    table = table.cast(datasets.Features.from_dict(told).arrow_schema)
    if kind == "parquet":
        pq.write_table(table, path)
        return
    datasets.Dataset(pa.table({n: table[n] for n in table.column_names})).save_to_disk(path)
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | {"features": told}))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_what_a_feature_names_is_refused_and_not_fetched(tmp_path, data, connections, kind):
    save_with_image(tmp_path / "a.parquet", kind, "ecg_path")
    assert "a.parquet, column ecg_path: found the type" in refusal(data) and not connections


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("column", ["picture", "prompt"])
def test_columns_that_are_no_part_of_a_record_are_never_read(tmp_path, data, connections, kind, column):
    save_with_image(tmp_path / "a.parquet", kind, column)
    assert load(data)[0].ecg_paths == ("x.npy",) and not connections


def test_a_path_that_the_file_calls_an_image_is_a_path(tmp_path, data, connections):
    """The metadata alone may say so, of a column of strings."""
    told = {"info": {"features": {"ecg_path": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    table = pa.table({"ecg_path": [URL], "text": ["t"]}).replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load(data)[0].ecg_paths == (URL,) and not connections


def test_categories_are_read_as_their_text(tmp_path, data):
    split = pa.array(["train", "test", "train"]).dictionary_encode()
    pq.write_table(pa.table({"ecg_path": ["a", "b", "c"], "text": ["t"] * 3, "split": split}), tmp_path / "a.parquet")
    assert [record.ecg_paths for record in load(data)] == [("a",), ("c",)]


@pytest.mark.parametrize(
    "column, values",
    [("text", pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))),
     ("patient_id", pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16))))],
)  # fmt: skip
def test_a_column_of_a_type_that_is_no_text_is_named(tmp_path, data, column, values):
    pq.write_table(pa.table({"ecg_path": ["x"], "text": ["t"]} | {column: values}), tmp_path / "a.parquet")
    assert f"a.parquet, column {column}: found the type {str(values.type)[:8]}" in refusal(data)


def test_a_pair_of_a_type_that_is_no_text_is_left_out_where_there_is_a_text(tmp_path, data):
    kinds = {"chosen": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}
    pq.write_table(pa.table({"ecg_path": ["x"], "text": ["t"], **kinds}), tmp_path / "a.parquet")
    assert load(data)[0].text == "t"
    pq.write_table(pa.table({"ecg_path": ["x"], "prompt": ["t"], **kinds}), tmp_path / "a.parquet")
    assert "a.parquet, column chosen: found the type map<" in refusal(data)


def test_a_cache_that_cannot_be_written_is_named_and_not_the_file(tmp_path, data, monkeypatch):
    save(tmp_path / "a.parquet", rows(3))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "a.parquet")
    told = refusal(data)
    assert told.startswith(f"{tmp_path / 'a.parquet' / 'elm_jax'}: ") and "set HF_DATASETS_CACHE" in told


def test_a_parquet_file_that_breaks_off_is_named_and_leaves_nothing_in_the_cache(tmp_path, data):
    path = save(tmp_path / "a.parquet", rows(3))
    broken = bytearray(path.read_bytes())
    broken[4:60] = bytes(56)  # the first page; the footer is whole
    path.write_bytes(broken)
    assert f"{path}: found an unreadable file" in refusal(data)
    assert not [file for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*") if file.is_file()]


# ---- names


def test_unknown_names_say_what_is_meant(data):
    assert "did you mean 'ecg-qa-ptbxl-250-2500'" in refusal(replace(data, names=("ecg-qa-ptbxl-250-250",)))
    assert "did you mean 'demo'" in refusal(replace(data, names=("dem",)))
    assert "no file or folder x/y.parquet" in refusal(replace(data, names=("x/y.parquet",)))
    assert refusal(replace(data, names=("x/y.parquet",))).endswith("correct the path")
    assert "each dataset once" in refusal(replace(data, names=("demo", "demo")))
    assert "no dataset" in refusal(replace(data, names=()))
    said = refusal(replace(data, names=("demo:train=64", "val=16", "test=16")))
    assert said.endswith("""quote it: --config.data.names="('demo:...,val=16',)\"""")


def test_ids_of_the_hub_and_urls_say_how_they_are_had(tmp_path, data):
    (tmp_path / "someone" / "ecg-set" / "data").mkdir(parents=True)
    save(tmp_path / "someone" / "ecg-set" / "data" / "train-00000-of-00001.parquet", rows(3))
    assert len(load(replace(data, names=("someone/ecg-set",)))) == 3, "a folder is preferred to the hub"
    said = refusal(replace(data, names=("gopher://example.org/a.parquet",)))
    assert "hf://datasets/OWNER/NAME or the URL of a table" in said


def test_every_family_has_an_example_that_it_accepts(tmp_path):
    for _, example in FAMILIES:
        open_source(example, str(tmp_path), 1)


class Hub:
    """Stands for datasets.load_dataset."""

    def __init__(self, owner=None, error=None):
        self.owner, self.error, self.asked = owner, error, []

    def __call__(self, name, split):
        from datasets.exceptions import DatasetNotFoundError

        self.asked.append((name, split))
        if self.error:
            raise self.error
        if not name.startswith(self.owner):
            raise DatasetNotFoundError(name)
        return datasets.Dataset.from_list(rows(5))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_large_json_is_read_once_and_seen_when_it_changes(tmp_path, data, suffix, monkeypatch):
    """Though its size and its time stamp stay; a column may begin with any row."""
    made = rows(30)
    made[-1] |= {"report": "Sinus rhythm.", "ecg_path": ["a.npy", "b.npy"]}
    file, data = save(tmp_path / f"a.{suffix}", made), replace(data, names=(f"a.{suffix}",))
    expected = list(load(data))
    monkeypatch.setattr("elm_jax.data.table_files.SMALL", 0)
    monkeypatch.setattr("elm_jax.data.table_files._ROWS", 7)
    records = load(data)
    assert list(records) == expected and expected[-1].report and len(pickle.dumps(records)) < 2000
    read, copy = [], table_files._copy_json
    monkeypatch.setattr(table_files, "_copy_json", lambda *args, **rest: read.append(1) or copy(*args, **rest))
    content = records.content
    assert load(data).content == content and not read
    stamp = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("question 3", "QUESTION 3"))
    os.utime(file, ns=(stamp, stamp))
    assert load(data)[3].text[1] == "QUESTION 3" and load(data).content != content and read == [1]


def test_hub_names_try_both_owners_and_number_rows_per_split(data, monkeypatch):
    hub = Hub("willxxy")
    monkeypatch.setattr("datasets.load_dataset", hub)
    records = load(replace(data, names=("ecg-qa-cot",), fold=3), "test")
    assert hub.asked == [("ELM-Research/ecg-qa-cot", "fold3_test"), ("willxxy/ecg-qa-cot", "fold3_test")]
    assert records[4].id == "ecg-qa-cot:fold3_test:4"
    assert "data.fold" in refusal(replace(data, names=("ecg-qa-cot",), fold=6))


def test_an_id_of_the_hub_has_its_own_splits_or_those_that_are_named(data, monkeypatch):
    hub = Hub("someone")
    monkeypatch.setattr("datasets.load_dataset", hub)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: ["fold1_train", "fold2_train", "extra", "dev"])
    chosen = {"fold": 2, "val_fraction": 0.0}
    for name, split, theirs in [
        ("someone/ecg-set", "train", "fold2_train"), ("someone/ecg-set", "val", "dev"),
        ("someone/ecg-set:extra", "train", "extra"), ("someone/ecg-set:fold1_test", "test", "fold1_test"),
        ("someone/ecg-set:train=extra,test=held.out", "test", "held.out"),
    ]:  # fmt: skip
        records = load(replace(data, names=(name,), **chosen), split)
        assert hub.asked[-1] == ("someone/ecg-set", theirs) and records[4].id.startswith("someone/ecg-set:")
        assert records[4].id.endswith(f":{theirs}:4") or theirs in name
    assert not load(replace(data, names=("someone/ecg-set:train=extra",), **chosen), "val")
    assert "no test records" in refusal(replace(data, names=("someone/ecg-set",)), "test")
    assert "splits as owner/name:train=stage1" in refusal(replace(data, names=("someone/ecg-set:train=a,train=b",)))
    assert "no dataset to download" in refusal(replace(data, names=("nobody/ecg-set:train",)))
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: ["stage1"])
    assert "someone/ecg-set:train=..." in refusal(replace(data, names=("someone/ecg-set",)))
    said = refusal(replace(data, names=("someone/ecg-set:train=a", "test=b")))
    assert said.endswith("""quote it: --config.data.names="('owner/name:...,test=b',)\"""")


def test_without_the_hub_the_error_says_how_to_use_a_folder(data, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", Hub(error=ConnectionError("no network")))
    said = refusal(replace(data, names=("ecg-qa-cot",)))
    assert "no network" in said and "put its parquet files into the folder ecg-qa-cot under data.root" in said


def test_the_demo_has_its_own_splits(data):
    data = replace(data, names=("demo:train=8,val=2,test=3",), val_fraction=0.5)
    found = {split: load(data, split) for split in ("train", "val", "test")}
    ids = [record.id for records in found.values() for record in records]
    assert len(ids) == len(set(ids)) and all(found.values())
    assert found["test"][0].ecg_paths[0].startswith("demo:test:")


# ---- patients, validation, subsets


@pytest.mark.parametrize(
    "path, patient",
    [
        ("../data/mimic_iv/preprocessed_2500/files_p1000_p10000032_s40689238_40689238_0.npy", "p10000032"),
        ("/tmp1/files/p1000/p10000032/s40689238/40689238", "p10000032"),
        ("data/ptb_xl/preprocessed_2500/records500_05000_05725_hr_0.npy", "05725"),
        ("records100/05000/05725_lr", "05725"),
        ("data/code15/preprocessed_500/1234_3.npy", "data/code15/preprocessed_500/1234"),
        ("mine/rec_3.npy", "mine/rec_3.npy"),
        ("noise", "set:7"),
        ("flatline", "set:7"),
    ],
)
def test_without_patient_id_the_path_tells(path, patient):
    assert patient_of(path, "set:7") == patient


def test_patient_numbers_read_as_floats_or_integers_are_the_same(tmp_path, data):
    for value in (13243, 13243.0, "13243", "13243.0"):
        save(tmp_path / "a.parquet", [{"ecg_path": "x", "text": "t", "patient_id": value}])
        assert load(data)[0].patient == "13243"


def test_a_datasets_own_val_split_is_used_whatever_val_fraction_is(tmp_path, data):
    save(tmp_path / "a.parquet", rows(20, split=["train", "val"]))
    save(tmp_path / "b.parquet", rows(20, 20))
    for fraction, others in ((0.0, 0), (0.5, 10)):
        both = replace(data, names=("a.parquet", "b.parquet"), val_fraction=fraction)
        found = Counter(record.dataset for record in load(both, "val"))
        assert found == {0: 10, **({1: others} if others else {})}
    assert len(load(replace(data, names=("b.parquet",)), "val")) == 0


SPELLINGS = (
    int, float, str, np.int32, np.int64, np.float64, "{}.0".format, " {} ".format, "{:08d}".format, "\t{}\n".format,
    "{:.9e}".format, "{:.3f}".format, Decimal,
)  # fmt: skip
BLANKS = (None, float("nan"), np.float32("nan"), "", "  ", "nan", "NaN", "None", "null", "<NA>", [], [None], "+")


@given(st.integers(0, 2**31 - 1), st.sampled_from(SPELLINGS))
def test_an_id_is_one_patient_however_it_is_spelt(number, spelling):
    assert patient_ids(spelling(number)) == (str(number),)


@given(st.sets(st.integers(0, 2**31 - 1), min_size=1, max_size=4), st.data())
def test_several_ids_are_these_patients_in_any_order_and_spelling(numbers, draw):
    spelt = [draw.draw(st.sampled_from(SPELLINGS))(n) for n in draw.draw(st.permutations(sorted(numbers)))]
    expected = tuple(sorted(map(str, numbers)))
    assert patient_ids("+".join(map(str, spelt))) == patient_ids(spelt) == expected
    assert patient_ids(json.dumps([str(s) for s in spelt])) == expected


@given(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True).filter(lambda t: t not in BLANKS))
def test_an_id_of_letters_is_itself_without_the_blanks_around_it(name):
    assert patient_ids(f" {name} ") == (name,) and patient_ids(f"{name} + 7.0") == tuple(sorted((name, "7")))


@pytest.mark.parametrize("value", BLANKS, ids=repr)
def test_an_id_that_is_not_there_is_nobody(value):
    assert patient_ids(value) == ()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_without_an_id_a_recording_is_its_own_patient(tmp_path, data, suffix):
    """NaN, null and blanks are no person whom all these recordings would be of."""
    for missing in (float("nan"), None, " "):
        save(tmp_path / f"a.{suffix}", [{"ecg_path": f"{i}.npy", "text": "t", "patient_id": missing} for i in range(9)])
        found = load(replace(data, names=(f"a.{suffix}",)))
        assert [record.patient for record in found] == [f"{i}.npy" for i in range(9)]


@settings(max_examples=25)
@given(st.data())
def test_no_patient_is_on_both_sides_however_ids_are_spelt(tmp_path_factory, draw):
    """Records of one and of two recordings, some of which do not say whose they are."""
    folder, records, owners = tmp_path_factory.mktemp("spelt"), [], []
    for _ in range(draw.draw(st.integers(4, 40))):
        ecgs = draw.draw(st.lists(st.integers(0, 19), min_size=1, max_size=2, unique=True))
        owner = [ecg // 2 for ecg in ecgs]  # two recordings of each patient
        spelt = "+".join(str(draw.draw(st.sampled_from(SPELLINGS))(number)) for number in owner)
        known = draw.draw(st.booleans())
        records.append({"ecg_path": [f"{e}.npy" for e in ecgs], "text": "t", "patient_id": spelt if known else None})
        owners.append(set(owner))
    told = [{"ecg_path": [f"{e}.npy"], "text": "t", "patient_id": str(e // 2)} for e in range(20)]
    save(folder / "a.jsonl", records + told)
    owners += [{e // 2} for e in range(20)]
    made = DataConfig(names=("a.jsonl",), root=str(folder), val_fraction=0.4)
    sides = [{p for r in load(made, s) for p in owners[int(r.id.split(":")[1])]} for s in ("train", "val")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_recordings_that_only_comparisons_say_the_patient_of_are_on_one_side(tmp_path, data):
    pairs = [{"ecg_path": [f"{i}.npy", f"{i}b.npy"], "text": "t", "patient_id": f"p{i}"} for i in range(20)]
    noise = [{"ecg_path": [f"{i}c.npy", "noise"], "text": "t", "patient_id": f"p{i}"} for i in range(20)]
    alone = [{"ecg_path": f"{i}{which}.npy", "text": "t"} for i in range(20) for which in ("", "b", "c")]
    save(tmp_path / "a.jsonl", pairs + noise + alone)
    data = replace(data, names=("a.jsonl",), val_fraction=0.3)
    found = [[path for r in load(data, side) for path in r.ecg_paths if path != "noise"] for side in ("train", "val")]
    sides = [{path.rstrip(".bcnpy") for path in paths} for paths in found]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_an_id_of_thousands_of_digits_is_itself():
    assert patient_ids("9" * 5000) == ("9" * 5000,)


def test_validation_is_whole_patients_and_the_rest_is_train(tmp_path, data):
    save(tmp_path / "a.parquet", rows(1000, patients=100))
    data = replace(data, val_fraction=0.1)
    train, val = load(data), load(data, "val")
    assert len(val) == 100 and len(train) + len(val) == 1000
    assert not {r.patient for r in train} & {r.patient for r in val}
    assert {r.id for r in val} == {r.id for r in load(data, "val")}
    assert {r.id for r in val} != {r.id for r in load(data, "val", seed=1)}


def test_a_patient_is_on_one_side_in_all_datasets(tmp_path, data):
    save(tmp_path / "a.parquet", rows(60, patients=30))
    save(tmp_path / "b.jsonl", rows(90, patients=30))
    data = replace(data, names=("a.parquet", "b.jsonl"), val_fraction=0.2)
    train, val = load(data), load(data, "val")
    assert not {r.patient for r in train} & {r.patient for r in val}
    assert {r.dataset for r in train} == {r.dataset for r in val} == {0, 1}
    assert [r.dataset for r in train] == sorted(r.dataset for r in train)


def test_a_record_about_patients_of_both_sides_is_in_neither(tmp_path, data):
    pairs = [{"ecg_path": json.dumps([f"{i}", f"{j}"]), "text": "t", "patient_id": f"{i}+{j}"}
             for i in range(12) for j in range(12) if i != j]  # fmt: skip
    save(tmp_path / "a.parquet", pairs)
    data = replace(data, val_fraction=0.3)
    people = [{p for r in load(data, s) for p in r.patient.split("+")} for s in ("train", "val")]
    assert people[0] and people[1] and not people[0] & people[1]


@pytest.mark.parametrize("patients, val", [(1, 0), (2, 10)])
def test_train_is_never_emptied_by_validation(tmp_path, data, patients, val):
    save(tmp_path / "a.parquet", rows(20, patients=patients))
    data = replace(data, val_fraction=0.02)
    assert len(load(data)) == 20 - val
    if val == 0:
        assert "no val records" in refusal(data, "val")


def test_one_large_patient_stays_in_train(tmp_path, data):
    save(tmp_path / "a.parquet", rows(500, patients=1) + rows(500, patients=500))
    data = replace(data, val_fraction=0.05)
    for seed in range(5):
        sizes = Counter(r.patient for r in load(data, "val", seed))
        assert sum(sizes.values()) == 50 and max(sizes.values()) == 1


def test_noise_records_without_patients_are_divided_too(tmp_path, data):
    save(tmp_path / "a.parquet", [{"ecg_path": "noise", "text": "t"}] * 100)
    assert len(load(replace(data, val_fraction=0.1), "val")) == 10


def test_a_subset_is_the_first_part_of_the_references_shuffle(tmp_path, data):
    save(tmp_path / "a.parquet", rows(25))
    records = load(replace(data, subset=0.3), seed=5)
    order = np.random.default_rng(5).permutation(25)[:7]
    assert sorted(r.id for r in records) == sorted(f"a.parquet:{i}" for i in order)
    assert [r.id for r in records] == [f"a.parquet:{i}" for i in order]
    assert "no train records" in refusal(replace(data, subset=0.01))


def test_subset_keeps_to_train(tmp_path, data):
    save(tmp_path / "a.parquet", rows(100, patients=50, split=["train", "train", "test"]))
    whole, part = replace(data, val_fraction=0.1), replace(data, val_fraction=0.1, subset=0.5)
    for split in ("val", "test"):
        assert [r.id for r in load(whole, split)] == [r.id for r in load(part, split)]
    assert len(load(part)) == len(load(whole)) // 2


# ---- processes and imports


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_records_pickle(tmp_path, data, suffix):
    save(tmp_path / f"a.{suffix}", rows(30))
    records = load(replace(data, names=(f"a.{suffix}",), val_fraction=0.2))
    again = pickle.loads(pickle.dumps(records))
    assert list(again) == list(records)


def test_a_parquet_source_pickles_by_reference(tmp_path, data):
    save(tmp_path / "a.parquet", [{"ecg_path": f"{i}", "text": "x" * 1000 + str(i)} for i in range(3000)])
    assert len(pickle.dumps(load(data))) < 200_000


def test_the_data_modules_import_no_jax():
    code = (
        "import sys, elm_jax.data.sources, elm_jax.data.represent, elm_jax.data.tables, elm_jax.prepare;"
        "assert not {'jax', 'wfdb', 'scipy', 'datasets', 'pandas'} & set(sys.modules), 'slow to import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
