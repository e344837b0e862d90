"""Reports: cleaned as MERL's and ECG-Chat's, with and without their faults, and what `prepare` makes of them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import wfdb

from elm_jax.data.prepare.runner import REPORT_QUESTION
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.prepare import main
from elm_jax.text.reports import clean_report, measured, merl_stripped, wave_text


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden("waveform_text") / "cases.json").read_text())


@pytest.fixture(scope="module")
def given(cases):
    """The statements of each report; empty cells are no statements."""
    return [[said for said in row if said is not None] for row in cases["ecg_chat_reports"]["reports_in"]]


def test_as_merls_notebook_and_class_do_by_name(cases, given):
    kept = [row["total_report"] * row["kept"] for row in cases["merl"]["notebook"]]
    assert [clean_report(said, "merl", published=True) for said in given] == kept
    assert [merl_stripped(said) for said in given] == cases["merl"]["dataset_class_text"]


@pytest.mark.parametrize("wave", [False, True])
def test_as_ecg_chat_does_by_name_with_its_wave_text(cases, given, wave):
    expected = {
        int(row["study"]) - 40000000: row["text"]
        for rows in cases["ecg_chat_reports"][f"wfep_{wave}"].values()
        for row in rows
    }
    common = {"PR_Interval": 150, "QRS_Complex": 90, "QT_Interval": 380, "QTc_Interval": 420}
    peaks = {"P_Wave_Peak": 1, "R_Wave_Peak": 2, "T_Wave_Peak": 3}
    for number, said in enumerate(given):
        text = clean_report(said, "ecg_chat", published=True)
        if wave and text:
            text += wave_text({"RR_Interval": 800 + number, **common, **peaks})
        assert text == expected.get(number, "")


def test_wave_text_is_ecg_chats(cases):
    for case in cases["wave_text"].values():
        assert wave_text({key: float("nan") if x is None else x for key, x in case["in"].items()}) == case["out"]
    for case in cases["waveform"].values():
        if "text" in case:
            assert wave_text(case["values"]) == case["text"]


@pytest.mark.parametrize(
    ("way", "said", "ours", "theirs"),
    [
        ("merl", ["*** Made without age ***", "Sinus rhythm"], "made without age. sinus rhythm.",
         "made without age ***. sinus rhythm."),
        ("merl", ["--- Poor quality, please repeat"], "poor quality, please repeat.", " poor quality, please repeat."),
        ("merl", ["Ekg within normal limits"], "ecg within normal limits.", "ekg within normal limits."),
        ("merl", [" ", "Normal sinus rhythm seen"], "normal sinus rhythm seen.", ". normal sinus rhythm seen."),
        ("merl", ["*** Sinus ***", "=== rhythm ==="], "", "sinus ***. === rhythm ."),  # marks are no words
        ("merl", ["normal ecg, sinus rhythm."], "normal ecg, sinus rhythm.", "normal ecg, sinus rhythm.."),
        ("ecg_chat", ["Within limits", "LBBB"], "within limits left bundle branch block",
         "within limyocardial infarctionts light bundle branch block"),
        ("ecg_chat", ["Intraventricular conduction defect"], "intraventricular conduction defect", ""),
        ("ecg_chat", ["One PVC", "EKG"], "one ventricular premature complex ecg", "one pvc ekg"),
        ("ecg_chat", ["Old MI - age undetermined", "*** Abnormal ***"], "old myocardial infarction abnormal",
         "old myocardial infarction  abnormal "),
    ],
)  # fmt: skip
def test_each_fault_is_mended(way, said, ours, theirs):
    assert clean_report(said, way) == ours
    assert clean_report(said, way, published=True) == theirs


def test_what_a_machine_measured_in_words():
    assert wave_text(measured(659, 40, 170, 258, 518)) == " RR: 659 PR: 130 QRS: 88 QT/QTc: 348/429"
    assert wave_text(measured(None, None, 170, 258, 518)) == " QRS: 88 QT: 348"
    assert wave_text(measured(659, 200, 170, 170, None)) == " RR: 659"


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def write_record(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(number).normal(size=(1000, 12))
    wfdb.wrsamp(path.name, fs=500, units=["mV"] * 12, sig_name=list(LEADS), fmt=["16"] * 12, p_signal=signal,
                write_dir=str(path.parent))  # fmt: skip


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    raw = tmp_path_factory.mktemp("mimic")
    paths = [f"files/p1/p{i}/s{i}/{i}" for i in (1, 2, 3)]
    for number, path in enumerate(paths):
        write_record(raw / path, number)
    header = ["subject_id", "study_id", *(f"report_{i}" for i in range(18))]
    measures = ["rr_interval", "p_onset", "qrs_onset", "qrs_end", "t_end"]
    said = (["Sinus rhythm", "*** Normal EKG ***"], ["Analysis error"], ["Atrial fibrillation", "LBBB is present"])
    values = ("800,40,160,250,560", "800,40,160,250,560", "600,29999,160,250,29999")
    lines = [",".join([*header, *measures])]
    for i, (statements, numbers) in enumerate(zip(said, values, strict=True), 1):
        lines.append(",".join([str(i), str(i), *statements, *[""] * (18 - len(statements)), numbers]))
    (raw / "machine_measurements.csv").write_text("\n".join(lines))
    listed = [f"{i},{i},{path}" for i, path in enumerate(paths, 1)]
    (raw / "record_list.csv").write_text("\n".join(["subject_id,study_id,path", *listed]))
    return raw


def prepare(name: str, raw: Path, out: Path, *flags: str) -> int:
    return main([name, "--raw", str(raw), "--out", str(out), "--segment-len", "500", "--workers", "1", *flags])


def test_reports_are_written_clean_and_with_measures_and_what_is_left_out_is_listed(mimic, tmp_path):
    prepare("mimic_iv", mimic, tmp_path, "--clean-reports", "ecg_chat", "--wave-text")
    found = [row["report"] for row in rows(tmp_path / "mimic_iv_records.parquet")]
    first = "sinus rhythm normal ecg RR: 800 PR: 120 QRS: 90 QT/QTc: 400/447"
    assert found == [first, "", "atrial fibrillation left bundle branch block is present RR: 600 QRS: 90"]
    told = rows(tmp_path / "mimic_iv_reports.parquet")[0]
    assert json.loads(told["text"])[0]["value"] == REPORT_QUESTION and json.loads(told["text"])[1]["value"] == first
    content = np.load(tmp_path / told["ecg_path"], allow_pickle=True).item()
    assert content["report"] == first
    report = json.loads((tmp_path / "mimic_iv_report.json").read_text())
    assert report["reports_left_out"] == {"files/p1/p2/s2/2": "Analysis error"} and report["without_report"] == 1
    with pytest.raises(UserError, match="reports as-is, cleaned as ecg_chat, wave text; expected reports as-is;"):
        prepare("mimic_iv", mimic, tmp_path)


def test_reports_are_as_they_were_written_unless_it_is_asked_for(mimic, tmp_path):
    prepare("mimic_iv", mimic, tmp_path)
    found = [row["report"] for row in rows(tmp_path / "mimic_iv_records.parquet")]
    assert found == ["Sinus rhythm *** Normal EKG ***", "Analysis error", "Atrial fibrillation LBBB is present"]
    prepare("mimic_iv", mimic, tmp_path / "p", "--clean-reports", "merl", "--compat", "published_report_cleaning")
    found = [row["report"] for row in rows(tmp_path / "p" / "mimic_iv_records.parquet")]
    assert found == ["sinus rhythm. *** normal ecg.", "", "atrial fibrillation. lbbb is present."]


@pytest.fixture(scope="module")
def ptb_xl(tmp_path_factory):
    raw = tmp_path_factory.mktemp("ptb_xl")
    lines = ["ecg_id,patient_id,report,scp_codes,strat_fold,filename_lr,filename_hr"]
    codes = ("{'SR': 0.0, 'LVH': 50.0, 'NORM': 100.0}", "{'ODD': 0.0}", "{'ABQRS': 0.0, 'SR': 0.0}")
    said = ("sinusrhythmus normales ekg", "", "sinusrhythmus")
    for i, (text, code) in enumerate(zip(said, codes, strict=True), 1):
        write_record(raw / f"records500/00000/{i:05d}_hr", i)
        lines.append(f'{i},{i}.0,{text},"{code}",{i},,records500/00000/{i:05d}_hr')
    (raw / "ptbxl_database.csv").write_text("\n".join(lines))
    statements = [
        ",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass",
        "NORM,normal ECG,1.0,,,NORM,NORM", "LVH,left ventricular hypertrophy,1.0,,,HYP,LVH",
        "ABQRS,abnormal QRS,,1.0,,,", "SR,sinus rhythm,,,1.0,,",
    ]  # fmt: skip
    (raw / "scp_statements.csv").write_text("\n".join(statements))
    return raw


def test_statements_have_english_names_the_likeliest_first(ptb_xl, tmp_path):
    prepare("ptb_xl", ptb_xl, tmp_path, "--report-language", "statements")
    found = [row["report"] for row in rows(tmp_path / "ptb_xl_records.parquet")]
    assert found == ["normal ECG. left ventricular hypertrophy. sinus rhythm", "", "abnormal QRS. sinus rhythm"]
    report = json.loads((tmp_path / "ptb_xl_report.json").read_text())
    assert report["unknown_codes"] == {"ODD": "first in records500/00000/00002_hr"}


@pytest.mark.parametrize(
    ("name", "flags", "found"),
    [
        ("ptb_xl", ["--wave-text"], "--wave-text: found a dataset without them"),
        ("mimic_iv", ["--report-language", "statements"], "invalid choice: 'statements'"),
        ("ptb_xl", ["--clean-reports", "mrl"], "invalid choice: 'mrl'"),
        ("ptb_xl", ["--compat", "published_report"], "did you mean 'published_report_cleaning'"),
    ],
)
def test_what_cannot_be_done_is_one_line(mimic, ptb_xl, tmp_path, name, flags, found):
    with pytest.raises(UserError, match=found):
        prepare(name, mimic if name == "mimic_iv" else ptb_xl, tmp_path, *flags)
