"""ECG-LM's instruction pairs: of PTB-XL+'s tables or our own measurements, balanced, seeded, with what is left out."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_jax import cli, prepare
from elm_jax.data.prepare.ecg_lm import Case, Wanted, pairs_of
from elm_jax.data.prepare.ptb_xl_plus import read_features, read_statements
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.synthetic import synthesize
from elm_jax.errors import UserError

COLUMNS = {"HR_Ventr_Global": 55, "PR_Int_Global": 162, "QRS_Dur_Global": 94, "QT_Int_Global": 400, "P_Dur_Global": 100,
           "RR_Mean_Global": 1090, "R_AxisFrontal_Global": 300}  # fmt: skip
WAVES = {"R_Amp": 1.0, "S_Amp": 0.3, "Q_Amp": 0.0, "T_Amp": 0.3, "ST_Amp": 0.01, "P_Amp": 0.1}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plus(folder: Path) -> Path:
    """PTB-XL+ with rows out of order, the key amid the columns, of recordings 9 (not prepared), 2 and 1."""
    waves = {f"{name}_{lead}": size for name, size in WAVES.items() for lead in LEADS}
    made = [{**COLUMNS, "ecg_id": float(n), **waves, "PR_Int_Global": pr} for n, pr in ((9, 170), (2, 236), (1, 162))]
    made[2] |= {"QT_Int_Global": "nan", "QRS_Dur_Global": 29000}
    write(folder / "features/12sl_features.csv", made)
    codes = "[(11, 15.0), (12, 100.0), (13, 100.0)]"
    write(folder / "labels/ptbxl_statements.csv", [{"ecg_id": n, "scp_codes_ext_snomed": codes} for n in (1, 2)])
    names = [(11, "Sinus bradycardia", True), (12, "First degree AV block", True), (13, "SNOMED CT Concept", False)]
    write(folder / "labels/snomed_description.csv",
          [dict(zip(("snomed_id", "description", "informative"), name, strict=True)) for name in names])  # fmt: skip
    return folder


def records(root: Path, numbers: tuple[int, ...] = (1, 2, 3), signals: bool = False) -> Path:
    folder = root / "ptb_xl" / "preprocessed_2500"
    folder.mkdir(parents=True)
    rows = []
    for n in numbers:
        path = folder / f"records500_00000_{n:05d}_hr_0.npy"
        np.save(path, synthesize((1, n), 250.0, 2500)) if signals else path.touch()
        rows.append({"ecg_path": path.relative_to(root).as_posix(), "patient_id": str(n), "split": "train"})
    pq.write_table(pa.Table.from_pylist(rows), root / "ptb_xl_records.parquet")
    return root


def run(out: Path, *argv: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    assert cli.guard(prepare.main, ["ecg_lm", f"--out={out}", "--workers=1", *argv]) == 0
    report = json.loads((out / "ecg_lm_report.json").read_text())
    return pq.read_table(out / "ecg_lm.parquet").to_pylist(), report


def said(rows: list[dict[str, Any]], kind: str, about: str = "") -> list[tuple[str, str, str]]:
    """(path, question, answer) of the rows of a kind."""
    found = [row for row in rows if row["name"] == kind and row["attribute"] in (about or kind, kind)]
    return [(row["ecg_path"], *(turn["value"] for turn in json.loads(row["text"]))) for row in found]


def test_tables_are_read_by_name_and_what_no_heart_makes_is_not_measured(tmp_path: Path) -> None:
    found = dict(read_features(plus(tmp_path), "12sl"))
    assert list(found) == [9, 2, 1]
    two, one = found[2], found[1]
    assert two.values["pr"].value == 236 and two.values["axis"].value == -60
    assert two.values["qtc_bazett"].value == pytest.approx(400 / 1.09**0.5)
    assert two.values["sokolow_lyon"].value == pytest.approx(1.3) and two.leads["V1"].amplitudes["s"] == -0.3
    assert "st80" not in two.leads["V1"].amplitudes
    assert one.values["qrs"].value is None and one.values["qt"].value is None and one.values["qrs"].reason
    assert read_statements(tmp_path, "ptbxl")[1] == ("First degree AV block", "Sinus bradycardia"), "likeliest first"


def test_pairs_are_made_of_tables_and_rules_and_what_does_not_join_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "db.csv", [{"ecg_id": n, "sex": n % 2, "age": 60.0} for n in (1, 2, 3)])
    raw, out = plus(tmp_path / "P"), records(tmp_path / "O")
    rows, report = run(out, f"--raw={raw}", f"--ptbxl-csv={tmp_path / 'db.csv'}")
    assert report["without_recording"] == {"9": "PTB-XL 00009 is not prepared"}
    assert list(report["without_features"]) == ["ptb_xl/preprocessed_2500/records500_00000_00003_hr_0.npy"]
    assert report["recordings"] == 2 and report["features"] == "12sl" and not report["patients_in_several_splits"]
    assert report["findings"]["first-degree AV block"] == {"yes": 1, "no": 1, "asked": 4}
    assert report["findings"]["bradycardia"] == {"yes": 2, "no": 0, "asked": 0}, "which the question alone would tell"
    assert sum(report["kinds"].values()) == sum(report["rows"].values()) == len(rows) == report["rows"]["train"]
    verify = said(rows, "verify", "first-degree AV block")
    assert {answer.lower()[:2] for _, _, answer in verify} == {"ye", "no"}
    why = said(rows, "why", "first-degree AV block")
    assert len(why) == 1 and "00002" in why[0][0] and why[0][2].startswith("PR interval 236 ms. The criterion")
    assert all("It is met" in answer or "It is not met" in answer for *_, answer in said(rows, "criterion"))
    assert ("PR interval 162 ms." in {answer for *_, answer in said(rows, "measure", "PR interval")})
    assert {answer for *_, answer in said(rows, "statements")} == {"First degree AV block; Sinus bradycardia"}
    assert any("left axis deviation" in answer for *_, answer in said(rows, "findings"))


def test_the_same_seed_makes_the_same_rows_and_another_one_others(tmp_path: Path) -> None:
    raw, out = plus(tmp_path / "P"), records(tmp_path / "O")
    rows, _ = run(out, f"--raw={raw}", "--questions=4")
    assert Counter(row["ecg_path"] for row in rows) == Counter({row["ecg_path"]: 4 for row in rows})
    assert run(out, f"--raw={raw}", "--questions=4")[0] == rows
    assert run(out, f"--raw={raw}", "--questions=4", "--seed=1")[0] != rows


def test_without_tables_the_recordings_are_measured_on_any_number_of_processes(tmp_path: Path) -> None:
    out = records(tmp_path / "O", signals=True)
    (out / "ptb_xl/preprocessed_2500/records500_00000_00002_hr_0.npy").write_bytes(b"no array")
    rows, report = run(out)
    assert report["features"] == "measured" and report["recordings"] == 2 and len(report["not_measured"]) == 1
    assert said(rows, "measure", "heart rate") and not said(rows, "statements")
    again, _ = run(out, "--workers=2")
    assert again == rows


def test_of_each_finding_and_split_yes_is_asked_as_often_as_no() -> None:
    holds = {"first-degree AV block": 7, "tachycardia": 30}
    cases = [
        Case(f"{n}.npy", (str(n),), ("train", "test")[n % 2], {f: (n % 40 < k, "seen") for f, k in holds.items()}, {})
        for n in range(40)
    ]  # fmt: skip
    rows = list(pairs_of(cases, Wanted(kinds=("verify", "criterion"))))
    said = Counter(
        (row["attribute"], row["split"], row["name"], cases[int(row["patient_id"])].told[row["attribute"]][0])
        for row in rows
    )
    for finding in holds:
        for split in ("train", "test"):
            for kind in ("verify", "criterion"):
                assert said[finding, split, kind, True] == said[finding, split, kind, False] > 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--features=12sl"], "give --raw"), (["--kinds=verfy"], "did you mean 'verify'"), (["--questions=0"], "1 to"),
        (["--raw=nowhere"], "leave statements out"), (["--seed=-1"], "--seed"), (["--ptbxl-csv=no.csv"], "no.csv"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_line(
    tmp_path: Path, argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = records(tmp_path / "O")
    assert cli.guard(prepare.main, ["ecg_lm", f"--out={out}", "--workers=1", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and told in error and "Traceback" not in error


def test_damaged_tables_are_one_line(tmp_path: Path) -> None:
    folder = plus(tmp_path / "P")
    for file, content, told in (
        ("features/12sl_features.csv", "ecg_id,other\n1,2\n", "none of the columns"),
        ("features/12sl_features.csv", "ecg_id,PR_Int_Global\nx,2\n", "line 2"),
        ("features/12sl_features.csv", "PR_Int_Global\n2\n", "no column ecg_id"),
        ("features/12sl_features.csv", "\0\xff", "12sl_features"),
        ("labels/ptbxl_statements.csv", f"ecg_id,scp_codes_ext_snomed\n1,{'(' * 9000}\n", "ptbxl_statements"),
        ("labels/ptbxl_statements.csv", 'ecg_id,scp_codes_ext_snomed\n1,"[(11, 1.0, 2)]"\n', "line 2"),
        ("labels/ptbxl_statements.csv", "ecg_id,scp_codes_ext_snomed\n1,\"__import__('os').getcwd()\"\n", "line 2"),
    ):  # fmt: skip
        plus(folder)
        (folder / file).write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=told):
            list(read_features(folder, "12sl"))
            read_statements(folder, "ptbxl")
