"""Text files of others: a byte order mark at their beginning is none of their text; damaged ones are refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from elm_jax.config import DataConfig
from elm_jax.data.dataset import read_system_prompt
from elm_jax.data.prepare.ecg_qa import Settings, prepare_ecg_qa
from elm_jax.data.prepare.ptb_xl import INDEX as DATABASE
from elm_jax.data.prepare.ptb_xl import STATEMENTS, _rows, read_index
from elm_jax.data.sources import load_records
from elm_jax.errors import UserError
from elm_jax.symbols.corpus import find_recordings

MARK = b"\xef\xbb\xbf"
FIELDS = ("ecg_id", "patient_id", "report", "strat_fold", "filename_lr", "filename_hr")


def index(folder, *rows):
    path = folder / DATABASE
    path.write_bytes(b"\n".join([",".join(FIELDS).encode(), *rows, b""]))
    return path


def marked(path):
    path.write_bytes(MARK + path.read_bytes())
    return path


def test_an_index_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    path = marked(index(tmp_path, "1,1,größe,1,a,b".encode()))
    assert [(entry.ecg_id, entry.report) for entry in read_index(path)] == [(1, "größe")]


def test_a_table_of_statements_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    with (tmp_path / STATEMENTS).open("w", newline="") as file:
        csv.writer(file).writerows([["code", "kind"], ["NORM", "1"]])
    assert _rows(marked(tmp_path / STATEMENTS), ["code"]) == [{"code": "NORM", "kind": "1"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_behind_a_byte_order_mark_are_read(tmp_path, name):
    record = {"ecg_path": "a.npy", "text": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]}
    (tmp_path / name).write_text(json.dumps([record] if name.endswith(".json") else record))
    marked(tmp_path / name)
    data = replace(DataConfig(root=str(tmp_path), val_fraction=0.0), names=(name,))
    assert load_records(data, "train", 0)[0].ecg_paths == ("a.npy",)


def test_questions_behind_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "paraphrased/train").mkdir(parents=True)
    asked = {"question_type": "single-verify", "question": "?", "answer": ["yes"], "ecg_id": [1], "sample_id": 0}
    (tmp_path / "paraphrased/train/1.json").write_text(json.dumps([asked]))
    marked(tmp_path / "paraphrased/train/1.json")
    records = tmp_path / "ptb_xl/preprocessed_40"
    records.mkdir(parents=True)
    np.save(records / "records500_00000_00001_hr_0.npy", np.zeros((12, 40)))
    path = index(tmp_path, b"1,1,r,1,a,records500/00000/00001_hr")
    found = prepare_ecg_qa(tmp_path, records, tmp_path / "q.parquet", path, Settings(test=0.0, val=0.0), False)
    assert found["questions"] == found["single"] == 1


def test_lists_and_system_prompts_may_begin_with_a_byte_order_mark(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((12, 40)))
    (tmp_path / "list.txt").write_bytes(MARK + b"a.npy\n")
    assert find_recordings([tmp_path / "list.txt"]) == [tmp_path / "a.npy"]
    (tmp_path / "prompt.txt").write_bytes(MARK + b"You read ECGs.\n")
    assert read_system_prompt(str(tmp_path / "prompt.txt")) == "You read ECGs."


@pytest.mark.parametrize(
    "row", [b"1,inf,r,1,a,b", b"1,1e999,r,1,a,b", b"1,1,r\xff,1,a,b", b"1,1," + b"r" * 200_000 + b",1,a,b"]
)
def test_an_index_that_is_damaged_is_refused_with_advice_for_a_damaged_file(tmp_path, row):
    with pytest.raises(UserError, match="correct the line|download it again"):
        read_index(index(tmp_path, row))
