"""Labelled recordings: of databases as they are downloaded, and of tables of one's own."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_jax.data.labels import SNOMED, TASKS, read_labels
from elm_jax.errors import UserError

STATEMENTS = (
    ",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass\n"
    "NORM,normal ECG,1.0,,,NORM,NORM\nIMI,inferior infarction,1.0,,,MI,IMI\nAMI,anterior infarction,1.0,,,MI,AMI\n"
    "AFIB,atrial fibrillation,,,1.0,,\nSR,sinus rhythm,,,1.0,,\n"
)
CODES = ("{'NORM': 100.0, 'SR': 0.0}", "{'IMI': 15.0, 'AMI': 0.0}", "{'AFIB': 0.0}", "{'NORM': 80.0}")


def ptb_xl(folder: Path, folds: tuple[int, ...] = (1, 9, 10, 10)) -> Path:
    (folder / "scp_statements.csv").write_text(STATEMENTS)
    with (folder / "ptbxl_database.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ecg_id", "patient_id", "report", "scp_codes", "strat_fold", "filename_lr", "filename_hr"])
        for number, (codes, fold) in enumerate(zip(CODES, folds, strict=True), 1):
            name = f"00000/0000{number}"
            paths = f"records100/{name}_lr", f"records500/{name}_hr"
            writer.writerow([number, f"{min(number, 3)}.0", "", codes, fold, *paths])
    return folder


def test_ptb_xl_by_its_folds_and_families(tmp_path: Path) -> None:
    found = read_labels("ptbxl_super", str(ptb_xl(tmp_path)))
    assert dict(found.classes) == {"NORM": ["normal ECG"], "MI": ["inferior infarction", "anterior infarction"]}
    assert [(r.path, r.patient, r.split, set(r.labels)) for r in found.records] == [
        ("records100/00000/00001_lr", "1", "train", {"NORM"}), ("records100/00000/00002_lr", "2", "val", {"MI"}),
        ("records100/00000/00004_lr", "3", "test", {"NORM"}),
    ]  # fmt: skip
    rhythm = read_labels("ptbxl_rhythm", str(tmp_path))
    assert [set(r.labels) for r in rhythm.records] == [{"SR"}, {"AFIB"}]


def header(folder: Path, name: str, codes: str) -> None:
    (folder / f"{name}.hea").write_text(f"{name} 1 500 5000\n{name}.mat 16 1000/mV 16 0 0 0 0 I\n# Dx: {codes}\n")


def test_headers_with_snomed_codes(tmp_path: Path) -> None:
    (tmp_path / "g1").mkdir()
    header(tmp_path / "g1", "E1", "713427006,164889003")
    header(tmp_path, "E2", "59118001")
    header(tmp_path, "E3", "999")  # of no class: no part of the task
    georgia = read_labels("georgia", str(tmp_path))
    assert {r.path: set(r.labels) for r in georgia.records} == {"E2": {"RBBB"}, "g1/E1": {"RBBB", "AF"}}
    assert {r.path: set(r.labels) for r in read_labels("csn", str(tmp_path)).records}["g1/E1"] == {"AFIB"}
    assert {r.path: set(r.labels) for r in read_labels("cpsc", str(tmp_path)).records}["g1/E1"] == {"AF"}


def test_every_code_has_one_class_of_a_task() -> None:
    with SNOMED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["snomed"] for row in rows}) == len(rows) and all(row["meaning"] for row in rows)
    counts = {task: len({row[task] for row in rows} - {""}) for task in ("csn", "georgia", "cpsc")}
    assert counts == {"csn": 38, "georgia": 26, "cpsc": 9}


def test_cpsc_by_its_reference(tmp_path: Path) -> None:
    columns = "Recording,First_label,Second_label,Third_label\n"
    (tmp_path / "REFERENCE.csv").write_text(f"{columns}A1,1,,\nA2,2,5,\n")
    found = read_labels("cpsc", str(tmp_path))
    assert [(r.path, set(r.labels)) for r in found.records] == [("A1.mat", {"NORM"}), ("A2.mat", {"AF", "RBBB"})]
    (tmp_path / "TrainingSet1").mkdir()
    (tmp_path / "TrainingSet1/A2.mat").touch()
    assert [r.path for r in read_labels("cpsc", str(tmp_path)).records] == ["A1.mat", "TrainingSet1/A2.mat"]
    (tmp_path / "REFERENCE.csv").write_text(f"{columns}A1,12,,\n")
    with pytest.raises(UserError, match=r"line 2.*\['12'\].*1 to 9"):
        read_labels("cpsc", str(tmp_path))


def test_tables_of_ones_own(tmp_path: Path) -> None:
    named = tmp_path / "named.csv"
    named.write_text("ecg_path,labels,patient_id,split\na.npy,AF; PVC,7,train\nb.npy,,8.0,dev\nc.npy,PVC,9,test\n")
    found = read_labels("table", str(named))
    assert [(r.patient, r.split, set(r.labels)) for r in found.records] == [
        ("7", "train", {"AF", "PVC"}), ("8", "val", set()), ("9", "test", {"PVC"}),
    ]  # fmt: skip
    assert found.root == tmp_path and dict(found.classes) == {"AF": ["AF"], "PVC": ["PVC"]}
    columns = {"ecg_path": ["a", "b", "c"], "age": [50, 60, 70], "AF": [0, 1, 0], "PVC": [1, 0, 0]}
    columns["strat_fold"] = [1, 9, 10]
    pq.write_table(pa.table(columns), tmp_path / "wide.parquet")
    wide = read_labels("table", str(tmp_path / "wide.parquet"))
    assert [(r.split, set(r.labels)) for r in wide.records] == [("train", {"PVC"}), ("val", {"AF"}), ("test", set())]
    lists = {"ecg_path": ["a", "b"], "labels": [["AF"], None], "patient_id": ["1", "1"]}
    pq.write_table(pa.table(lists), tmp_path / "lists.parquet")
    records = read_labels("table", str(tmp_path / "lists.parquet")).records
    assert [set(r.labels) for r in records] == [{"AF"}, set()]
    assert len({r.split for r in records}) == 1, "a patient is in one split"


def test_patients_are_split_where_a_table_does_not(tmp_path: Path) -> None:
    rows = "".join(f"{i}.npy,{'AF' if i % 2 else ''},{i // 2}\n" for i in range(400))
    (tmp_path / "t.csv").write_text(f"ecg_path,labels,patient_id\n{rows}")
    found = read_labels("table", str(tmp_path / "t.csv"))
    counts = Counter(r.split for r in found.records)
    assert 20 < counts["val"] < 60 and 50 < counts["test"] < 110
    assert found.records == read_labels("table", str(tmp_path / "t.csv")).records
    assert len({(r.patient, r.split) for r in found.records}) == 200
    shared = "".join(f"s{i}.npy,AF,{i}+{i + 1}\n" for i in range(0, 200, 2))
    (tmp_path / "t.csv").write_text(f"ecg_path,labels,patient_id\n{rows}{shared}")
    assert len({(r.patient, r.split) for r in read_labels("table", str(tmp_path / "t.csv")).records}) == 100


@pytest.mark.parametrize(("text", "expected"), [
    ("ecg_path,labels\na,\nb,\n", "none with a class"),
    ("ecg_path,labels\n", "columns none"),
    ("path,labels\na,AF\n", "columns path, labels"),
    ("ecg_path,age\na,50\nb,60\n", "columns ecg_path, age"),
    ("ecg_path,labels\n,AF\n", "line 2.*no ecg_path"),
    ("ecg_path,labels,split\na,AF,holdout\n", "line 2.*'holdout'"),
    ("ecg_path,labels,patient_id,split\na,AF,1,train\nb,,1,test\n", "patient 1 in test and train"),
    ("ecg_path,labels,patient_id,split\na,AF,17+23,train\nb,,23,test\n", "patient 17 in test and train"),
    ('ecg_path,labels\na,"[AF"\n', "JSON list"),
])  # fmt: skip
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=expected):
        read_labels("table", str(tmp_path / "t.csv"))


def test_tasks_and_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'ptbxl_supper'.*one of {', '.join(TASKS)}.*did you mean 'ptbxl_super'"):
        read_labels("ptbxl_supper", None)
    for task in ("ptbxl_form", "csn", "cpsc", "table"):
        with pytest.raises(UserError, match=r"--labels.*nowhere"):
            read_labels(task, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="0 recordings, none with a class of csn"):
        read_labels("csn", str(tmp_path))


def test_real_recordings_have_their_labels(shared: Path) -> None:
    real = shared / "real/ecg"
    found = {task: read_labels(task, str(real / folder)) for task, folder in (
        ("ptbxl_super", "ptbxl"), ("ptbxl_sub", "ptbxl"), ("ptbxl_form", "ptbxl"), ("ptbxl_rhythm", "ptbxl"),
        ("georgia", "cinc2021"), ("csn", "cinc2021"), ("cpsc", "cpsc2018"),
    )}  # fmt: skip
    assert {task: len(table.classes) for task, table in found.items()} == {
        "ptbxl_super": 5, "ptbxl_sub": 23, "ptbxl_form": 19, "ptbxl_rhythm": 12, "georgia": 26, "csn": 38, "cpsc": 9,
    }  # fmt: skip
    assert all(len(table.records) >= 7 for table in found.values())
    assert {r.split for r in found["ptbxl_super"].records} == {"train", "val", "test"}
