"""The command `prepare`: what it prints, leaves and refuses, as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wfdb

from elm_jax import cli
from elm_jax.ecg.recording import LEADS
from elm_jax.prepare import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two PTB-XL records of one patient, and a question about each."""
    raw = tmp_path_factory.mktemp("raw")
    folder = raw / "records500/00000"
    folder.mkdir(parents=True)
    rows = ["ecg_id,patient_id,report,strat_fold,filename_lr,filename_hr"]
    for i in (1, 2):
        wfdb.wrsamp(
            f"{i:05d}_hr", fs=500, units=["mV"] * 12, sig_name=list(LEADS), fmt=["16"] * 12,
            p_signal=np.random.default_rng(i).normal(size=(1000, 12)), write_dir=str(folder),
        )  # fmt: skip
        rows.append(f"{i},7.0,befund,10,,records500/00000/{i:05d}_hr")
    (raw / "ptbxl_database.csv").write_text("\n".join(rows))
    item = {"question_type": "single-verify", "question": "?", "answer": ["no"]}
    questions = raw / "paraphrased/train"
    questions.mkdir(parents=True)
    (questions / "1.json").write_text(json.dumps([{**item, "ecg_id": [i]} for i in (1, 2)]))
    return raw


def test_from_raw_files_to_tables_as_a_command(raw, tmp_path):
    command = [sys.executable, "-m", "elm_jax.prepare"]
    first = [
        *command,
        "ptb_xl",
        "--raw",
        raw,
        "--out",
        tmp_path,
        "--segment-len",
        "500",
        "--report-language",
        "as-is",
    ]
    done = subprocess.run(first, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "records: 2" in done.stdout and "rows: train 0, val 0, test 2" in done.stdout
    assert "tables: ptb_xl_records.parquet (train 0, val 0, test 2), ptb_xl_reports.parquet (train" in done.stdout
    told = json.loads((tmp_path / "ptb_xl_report.json").read_text())["command"]
    assert told == "python -m elm_jax.prepare ptb_xl --raw R --out O --segment-len 500 --report-language as-is"
    second = [
        *command,
        "ecg_qa",
        "--raw",
        raw,
        "--out",
        tmp_path,
        "--records",
        tmp_path / "ptb_xl/preprocessed_500",
    ]
    done = subprocess.run(second, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "single: 2" in done.stdout and "patients_in_several_splits: 0" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ecg_qa.parquet", "ecg_qa_report.json", "ptb_xl", "ptb_xl_pretrain.parquet", "ptb_xl_records.parquet",
        "ptb_xl_report.json", "ptb_xl_reports.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "DATASET"),
        (["mimic"], "invalid choice: 'mimic'"),
        (["ptbxl"], "did you mean 'ptb_xl'?"),
        (["push", "RAW", "ecgs"], "OWNER/NAME: found ecgs"),
        (["synthetic", "--out", "o", "--generated", "2", "--recordings", "1"], "--recordings 1 and --generated 2"),
        (["ptb_xl", "--out", "o"], "--raw"),
        (["ptb_xl", "--raw", "nowhere", "--out", "o"], "ptbxl_database.csv"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--segment-len", "0"], "--segment-len: found 0"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--sampling-rate", "nan"], "--sampling-rate: found nan"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--segment-len", "600"], "too_short"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--report-language", "en"], "'en'"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--workers", "0"], "--workers: found 0"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--folds", "1"], "--folds: found 1"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--folds", "5", "--split", "legacy"], "which has five"),
        (["ptb_xl", "--raw", "RAW", "--out", "o", "--assume-unit", "mm"], "mV, uV, V or nV"),
        (["echonext", "--raw", "RAW", "--out", "o", "--assume-rate", "500"], "leave them out"),
        (["heed", "--raw", "RAW", "--out", "o"], "no I*/12SL_diagnoses"),
        (["folder", "--raw", "nowhere", "--out", "o"], "found no recording; expected recordings of any format"),
        (["georgia", "--raw", "RAW", "--out", "o"], "found no recording; expected WFDB records"),
        (["code15", "--raw", "RAW", "--out", "o"], "exams.csv: found no exams.csv; expected CODE-15%'s table"),
        (["check", "--out", "nowhere"], "no .parquet file"),
        (["ecg_qa", "--raw", "RAW", "--out", "o", "--forms", "templates"], "did you mean 'template'"),
        (["ecg_qa", "--raw", "RAW", "--out", "o", "--forms", ""], "--forms"),
        (["ecg_qa", "--raw", "RAW", "--out", "o", "--val", "0.6", "--test", "0.5"], "--val, --test"),
        (["ecg_qa", "--raw", "RAW", "--out", "o"], "run prepare ptb_xl first"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(raw, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert cli.guard(main, [str(raw) if a == "RAW" else a for a in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error


def test_tables_to_check_are_named_as_they_are_called_in_the_folder(raw, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    assert cli.guard(main, ["ptb_xl", "--raw", str(raw), "--out", out, "--segment-len", "500", "--workers", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    for name in ("ptb_xl_records.parquet", "out/ptb_xl_records.parquet"):
        capsys.readouterr()
        assert cli.guard(main, ["check", "--out", out, "--tables", name, "--workers", "1"]) == 0
        assert "rows: 2" in capsys.readouterr().out
    assert cli.guard(main, ["check", "--out", out, "--tables", "nowhere.parquet"]) == 2


def test_one_prepare_at_a_time_in_a_folder_and_other_splits_are_told(raw, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["ptb_xl", "--raw", str(raw), "--out", str(out), "--segment-len", "500", "--workers", "1"]
    (out / "ptb_xl").mkdir(parents=True)
    waits = (
        f"import fcntl, sys; f = open({str(out / 'ptb_xl/.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "f.write('process 7 on here'); f.flush(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert cli.guard(main, command) == 2
        assert "ptb_xl: found a folder into which process 7 on here prepares; expected one" in capsys.readouterr().err
        other.kill()
    assert cli.guard(main, command) == 0 and "warning" not in capsys.readouterr().err
    (out / "mine.parquet").touch()
    assert cli.guard(main, [*command, "--split", "patient"]) == 0
    said = capsys.readouterr().err
    assert "had --split official, and now have patient. Make these again" in said and "now: mine.parquet" in said


def test_what_cannot_be_looked_at_ends_with_status_1(raw, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["ptb_xl", "--raw", str(raw), "--out", str(out), "--segment-len", "500", "--workers", "1"]
    assert cli.guard(main, [*command, "--format", "shards"]) == 0
    index = out / "ptb_xl/preprocessed_500/shards.index"
    index.unlink()
    assert cli.guard(main, ["check", "--out", str(out), "--workers", "1"]) == 1
    assert "Not all could be looked at" in capsys.readouterr().out
    assert "found shards without their shards.index" in (out / "check_report.json").read_text()
    assert cli.guard(main, ["stats", str(out)]) == 1
    assert cli.guard(main, ["synthetic", "--out", str(out), "--segment-len", "500"]) == 2
    assert "shards without their shards.index" in capsys.readouterr().err
    assert cli.guard(main, [*command, "--format", "shards"]) == 0 and index.is_file()
    assert cli.guard(main, ["check", "--out", str(out), "--workers", "1"]) == 0


def test_help_explains(capsys):
    for arguments in (["--help"], ["ptb_xl", "--help"], ["ecg_qa", "--help"]):
        with pytest.raises(SystemExit) as done:
            cli.guard(main, arguments)
        assert done.value.code == 0 and "--" in capsys.readouterr().out
