"""Preparation: segments as the reference reads them, tables, splits by patient, what is damaged."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import wfdb

from elm_jax.config import DataConfig
from elm_jax.data.prepare import register_dataset
from elm_jax.data.prepare.ecg_qa import Settings, prepare_ecg_qa
from elm_jax.data.prepare.ptb_xl import PTB_XL, read_index
from elm_jax.data.prepare.raw import RawRecording
from elm_jax.data.prepare.runner import prepare_dataset
from elm_jax.data.prepare.splits import leaks, split_of
from elm_jax.data.represent import SignalSpec
from elm_jax.data.sources import load_records
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.ecg.resampling import resample, resample_by_spline
from elm_jax.errors import UserError
from elm_jax.folders import write_atomic

FIELDS = ("ecg_id", "patient_id", "report", "strat_fold", "filename_lr", "filename_hr")


def write_index(raw, entries):
    with open(raw / "ptbxl_database.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(entries)


def make_raw(raw, count=6, samples=1000):
    """`count` records of 500 Hz with shuffled lead names; two records a patient; folds 8, 9, 10."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    order = [LEADS[i].upper() for i in rng.permutation(12)]
    entries = []
    for i in range(1, count + 1):
        hr = f"records500/00000/{i:05d}_hr"
        (raw / hr).parent.mkdir(parents=True, exist_ok=True)
        wfdb.wrsamp(
            Path(hr).name, fs=500, units=["mV"] * 12, sig_name=order, fmt=["16"] * 12,
            p_signal=rng.normal(size=(samples, 12)), write_dir=str((raw / hr).parent),
        )  # fmt: skip
        entries.append([i, f"{(i + 1) // 2}.0", f"befund nr. {i}, größe", 8 + ((i + 1) // 2) % 3, "lr", hr])
    write_index(raw, entries)
    return raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw(tmp_path_factory.mktemp("raw") / "ptbxl")


def prepare(raw, out, **kwargs):
    return prepare_dataset("ptb_xl", PTB_XL, raw, out, length=200, progress=False, **kwargs)


def question(ids, kind="single-verify", answer=("yes",), number=0):
    asked = {"question_type": kind, "question": f"Is it {number}?", "answer": list(answer)}
    return {**asked, "ecg_id": list(ids), "sample_id": number}


def make_questions(folder, questions, form="paraphrased", split="train"):
    path = folder / form / split / "1.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(questions))
    return folder


def table(path):
    return pq.read_table(path).to_pylist()


# ---- PTB-XL


def test_segments_are_what_the_reference_reads(raw, tmp_path):
    report = prepare(raw, tmp_path)
    assert (report["records"], report["segments"], report["missing"]) == (6, 12, {})
    path = tmp_path / "ptb_xl/preprocessed_200/records500_00000_00003_hr_1.npy"
    content = np.load(path, allow_pickle=True).item()
    source = read_ecg(raw / "records500/00000/00003_hr")
    assert content["ecg"].dtype == np.float64 and content["ecg"].shape == (12, 200)
    np.testing.assert_allclose(content["ecg"], resample(source.signal, 500, 250)[:, 200:400], atol=1e-5)
    assert content["report"] == "befund nr. 3, größe"
    assert (content["original_sf"], content["target_sf"], content["segment_len"]) == (500, 250, 200)
    assert content["ecg_path"] == "records500/00000/00003_hr"
    assert tmp_path / content["npy_path"] == path
    ours = read_ecg(path)
    np.testing.assert_array_equal(ours.signal, content["ecg"].astype(np.float32))
    assert ours.sampling_rate == 250 and ours.report == content["report"]


def test_the_order_of_leads_is_in_the_file_so_that_its_folder_does_not_matter(raw, tmp_path):
    prepare(raw, tmp_path)
    path = tmp_path / "ptb_xl/preprocessed_200/records500_00000_00001_hr_0.npy"
    moved = tmp_path / "mimic_iv" / "preprocessed_200" / "a.npy"
    moved.parent.mkdir(parents=True)
    path.rename(moved)
    source = read_ecg(raw / "records500/00000/00001_hr").signal
    np.testing.assert_allclose(read_ecg(moved).signal, resample(source, 500, 250)[:, :200], atol=1e-5)


def test_segments_are_resampled_as_the_reference_does_by_its_name_and_folders_are_not_mixed(raw, tmp_path):
    assert prepare(raw, tmp_path, compat=("elm-2026-04",))["resampling"] == "spline"
    source = read_ecg(raw / "records500/00000/00001_hr").signal
    found = np.load(tmp_path / "ptb_xl/preprocessed_200/records500_00000_00001_hr_0.npy", allow_pickle=True).item()
    np.testing.assert_allclose(found["ecg"], resample_by_spline(source, 500, 250)[:, :200], atol=1e-5)
    with pytest.raises(UserError, match="found segments made with resampling spline; expected resampling low-pass"):
        prepare(raw, tmp_path)
    report, settings = tmp_path / "ptb_xl_report.json", tmp_path / "ptb_xl/preprocessed_200/settings.json"
    report.rename(tmp_path / "kept")  # of a run that was stopped before its end there is none
    with pytest.raises(UserError, match="settings.json: found segments made with resampling spline"):
        prepare(raw, tmp_path)
    (tmp_path / "kept").rename(report)
    settings.unlink()  # which earlier versions did not write
    before = json.loads(report.read_text())
    del before["resampling"]
    report.write_text(json.dumps(before))
    with pytest.raises(UserError, match="resampling of an earlier version"):
        prepare(raw, tmp_path)
    report.rename(tmp_path / "prepare_report.json")  # as it was called once
    with pytest.raises(UserError, match="resampling of an earlier version"):
        prepare(raw, tmp_path)
    (tmp_path / "prepare_report.json").write_bytes(b"[]")  # which is none
    assert prepare(raw, tmp_path)["resampling"] == "low-pass"


def test_the_tables_load_and_split_by_the_official_folds(raw, tmp_path):
    report = prepare(raw, tmp_path)
    assert report["rows"] == {"train": 4, "val": 4, "test": 4} and report["patients"] == 3
    assert report["patients_in_several_splits"] == {}
    data = DataConfig(names=("ptb_xl_reports.parquet",), root=str(tmp_path))
    records = load_records(data, "val", 0)
    assert len(records) == 4 and {r.patient for r in records} == {"1"}
    assert (
        records[0].text[1] == {"from": "gpt", "value": "befund nr. 1, größe"} and records[0].name == "report"
    )
    plain = load_records(replace(data, names=("ptb_xl_pretrain.parquet",)), "val", 0)
    assert plain[0].text == "befund nr. 1, größe"
    spec = SignalSpec(str(tmp_path), tuple(range(12)), 200, 250, 1e-6, None, 0)
    assert spec.load(records[0].ecg_paths[0], key=0).shape == (12, 200)


def test_a_second_run_keeps_what_is_complete_and_mends_the_rest(raw, tmp_path):
    first = prepare(raw, tmp_path)
    folder = tmp_path / "ptb_xl/preprocessed_200"
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    gone = folder / "records500_00000_00002_hr_0.npy"
    gone.unlink()
    second = prepare(raw, tmp_path)
    assert second["already_there"] == 5 and second["segments"] == first["segments"] and gone.exists()
    kept = [path for path in stamps if "00002_hr" not in path.name]
    assert all(path.stat().st_mtime_ns == stamps[path] for path in kept)
    left = {path.name for path in folder.iterdir()} - {path.name for path in stamps}
    assert left == {"signals.jsonl", "settings.json"}, "a temporary file was left"
    with pytest.raises(UserError, match="sampling_rate 250"):
        prepare(raw, tmp_path, sampling_rate=500)


def test_missing_damaged_and_short_records_are_listed_and_the_rest_prepared(tmp_path):
    raw = make_raw(tmp_path / "raw")
    (raw / "records500/00000/00001_hr.hea").unlink()
    (raw / "records500/00000/00002_hr.dat").write_bytes(b"short")
    make_raw(tmp_path / "other", 1, samples=300)
    for suffix in ("hea", "dat"):
        source = tmp_path / f"other/records500/00000/00001_hr.{suffix}"
        text = source.read_bytes().replace(b"00001_hr", b"00003_hr")
        (raw / f"records500/00000/00003_hr.{suffix}").write_bytes(text)
    report = prepare(raw, tmp_path / "out")
    assert report["records"] == 3
    assert list(report["missing"]) == ["records500/00000/00001_hr"]
    assert list(report["unreadable"]) == ["records500/00000/00002_hr"]
    assert list(report["too_short"]) == ["records500/00000/00003_hr"]
    assert json.loads((tmp_path / "out/ptb_xl_report.json").read_text()) == report


def test_nothing_usable_is_an_error_that_names_the_first(tmp_path):
    raw = make_raw(tmp_path / "raw", 2)
    for path in raw.glob("records500/*/*.hea"):
        path.unlink()
    with pytest.raises(UserError, match="no usable record .2 missing; records500/00000/00001_hr"):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../other/records500/00000/00001_hr", "/RAW/records500/00000/00001_hr", ""])
def test_an_index_may_not_lead_out_of_its_folder(tmp_path, path):
    raw = make_raw(tmp_path / "raw", 1)
    make_raw(tmp_path / "other", 1)
    path = path.replace("/RAW", str(tmp_path / "other"))
    inside = RawRecording("records500/00000/00001_hr", "1", "train", "x")
    hostile = replace(PTB_XL, recordings=lambda _: [RawRecording(path, "2", "train", "x"), inside])
    report = prepare_dataset("ptb_xl", hostile, raw, tmp_path / "out", length=200, progress=False)
    assert report["records"] == 1 and report["missing"] == {path: "not a path below the raw folder"}


def test_recordings_that_would_be_kept_under_one_name_are_refused(tmp_path):
    alike = [RawRecording(path, "1", "train", "x") for path in ("a/b_c", "a_b/c")]
    with pytest.raises(UserError, match="found a/b_c and a_b/c; expected recordings that differ"):
        prepare_dataset("mine", replace(PTB_XL, recordings=lambda _: alike), tmp_path, tmp_path / "out", progress=False)
    alike = [RawRecording("a.h5", row=row) for row in (0, 1)]
    with pytest.raises(UserError, match="found a.h5, row 0 and a.h5, row 1; expected .* rows that have names"):
        prepare_dataset("mine", replace(PTB_XL, recordings=lambda _: alike), tmp_path, tmp_path / "out", progress=False)


def test_a_dataset_is_not_registered_under_a_name_that_is_taken():
    for name in ("ptb_xl", "ecg_qa", "a-b"):
        with pytest.raises(UserError, match="DATASET"):
            register_dataset(name, PTB_XL)


def test_records_without_a_report_are_prepared_but_ask_for_none(tmp_path):
    raw = make_raw(tmp_path / "raw", 2)
    write_index(
        raw,
        [[1, 1.0, " ", 1, "", "records500/00000/00001_hr"], [2, 2, "x", 1, "", "records500/00000/00002_hr"]],
    )
    report = prepare(raw, tmp_path / "out")
    assert report["records"] == 2 and report["without_report"] == 1 and report["rows"]["train"] == 2
    rows = table(tmp_path / "out/ptb_xl_records.parquet")
    assert [(row["patient_id"], row["split"]) for row in rows] == [("1", "train")] * 2 + [("2", "train")] * 2
    assert list(rows[0]) == ["ecg_path", "report", "patient_id", "split"]
    data = DataConfig(names=("ptb_xl_records.parquet",), root=str(tmp_path / "out"), val_fraction=0.0)
    assert [record.text for record in load_records(data, "train", 0)] == [None, None, "x", "x"]


def test_what_was_noted_of_a_recording_is_replaced_when_it_is_prepared_again(tmp_path):
    raw = make_raw(tmp_path / "raw", 2)
    prepare(raw, tmp_path / "out")
    folder = tmp_path / "out/ptb_xl/preprocessed_200"
    stems = [f"records500_00000_0000{number}_hr" for number in (1, 2)]
    notes = "".join(json.dumps({"name": stem, "flat": "I: as it was"}) + "\n" for stem in stems)
    (folder / "signals.jsonl").write_text(notes)
    (folder / f"{stems[0]}_0.npy").unlink()
    assert prepare(raw, tmp_path / "out")["flat"] == {"records500/00000/00002_hr": "I: as it was"}


def test_a_bad_index_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"ptbxl_database.csv"):
        read_index(tmp_path / "ptbxl_database.csv")
    write_index(tmp_path, [[1, 1, "r", 1, "a", "b"], [2, "", "r", 1, "a", "b"]])
    with pytest.raises(UserError, match="line 3"):
        read_index(tmp_path / "ptbxl_database.csv")
    (tmp_path / "ptbxl_database.csv").write_text("ecg_id,patient\n")
    with pytest.raises(UserError, match="no column patient_id.*did you mean 'patient'"):
        read_index(tmp_path / "ptbxl_database.csv")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("before")

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomic(tmp_path / "a", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"
    with pytest.raises(UserError):
        write_atomic(tmp_path / "a" / "b", fail)


# ---- splits


def test_a_planted_leak_is_found():
    rows = [("train", ["1"]), ("test", ["2"]), ("train", ["3", "1"])]
    assert leaks(rows) == {}
    assert leaks([*rows, ("val", ["4", "2"])]) == {"2": ("test", "val")}


def test_splits_have_the_sizes_asked_for_and_depend_on_the_patient_alone():
    people = [str(i) for i in range(5000)]
    splits = [split_of(p, 0, 0.1, 0.2) for p in people]
    assert abs(splits.count("test") / 5000 - 0.2) < 0.02 and abs(splits.count("val") / 5000 - 0.1) < 0.02
    assert splits != [split_of(p, 1, 0.1, 0.2) for p in people]
    smaller = [split_of(p, 0, 0.1, 0.1) for p in people]
    assert all(a == "test" for a, b in zip(splits, smaller, strict=True) if b == "test"), "tests only grow"


# ---- ECG-QA


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    prepare(raw, out)
    return out


def ask(raw_questions, prepared, out, **settings):
    records = prepared / "ptb_xl/preprocessed_200"
    return prepare_ecg_qa(raw_questions, records, out, settings=Settings(**settings), progress=False)


def test_a_row_is_a_question_about_a_segment(prepared, tmp_path):
    folder = make_questions(tmp_path, [question([3], answer=["a", "b"]), question([999])])
    report = ask(folder, prepared, tmp_path / "q.parquet")
    assert (report["questions"], report["single"], report["without_recording"], report["recordings"]) == (
        2,
        1,
        1,
        1,
    )
    rows = table(tmp_path / "q.parquet")
    assert [row["ecg_path"] for row in rows] == [
        f"ptb_xl/preprocessed_200/records500_00000_00003_hr_{i}.npy" for i in (0, 1)
    ]
    assert json.loads(rows[0]["text"]) == ["single-verify", "Is it 0?", ["a", "b"]]
    assert rows[0]["name"] == "single-verify" and rows[0]["patient_id"] == "2"
    records = load_records(
        DataConfig(names=(str(tmp_path / "q.parquet"),), val_fraction=0.0), rows[0]["split"], 0
    )
    assert records[0].text == ["single-verify", "Is it 0?", ["a", "b"]]
    assert json.loads((tmp_path / "q_report.json").read_text()) == report


def test_comparisons_keep_both_paths_in_order_and_both_patients(prepared, tmp_path):
    folder = make_questions(tmp_path, [question([5, 2], "comparison_irrelevant-query")])
    assert ask(folder, prepared, tmp_path / "q.parquet", test=0.0, val=0.0)["comparison"] == 1
    row = table(tmp_path / "q.parquet")[1]
    assert [Path(p).name for p in json.loads(row["ecg_path"])] == [
        f"records500_00000_{ecg}_hr_1.npy" for ecg in ("00005", "00002")
    ]
    assert row["patient_id"] == "1+3"
    with pytest.raises(UserError, match="none of 1 questions"):
        ask(folder, prepared, tmp_path / "q.parquet", single_only=True)


def test_questions_about_mimic_find_studies_and_know_patients_by_the_paths(tmp_path):
    folder = tmp_path / "O" / "mimic_iv" / "preprocessed_2500"
    folder.mkdir(parents=True)
    for subject, study in ((10000032, 40689238), (10000032, 40689239), (10000117, 49150101)):
        (folder / f"files_p1000_p{subject}_s{study}_{study}_0.npy").touch()
    raw = tmp_path / "ecgqa"
    questions = [question([40689238]), question([40689239, 49150101], "comparison_irrelevant-verify"), question([7])]
    make_questions(raw / "mimic-iv-ecg", questions)
    report = prepare_ecg_qa(raw, folder, tmp_path / "O" / "qa.parquet", None, Settings("official"), progress=False)
    rows = table(tmp_path / "O" / "qa.parquet")
    assert [row["patient_id"] for row in rows] == ["10000032", "10000032+10000117"]
    assert rows[0]["ecg_path"] == "mimic_iv/preprocessed_2500/files_p1000_p10000032_s40689238_40689238_0.npy"
    assert report["without_recording"] == 1
    with pytest.raises(UserError, match="strat_fold; expected patient or official"):
        prepare_ecg_qa(raw, folder, tmp_path / "O" / "qa.parquet", None, Settings("strat_fold"), progress=False)


def test_no_patient_is_in_two_splits_and_what_would_cross_is_left_out(prepared, tmp_path):
    pairs = [question([i, j], "comparison") for i in range(1, 7) for j in range(1, 7) if i != j]
    folder = make_questions(tmp_path, pairs + [question([i]) for i in range(1, 7)])
    report = ask(folder, prepared, tmp_path / "q.parquet", val=0.3, test=0.3)
    assert len([n for n in report["rows"].values() if n]) > 1, (
        "choose another seed: all patients in one split"
    )
    assert report["across_splits"] > 0 and report["single"] == 6
    assert report["patients_in_several_splits"] == {}
    rows = table(tmp_path / "q.parquet")
    assert leaks((row["split"], row["patient_id"].split("+")) for row in rows) == {}


def test_official_splits_are_kept_and_a_leak_in_them_is_reported(prepared, tmp_path):
    folder = make_questions(tmp_path, [question([1])])
    make_questions(tmp_path, [question([2])], split="valid")
    make_questions(tmp_path, [question([5])], split="test")
    report = ask(folder, prepared, tmp_path / "q.parquet", split="official")
    assert report["rows"] == {"train": 2, "val": 2, "test": 2}
    assert report["patients_in_several_splits"] == {"1": ("train", "val")}, "records 1 and 2 are of patient 1"


def test_the_folds_of_ptb_xl_may_split_too(prepared, raw, tmp_path):
    folder = make_questions(tmp_path, [question([i]) for i in range(1, 7)])
    splits = [ask(folder, prepared, tmp_path / "q.parquet", split="strat_fold")["rows"]]
    records = prepared / "ptb_xl/preprocessed_200"
    settings = Settings("strat_fold")
    csv_path = raw / "ptbxl_database.csv"
    splits.append(prepare_ecg_qa(folder, records, tmp_path / "r.parquet", csv_path, settings, False)["rows"])
    assert splits == [{"train": 4, "val": 4, "test": 4}] * 2


def test_folds_of_prepare_are_not_taken_for_those_of_ptb_xl(raw, tmp_path):
    folder = make_questions(tmp_path, [question([1])])
    for rule in ({"folds": 2}, {"split": "patient"}):
        prepare(raw, tmp_path / "out", **rule)
        with pytest.raises(UserError, match="with other splits than its own; .*give --ptbxl-csv"):
            ask(folder, tmp_path / "out", tmp_path / "q.parquet", split="strat_fold")
    assert ask(folder, tmp_path / "out", tmp_path / "q.parquet")["single"] == 1


def test_both_forms_of_a_question_are_rows_when_asked_for(prepared, tmp_path):
    folder = make_questions(tmp_path, [question([1])])
    make_questions(folder, [question([1])], "template")
    assert ask(folder, prepared, tmp_path / "q.parquet")["single"] == 1
    assert ask(folder, prepared, tmp_path / "q.parquet", forms=("paraphrased", "template"))["single"] == 2
    assert {row["form"] for row in table(tmp_path / "q.parquet")} == {"paraphrased", "template"}


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "1.json: found an unreadable file"),
        ("{}", "a JSON dict"),
        ("[1]", "question 1: found no str question_type"),
        (json.dumps([question(["x"])]), "ecg_id"),
        (json.dumps([question([1]), question([])]), "question 2"),
        (json.dumps([{**question([1]), "answer": "yes"}]), "no list answer"),
    ],
)
def test_malformed_questions_are_named(prepared, tmp_path, content, says):
    folder = make_questions(tmp_path, [])
    (folder / "paraphrased/train/1.json").write_text(content)
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        ask(folder, prepared, tmp_path / "q.parquet")
    assert not (tmp_path / "q.parquet").exists()


def test_what_is_not_there_is_named(prepared, raw, tmp_path):
    with pytest.raises(UserError, match="no folder paraphrased"):
        ask(tmp_path, prepared, tmp_path / "q.parquet")
    (tmp_path / "paraphrased").mkdir()
    with pytest.raises(UserError, match=r"no \.json file"):
        ask(tmp_path, prepared, tmp_path / "q.parquet")
    folder = make_questions(tmp_path, [question([1])])
    with pytest.raises(UserError, match="no segments of PTB-XL or MIMIC-IV-ECG"):
        prepare_ecg_qa(folder, tmp_path / "nowhere", tmp_path / "q.parquet", progress=False)
    write_index(tmp_path, [[2, 1, "r", 1, "", ""]])
    with pytest.raises(UserError, match="no patient of recording 1"):
        records = prepared / "ptb_xl/preprocessed_200"
        prepare_ecg_qa(
            folder, records, tmp_path / "q.parquet", tmp_path / "ptbxl_database.csv", progress=False
        )


# ---- the real thing


def test_real_recordings_and_questions(shared, tmp_path):
    """225 recordings; 220 questions on 95 of them, and comparisons."""
    raw = shared / "real/ecg/ptbxl"
    report = prepare_dataset("ptb_xl", PTB_XL, raw, tmp_path, progress=False)
    assert (report["records"], report["segments"], report["patients"]) == (225, 225, 205)
    assert not report["missing"] and not report["patients_in_several_splits"]
    path = tmp_path / "ptb_xl/preprocessed_2500/records500_00000_00002_hr_0.npy"
    content = np.load(path, allow_pickle=True).item()
    assert content["report"] == "sinusbradykardie sonst normales ekg" and content["ecg"].shape == (12, 2500)
    one, two = content["ecg"][:2]
    assert np.abs(content["ecg"][4] - (one - two / 2)).max() < 0.01, "row 4 is not aVL"
    questions = shared / "real/text/ecgqa/ptbxl"
    records = tmp_path / "ptb_xl/preprocessed_2500"
    single = Settings(single_only=True)
    report = prepare_ecg_qa(questions, records, tmp_path / "single.parquet", settings=single, progress=False)
    assert (report["single"], report["recordings"], report["patients"]) == (220, 95, 85)
    assert not report["patients_in_several_splits"] and all(report["rows"].values())
    official = Settings("official")
    report = prepare_ecg_qa(
        questions, records, tmp_path / "official.parquet", settings=official, progress=False
    )
    assert (report["single"], report["comparison"], report["across_splits"]) == (220, 61, 0)
    assert not report["patients_in_several_splits"]
    data = DataConfig(names=("official.parquet",), root=str(tmp_path), val_fraction=0.0)
    for record in load_records(data, "train", 0):
        assert all((tmp_path / path).is_file() for path in record.ecg_paths)


def test_the_official_lists_agree_with_the_folders_of_the_questions(shared):
    folder = shared / "real/text/ecgqa/ptbxl"
    lists = {
        split: {int(line.split("\t")[1]) for line in (folder / f"{split}_ecgs.tsv").read_text().splitlines()}
        for split in ("train", "valid", "test")
    }
    assert not any(a & b for a, b in pairwise([*lists.values(), lists["train"]]))
    for split, ids in lists.items():
        for file in folder.glob(f"*/{split}/*.json"):
            asked = {ecg for item in json.loads(file.read_text()) for ecg in item["ecg_id"]}
            assert asked <= ids, file
