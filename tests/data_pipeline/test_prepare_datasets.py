"""The rows of `prepare`: what each makes of its download, against the reference's own files where there are some."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import goldens
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import wfdb

from elm_jax import cli
from elm_jax.data.prepare import DATASETS
from elm_jax.data.prepare.check import check_tables
from elm_jax.data.prepare.raw import LeftOut, RawRecording
from elm_jax.data.prepare.runner import prepare_dataset
from elm_jax.data.prepare.splits import Owner, leaks, legacy_split, splits_of
from elm_jax.ecg.recording import AVL_FIRST, LEADS
from elm_jax.errors import UserError
from elm_jax.prepare import main

GOLDEN = goldens.find("prep_segment")
EXPECTED = goldens.config("prep_segment", "expected.json").get("datasets", {})
V4 = {"ptb_xl": "ptb", "mimic_iv": "mimic"}
# What the reference leaves out without a fault of the recording: a table's empty cell, a recording that its benchmark
# does not name, a length that it does not expect, a folder more or less.
MORE = {
    "ptb_xl": {"records500_21000_21993_hr_0.npy"},
    "csn": {"JS20010_0.npy"},
    "cpsc": {"Q0002_0.npy", "Q0003_0.npy"},
    "code15": set(),
    "mimic_iv": {
        "files_p1000_p10000117_s49150102_49150102_0.npy", "files_p1000_p10000121_s40000001_40000001_0.npy",
    },
}  # fmt: skip


def prepare(name, raw, out, **settings):
    return prepare_dataset(name, DATASETS[name], raw, out, progress=False, **settings)


def rows(path):
    return pq.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def raw(tmp_path_factory, golden):
    """The reference's inputs as files."""
    golden("prep_segment")  # skips where there is none, and fails in CI
    folder = tmp_path_factory.mktemp("prep_segment")
    with np.load(GOLDEN / "inputs.npz") as files:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.tobytes())
    return folder


@pytest.mark.parametrize("length", [2500, 500])
@pytest.mark.parametrize("name", EXPECTED)
def test_files_are_the_references_but_for_its_mistakes(name, length, raw, tmp_path):
    if name == "code15":
        pytest.importorskip("h5py", reason="the extra `formats`")
    report = prepare(name, raw / name, tmp_path, profile="elm-2026", length=length)
    folder = tmp_path / name / f"preprocessed_{length}"
    made = {path.name for path in folder.glob("*.npy")}
    expected = set(EXPECTED[name][str(length)]["files"])
    filler = {file for file in expected if file.startswith("0_")}  # the rows of zeros at the ends of CODE-15's files
    assert expected - made == filler and (length != 2500 or made - expected == MORE[name])
    order = [LEADS.index(lead) for lead in (AVL_FIRST if name in ("code15", "mimic_iv") else LEADS)]
    with np.load(GOLDEN / "every_nth.npz") as values:
        for file in expected & made:
            content = np.load(folder / file, allow_pickle=True).item()
            theirs = EXPECTED[name][str(length)]["files"][file]
            step = 50 if length == 2500 else 25
            golden = values[f"{name}/{length}/{file.removesuffix('.npy')}"]
            np.testing.assert_allclose(content["ecg"][order, ::step], golden, rtol=0, atol=1e-9)
            assert list(content["ecg"].shape) == theirs["shape"] and str(content["ecg"].dtype) == theirs["dtype"]
            assert content["original_sf"] == theirs["original_sf"] and set(theirs["keys"]) < set(content)
    assert report["patients_in_several_splits"] == {} and not any("nan" in path for path in made)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_filters_of_2025_give_what_they_gave_but_for_the_polynomials(name, raw, tmp_path):
    if name == "code15":
        pytest.importorskip("h5py", reason="the extra `formats`")
    prepare(name, raw / name, tmp_path, profile="paper-2025")
    order = [LEADS.index(lead) for lead in (AVL_FIRST if name in ("code15", "mimic_iv") else LEADS)]
    compared = 0
    with np.load(GOLDEN / "every_nth_v4.npz") as values:
        for path in (tmp_path / name / "preprocessed_2500").glob("*.npy"):
            for key in (k for k in values if k.startswith(f"{V4.get(name, name)}/2500/") and k.endswith(path.stem)):
                ecg = np.load(path, allow_pickle=True).item()["ecg"]
                np.testing.assert_allclose(ecg[order, ::50], values[key], rtol=0, atol=3e-3)
                compared += 1
    assert compared >= 2


def test_what_the_reference_does_in_silence_is_listed(raw, tmp_path):
    mimic = prepare("mimic_iv", raw / "mimic_iv", tmp_path)
    assert list(mimic["second_report"]) == ["10000032/44458630"], "one file, and two reports for it"
    assert "nan in lead III" in mimic["unreadable"]["files/p1000/p10000121/s40000002/40000002"]
    assert {row["patient_id"] for row in rows(tmp_path / "mimic_iv_pretrain.parquet")} == {"10000032", "10000117"}
    csn = prepare("csn", raw / "csn", tmp_path)
    assert csn["flat"] == {"WFDBRecords/20/201/JS20004": "V2: flat; V4: flat; V6: flat"}
    asked = [json.loads(row["text"])[2] for row in rows(tmp_path / "csn_questions.parquet")]
    assert "sinus tachycardia" in asked[0]


def test_the_exams_of_code_15(raw, tmp_path):
    pytest.importorskip("h5py", reason="the extra `formats`")
    (raw / "code15/exams_part3.hdf5").rename(tmp_path / "gone")
    try:
        report = prepare("code15", raw / "code15", tmp_path, workers=2)
    finally:
        (tmp_path / "gone").rename(raw / "code15/exams_part3.hdf5")
    assert list(report["filler"]) == ["exams_part0.hdf5, row 2", "exams_part17.hdf5, row 2"]
    assert list(report["missing_files"]) == ["exams_part3.hdf5"] and list(report["not_in_index"]) == ["777"]
    assert "NaN" in report["unreadable"]["exams_part17.hdf5, row 1"]
    found = {row["patient_id"]: json.loads(row["text"])[2] for row in rows(tmp_path / "code15_questions.parquet")}
    assert found == {
        "125585": "right bundle branch block", "725849": "first degree AV block", "918688": "sinus tachycardia",
    }  # fmt: skip


def test_echonext(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    values = np.random.default_rng(0).normal(size=(3, 1, 2500, 12)).astype(np.float32)
    for split, count in (("train", 2), ("test", 1)):
        np.save(raw / f"EchoNext_{split}_waveforms.npy", values[:count])
    from elm_jax.data.prepare.echonext import _FINDINGS, INDEX

    with (raw / INDEX).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_key", "split", *_FINDINGS])
        writer.writerow([1, "train", 1, *[0] * 9, 1])
        writer.writerow([2, "test", *[0] * 11])
        writer.writerow([1, "train", *[0] * 10, ""])
        writer.writerow([3, "test", *[0] * 11])
    report = prepare("echonext", raw, tmp_path / "out")
    assert (report["records"], list(report["without_findings"])) == (2, ["train 1"])
    assert "one at 1" in report["unreadable"]["EchoNext_test_waveforms.npy, row 1"]
    found = rows(tmp_path / "out/echonext_pretrain.parquet")
    assert [row["text"] for row in found] == [
        "left ventricular systolic dysfunction; raised tricuspid regurgitation velocity",
        "no significant structural heart disease",
    ]
    assert [(row["patient_id"], row["split"]) for row in found] == [("1", "train"), ("2", "test")]
    path = tmp_path / "out/echonext/preprocessed_2500/echonext_train_0_0.npy"
    np.testing.assert_array_equal(np.load(path, allow_pickle=True).item()["ecg"], values[0, 0].T)


def wfdb_record(path, rate=500, samples=5500, comments=(), leads=LEADS):
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(len(path.name)).normal(size=(samples, len(leads)))
    wfdb.wrsamp(
        path.name, fs=rate, units=["mV"] * len(leads), sig_name=list(leads), fmt=["16"] * len(leads), p_signal=signal,
        write_dir=str(path.parent), comments=list(comments),
    )  # fmt: skip


def test_heed(tmp_path):
    raw = tmp_path / "raw"
    tables = raw / "I0001/12SL_diagnoses"
    tables.mkdir(parents=True)
    (tables / "diagnoses_dictionary.csv").write_text("codes,diagnoses\n19,Sinus rhythm\n22,Sinus tachycardia\n")
    (tables / "diagnoses_acquisition.csv").write_text(
        'FileName,codes_physician,codes_software\n/a/de_1,"19, 22",19\n/a/de_2,"22,7",\n/a/de_3,,\n'
    )
    for number in (1, 2, 3):
        wfdb_record(raw / f"I0001/WFDB/a/de_{number}")
    report = prepare("heed", raw, tmp_path / "out")
    assert (report["records"], report["without_report"], list(report["unknown_codes"])) == (3, 1, ["7"])
    found = rows(tmp_path / "out/heed_pretrain.parquet")
    assert [row["text"] for row in found] == ["Sinus rhythm; Sinus tachycardia", "Sinus tachycardia"]
    assert found[0]["patient_id"] == "heed:I0001_WFDB_a_de_1"
    with pytest.raises(UserError, match="HEEDB"):
        prepare("heed", tmp_path, tmp_path / "out")


def test_ptbdb_and_ludb_say_all_in_their_headers(tmp_path):
    raw = tmp_path / "raw"
    for patient, record, reason in ((1, "s1", "Myocardial infarction"), (1, "s2", "n/a"), (2, "s3", "Healthy control")):
        comments = ["age: 81", f"Reason for admission: {reason}"]
        wfdb_record(raw / f"patient00{patient}/{record}", 1000, 12000, comments, (*LEADS, "vx", "vy", "vz"))
    report = prepare("ptbdb", raw, tmp_path / "out")
    assert (report["records"], report["patients"], report["segments"]) == (3, 2, 3)
    found = rows(tmp_path / "out/ptbdb_questions.parquet")
    assert [(row["patient_id"], json.loads(row["text"])[2]) for row in found] == [
        ("patient001", "Myocardial infarction"), ("patient002", "Healthy control"),
    ]  # fmt: skip
    wfdb_record(tmp_path / "ludb/data/1", comments=["<age>: 51", "<diagnoses>:", "Rhythm: Sinus bradycardia."])
    prepare("ludb", tmp_path / "ludb", tmp_path / "out")
    assert rows(tmp_path / "out/ludb_pretrain.parquet")[0]["text"] == "Rhythm: Sinus bradycardia."


def test_any_folder_of_recordings(tmp_path):
    raw = tmp_path / "raw"
    wfdb_record(raw / "a/one")
    np.save(raw / "two.npy", np.random.default_rng(0).normal(size=(12, 2500)))
    lines = [",".join(LEADS), *(",".join(["0.25"] * 12) for _ in range(3000))]
    (raw / "a/three.csv").write_text("\n".join(lines))
    (raw / "readme.txt").write_text("hello")
    (raw / ".hidden.npy").write_bytes(b"")
    report = prepare("folder", raw, tmp_path / "out")
    assert report["records"] == 2 and list(report["unreadable"]) == ["a/three.csv", "readme.txt"], "it has no rate"
    made = sorted(path.name for path in (tmp_path / "out/folder/preprocessed_2500").glob("*.npy"))
    assert made == ["a_one_0.npy", "two.npy_0.npy"]


def test_a_folder_has_no_sample_twice(tmp_path):
    """Segments of a WFDB record are records, too; what `prepare` leaves below the folder is none of its recordings."""
    for name in ("whole_0001", "whole_0002", "other"):
        wfdb_record(tmp_path / "a" / name)
    names = ["whole_0001 5500", "~ 100", "whole_0002 5500"]
    (tmp_path / "a/whole.hea").write_text("\n".join(["# a comment", "whole/3 12 500 11100", *names]))
    (tmp_path / "a/self.hea").write_text("self/1 12 500 5500\nself 5500\n")
    (tmp_path / "a/pipe.hea").mkdir()
    found = list(DATASETS["folder"].recordings(tmp_path))
    assert {one.what: one.why for one in found if isinstance(one, LeftOut)} == {
        "a/whole_0001": "of a/whole", "a/whole_0002": "of a/whole",
    }  # fmt: skip
    names = ["a/other", "a/pipe", "a/self", "a/whole"]
    assert [one.path for one in found if isinstance(one, RawRecording)] == names
    prepare("folder", tmp_path, tmp_path / "out")
    assert [one.path for one in DATASETS["folder"].recordings(tmp_path) if isinstance(one, RawRecording)] == names


# ---- the runner


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty records of eleven seconds, some with a flat lead, one cut off."""
    raw = tmp_path_factory.mktemp("many")
    for number in range(40):
        signal = np.random.default_rng(number).normal(size=(12, 5500)).astype(np.float32)
        signal[number % 12] *= number % 5 != 0
        write = np.save if number != 7 else lambda path, signal: path.write_bytes(b"\x93NUMPY")
        write(raw / f"{number:02d}.npy", signal)
    return raw


def test_the_same_bytes_on_any_number_of_processes_and_after_a_stop(many, tmp_path, monkeypatch):
    first = prepare("folder", many, tmp_path / "one")
    assert prepare("folder", many, tmp_path / "three", length=2500, workers=3) == first
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert first["records"] == 39 and len(first["flat"]) == 8 and list(first["unreadable"]) == ["07.npy"]
    # a stop after a part of it
    out = tmp_path / "stopped"
    some = replace(DATASETS["folder"], recordings=lambda raw: [RawRecording(f"{n:02d}.npy") for n in range(0, 40, 2)])
    prepare_dataset("folder", some, many, out, length=2500, progress=False)
    for path in out.glob("folder_*"):
        path.unlink()
    notes = out / "folder/preprocessed_2500/signals.jsonl"
    notes.write_text(notes.read_text() + '{"name": "99')  # a power cut
    (out / "folder/preprocessed_2500/.06.npy_0.npy.abcdefgh").write_bytes(b"half")
    again = prepare("folder", many, out, length=2500, workers=2)
    assert not list(out.rglob(".*"))
    assert again.pop("already_there") == 20
    assert again == {key: value for key, value in first.items() if key != "already_there"}
    segments = {path: data for path, data in contents(out).items() if path.suffix == ".npy" or path.suffix == ".jsonl"}
    assert segments == {path: data for path, data in contents(tmp_path / "one").items() if path in segments}


def test_a_table_may_not_name_files_elsewhere(many, tmp_path):
    hostile = [RawRecording("00.npy", name="../../escaped"), RawRecording("01.npy"), RawRecording("../many0/02.npy")]
    ours = replace(DATASETS["folder"], recordings=lambda raw: hostile)
    report = prepare_dataset("x", ours, many, tmp_path / "out", progress=False)
    assert report["records"] == 1 and list(report["missing"]) == ["00.npy", "../many0/02.npy"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exams_whose_data_lie_in_another_file_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="the extra `formats`")
    (tmp_path / "exams.csv").write_text("exam_id,patient_id,1dAVb,RBBB,LBBB,SB,ST,AF\n1,1,0,0,0,0,0,0\n")
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file["exam_id"] = [1]
        file["tracings"] = h5py.ExternalLink(str(tmp_path / "elsewhere.hdf5"), "tracings")
    with h5py.File(tmp_path / "elsewhere.hdf5", "w") as file:
        file["tracings"] = np.zeros((1, 4096, 12), np.float32)
    with pytest.raises(UserError, match="tracings, a link to elsewhere"):
        prepare("code15", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("exams", "options", "found"),
    [
        ([1], {"chunks": (1, 1 << 24, 12), "maxshape": (None, None, 12)}, "packed bytes that become 805306368"),
        (["1"], {}, "found exam_id object and tracings float32; expected numbers"),
        (None, {}, "packed bytes that become 8000000000"),
    ],
)
def test_exams_are_no_more_than_their_files_can_hold(tmp_path, exams, options, found):
    h5py = pytest.importorskip("h5py", reason="the extra `formats`")
    (tmp_path / "exams.csv").write_text("exam_id,patient_id,1dAVb,RBBB,LBBB,SB,ST,AF\n1,1,0,0,0,0,0,0\n")
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        many = {"shape": (10**9,), "dtype": "i8", "chunks": (1000,)} if exams is None else {"data": exams}
        file.create_dataset("exam_id", **many)
        shape = (10**9 if exams is None else 1, 4096, 12)
        file.create_dataset("tracings", shape, np.float32, **(options or {"chunks": (1, 4096, 12)}))
    with pytest.raises(UserError) as error:
        prepare("code15", tmp_path, tmp_path / "out")
    assert found in str(error.value)


def _ends(path):
    import os

    os._exit(9)


def test_a_process_that_is_ended_is_told(many, tmp_path):
    with pytest.raises(UserError, match="ended by force"):
        ending = replace(DATASETS["folder"], read=_ends)
        prepare_dataset("folder", ending, many, tmp_path, length=500, progress=False, workers=2)


def test_folds_are_disjoint_and_every_recording_is_tested_once(many, tmp_path):
    asked = [("kind", "?", "yes")]
    owned = [RawRecording(f"{n:02d}.npy", f"{n // 2}.0", fold=1 + n // 2 % 4, questions=asked) for n in range(40)]
    ours = replace(DATASETS["folder"], recordings=lambda raw: owned)
    for split in ("patient", "official"):
        report = prepare_dataset("x", ours, many, tmp_path, 250, 2500, False, split=split, folds=4)
        assert report["patients_in_several_splits"] == {}
        tested = [row["ecg_path"] for row in rows(tmp_path / "x_questions.parquet") if row["split"].endswith("test")]
        assert len(tested) == len(set(tested)) == 39 * 2
        assert sum(report["rows"].values()) == 39 * 2 * 4
    first = [row for row in rows(tmp_path / "x_questions.parquet") if row["split"] == "fold1_test"]
    assert {int(row["patient_id"]) % 4 for row in first} == {0}, "not the dataset's own folds"
    legacy = prepare_dataset("x", ours, many, tmp_path, 250, 2500, False, split="legacy")
    assert list(legacy["rows"]) == [f"fold{k}_{kind}" for k in range(1, 6) for kind in ("test", "train")]
    assert legacy["patients_in_several_splits"] == {} and legacy["rows"]["fold1_train"] == 54


# ---- leaks


GOLDEN_FOLDS = goldens.config("prep_folds", "cases.json").get("sets", {})


@pytest.mark.parametrize("name", GOLDEN_FOLDS)
def test_legacy_splits_are_the_references_in_its_order(name):
    records, variants = GOLDEN_FOLDS[name]["records"], GOLDEN_FOLDS[name]["variants"]
    for variant, golden in variants.items():
        keys = [record["patient"] for record in records] if variant == "intended" else golden["keys_seen"]
        for number, fold in enumerate(golden["folds"]):
            assert legacy_split(keys, number) == (fold["train"], fold["test"]), (variant, number)
            sides = [(side, records[row]["patient"]) for side in ("train", "test") for row in fold[side]]
            rows = [(side, (patient,)) for side, patient in sides if patient is not None]
            assert sorted(leaks(rows)) == fold["true_patients_in_both"]


def test_a_row_without_a_split_follows_the_others_of_its_patient():
    rows = [Owner(("1",)), Owner(("1",), "test"), Owner(("1", "2")), Owner(("2",)), Owner(("3",), "val")]
    assert splits_of(rows, "official") == [("test",)] * 4 + [("val",)]


def test_whoever_shares_a_recording_shares_a_fold():
    rows = [Owner(("1", "2")), Owner(("2", "3")), Owner(("3",)), Owner(("4",)), Owner(("1",))]
    found = splits_of(rows, "patient", folds=5)
    assert found[0] == found[1] == found[2] == found[4]
    assert [sum(split.endswith("test") for split in row) for row in found] == [1] * 5
    people = [Owner((str(n),)) for n in range(1000)]
    sizes = np.sum([[split.endswith("test") for split in row] for row in splits_of(people, "patient", 5)], axis=0)
    assert sizes.sum() == 1000 and 150 < sizes.min() <= sizes.max() < 250


def beats(seed, rate, seconds=10):
    """A made heart: spikes at irregular times in all leads, at any rate the same."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.5, 1.1, 40))
    size = rng.normal(size=(12, 1))
    clock = np.arange(round(seconds * rate)) / rate
    return size * sum(np.exp(-(((clock - time) / 0.03) ** 2)) for time in times)[None]


def test_a_planted_leak_and_a_copy_under_another_name_fail_the_check(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(6):
        np.save(raw / f"{number}.npy", beats(number, 250))
    ours = [
        RawRecording(f"{n}.npy", f"{n}", "test" if n > 3 else "train", questions=[("k", "?", "y")]) for n in range(6)
    ]
    prepare_dataset("a", replace(DATASETS["folder"], recordings=lambda _: ours), raw, tmp_path, progress=False)
    arguments = ["check", "--out", str(tmp_path), "--workers", "1"]
    assert cli.guard(main, arguments) == 0
    assert "patients_in_several_splits: 0" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    copy = {"ecg": 1.3 * beats(2, 500) + 0.01, "leads": list(LEADS), "target_sf": 500}
    np.save(other / "x.npy", np.array(copy, object), allow_pickle=True)
    copied = [RawRecording("x.npy", "17", "test", questions=[("k", "?", "y")])]
    prepare_dataset("b", replace(DATASETS["folder"], recordings=lambda _: copied), other, tmp_path, progress=False)
    assert cli.guard(main, arguments) == 1
    report = json.loads((tmp_path / "check_report.json").read_text())
    assert list(report["copies_in_several_splits"]) == [
        "a/preprocessed_2500/2.npy_0.npy and b/preprocessed_2500/x.npy_0.npy"
    ]
    assert report["patients_in_several_splits"] == {}
    leaking = tmp_path / "leak.parquet"
    table = {"ecg_path": [], "patient_id": [], "split": []}
    for path, patient, split in (("../x.npy", "17.0", "train"), ("gone.npy", " 17", "test"), ("z.npy", "4+5", "train")):
        for key, value in zip(table, (path, patient, split), strict=True):
            table[key].append(value)
    pq.write_table(pa.table(table), leaking)
    assert cli.guard(main, [*arguments, "--tables", str(leaking)]) == 1
    report = json.loads((tmp_path / "check_report.json").read_text())
    assert report["patients_in_several_splits"] == {"17": "test, train"}
    assert len(report["unreadable"]) == 3 and "not a path below" in report["unreadable"]["../x.npy"]


# ---- real recordings


def test_the_recording_that_georgia_has_twice_is_found(shared, tmp_path):
    prepare("georgia", shared / "real/ecg/cinc2021", tmp_path)
    report = check_tables([tmp_path / "georgia_questions.parquet"], tmp_path, progress=False)
    assert [Path(path).name for pair in report["copies"] for path in pair.split(" and ")] == [
        "E07509_0.npy",
        "E07510_0.npy",
    ]


def test_real_recordings_of_other_datasets(shared, tmp_path):
    raw = shared / "real/ecg"
    georgia, ningbo = (prepare(name, raw / "cinc2021", tmp_path) for name in ("georgia", "ningbo"))
    assert (georgia["records"], ningbo["records"]) == (14, 14)
    assert ningbo["flat"] == {"JS20004": "V2: flat; V4: flat; V6: flat"} and not georgia["flat"]
    ptbdb = prepare("ptbdb", raw / "ptbdb", tmp_path)
    assert (ptbdb["records"], ptbdb["segments"]) == (1, 3), "38.4 s at 1000 Hz, 15 leads"
    assert prepare("ludb", raw / "ludb", tmp_path)["records"] == 1
    cpsc = prepare("cpsc", raw / "cpsc2018", tmp_path)
    assert (cpsc["records"], cpsc["segments"]) == (7, 10)
    answers = {row["ecg_path"][-12:-6]: json.loads(row["text"])[2] for row in rows(tmp_path / "cpsc_questions.parquet")}
    assert answers["/A1983"] == "normal" and answers["/A1989"] == "first degree AV block"


def test_real_recordings_of_which_the_files_do_not_say_all(shared, tmp_path):
    """The CinC Challenge of 2011: whole numbers of microvolts at 500 Hz, good and bad."""
    arguments = ["folder", "--raw", str(shared / "real/ecg/cinc2011/set-a"), "--out", str(tmp_path), "--workers", "1"]
    assert cli.guard(main, [*arguments, "--assume-rate", "500", "--assume-unit", "uV"]) == 0
    report = json.loads((tmp_path / "folder_report.json").read_text())
    assert report["records"] == 40 and report["scale"] and report["limb_sums"]
    with (shared / "real/INDEX_ecg.csv").open(newline="") as file:
        index = [row for row in csv.DictReader(file) if row["source"] == "cinc2011"]
    whole = {name: text.split("; ") for name, text in report["flat"].items()}
    whole = {name: sum(text.endswith(": flat") for text in texts) for name, texts in whole.items()}
    flat = {Path(row["path"]).name: int(row["flat_leads"]) for row in index if int(row["flat_leads"])}
    assert all(whole[name] >= count for name, count in flat.items()), "the index misses some leads of 1691516"


def test_what_is_assumed_holds_for_files_that_do_not_say_alone(tmp_path):
    signal = np.random.default_rng(0).normal(size=(1000, 12)).round(3)
    raw = tmp_path / "raw"
    raw.mkdir()
    wfdb.wrsamp(
        "said", fs=500, units=["mV"] * 12, sig_name=list(LEADS), fmt=["16"] * 12, adc_gain=[1000.0] * 12,
        baseline=[0] * 12, p_signal=signal, write_dir=str(raw),
    )  # fmt: skip
    table = "\n".join(",".join(f"{value:.3f}" for value in row) for row in signal)
    (raw / "unsaid.csv").write_text(f"{','.join(LEADS)}\n{table}\n")
    (raw / "told.csv").write_text(f"# fs: 500\n# unit: mV\n{','.join(LEADS)}\n{table}\n")
    assumed = ["--assume-rate", "250", "--assume-unit", "uV", "--sampling-rate", "250", "--segment-len", "500"]
    arguments = ["folder", "--raw", str(raw), "--out", str(tmp_path), "--workers", "1"]
    assert cli.guard(main, [*arguments, *assumed]) == 0
    folder = tmp_path / "folder/preprocessed_500"
    said, told, unsaid = (
        np.load(folder / f"{name}_0.npy", allow_pickle=True).item() for name in ("said", "told.csv", "unsaid.csv")
    )
    assert (said["original_sf"], told["original_sf"], unsaid["original_sf"]) == (500, 500, 250)
    np.testing.assert_allclose(said["ecg"], told["ecg"], atol=1e-9)
    np.testing.assert_allclose(unsaid["ecg"], signal.T[:, :500] / 1000)
    assert cli.guard(main, [*arguments, "--assume-rate", "-5"]) == 2


def test_real_recordings_in_two_formats_come_out_equal(shared, tmp_path):
    raw = shared / "real/ecg"
    twice = prepare("folder", raw / "ptbxl_as_cinc2021", tmp_path)
    assert twice["records"] == 4
    once = replace(DATASETS["ptb_xl"], recordings=lambda raw: [
        RawRecording(f"records500/00000/{n:05d}_hr") for n in (2, 5, 6, 10)
    ])  # fmt: skip
    prepare_dataset("ptb_xl", once, raw / "ptbxl", tmp_path, progress=False)
    for n in (2, 5, 6, 10):
        names = (
            f"ptb_xl/preprocessed_2500/records500_00000_{n:05d}_hr_0.npy",
            f"folder/preprocessed_2500/HR{n:05d}_0.npy",
        )
        one, other = (np.load(tmp_path / name, allow_pickle=True).item()["ecg"] for name in names)
        np.testing.assert_array_equal(one, other)


def test_every_real_recording_is_prepared_as_its_index_says(shared, tmp_path):
    """In files of all kinds; signals.jsonl says which leads are flat."""
    raw = shared / "real"
    with (raw / "INDEX_ecg.csv").open(newline="") as file:
        index = [row for row in csv.DictReader(file) if not row["source"].startswith("ptbxl")]
    said = {Path(row["path"]).name: row for row in index}
    listed = replace(DATASETS["folder"], recordings=lambda raw: [RawRecording(row["path"]) for row in index])
    report = prepare_dataset("real", listed, raw, tmp_path, length=500, progress=False)
    assert len(index) == 84
    lacking = {
        Path(path).name: why for kind in ("missing", "unreadable", "too_short") for path, why in report[kind].items()
    }
    assert set(lacking) == {name for name, row in said.items() if row["source"] == "cinc2011"}, lacking
    flat = {Path(path).name: len(leads.split("; ")) for path, leads in report["flat"].items()}
    assert flat == {
        name: int(row["flat_leads"]) for name, row in said.items() if int(row["flat_leads"]) and name not in lacking
    }
    for name, row in said.items():
        made = sorted((tmp_path / "real/preprocessed_500").glob(f"*_{name}_*.npy"))
        seconds = int(row["n_samples"]) / int(row["fs"])
        assert name in lacking or len(made) == int(seconds * 250) // 500, name
        if made:
            windows = [np.load(path, allow_pickle=True).item() for path in made]
            assert all(one["ecg"].shape == (12, 500) and tuple(one["leads"]) == LEADS for one in windows), name
            largest = max(abs(float(row["min_mV"])), abs(float(row["max_mV"])))
            assert 0.5 * largest < max(np.abs(one["ecg"]).max() for one in windows) < 1.15 * largest, name
