"""docs/from_raw_files.md: from raw files of PTB-XL, ECG-QA and Georgia to a trained and evaluated model."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import goldens
import numpy as np
import pytest
import runs
import scipy.io

from elm_jax import cli, prepare, train
from elm_jax.assemble import find_llm
from elm_jax.ecg.names import LEADS

PAGE = Path(__file__).resolve().parents[2] / "docs/from_raw_files.md"
TRAINED, TESTED = 133, 405  # of PTB-XL, in folds 4 and 10, of which ECG-QA asks
# What makes the page's model small enough for a test; it is compiled, taught and asked as the page's.
SMALL = [
    f"--config.{key}={runs._text(value)}"
    for key, value in {
        "llm.scratch.hidden": 16, "llm.scratch.layers": 1, "llm.scratch.heads": 2, "llm.scratch.kv_heads": 1,
        "llm.scratch.mlp": 32, "encoder.config": {"resnet_type": "tiny", "width": 4}, "connector.hidden": None,
        "train.batch_size": 8, "train.steps": 2, "eval.limit": 2, "eval.max_new_tokens": 2, "eval.controls": [],
        "log.progress": False,
    }.items()
]  # fmt: skip


def written(folder: Path, name: str, file: str, form: str, values: np.ndarray, comments: Iterable[str] = ()) -> None:
    """The header of a WFDB record of ten seconds at 500 Hz."""
    lines = [f"{name} 12 500 {values.shape[1]}", *(f"{file} {form} 1000(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS)]
    (folder / f"{name}.hea").write_text("\n".join([*lines, *comments]) + "\n")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Some of the raw files as they are downloaded: real ones where they are at hand, else made in their layout."""
    real = goldens.shared() / "real"
    if real.is_dir():
        (tmp_path / "ptb-xl").mkdir()
        for name in ("records500", "scp_statements.csv"):
            (tmp_path / "ptb-xl" / name).symlink_to(real / "ecg/ptbxl" / name)
        with (real / "ecg/ptbxl/ptbxl_database.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["ecg_id"]) in (TRAINED, TESTED)]
        with (tmp_path / "ptb-xl/ptbxl_database.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (tmp_path / "ecg-qa").symlink_to(real / "text/ecgqa")
        (tmp_path / "georgia").mkdir()
        for file in (real / "ecg/cinc2021").glob("E0750[0-4].*"):
            (tmp_path / "georgia" / file.name).symlink_to(file)
        return tmp_path
    values = np.random.default_rng(0).integers(-1000, 1000, (12, 5000)).astype("<i2")
    folder = tmp_path / "ptb-xl/records500/00000"
    folder.mkdir(parents=True)
    rows = ["ecg_id,patient_id,report,strat_fold,filename_lr,filename_hr"]
    for number, fold in ((TRAINED, 4), (TESTED, 10)):
        name = f"{number:05d}_hr"
        (folder / f"{name}.dat").write_bytes(values.T.tobytes())
        written(folder, name, f"{name}.dat", "16", values)
        rows.append(f"{number},{number}.0,sinusrhythmus,{fold},,records500/00000/{name}")
        asked = {"question_type": "single-verify", "question": "Is it so?", "answer": ["yes"], "ecg_id": [number]}
        place = tmp_path / "ecg-qa/ptbxl/paraphrased" / ("test" if fold == 10 else "train")
        place.mkdir(parents=True)
        (place / "0.json").write_text(json.dumps([asked]))
    (tmp_path / "ptb-xl/ptbxl_database.csv").write_text("\n".join(rows))
    place = tmp_path / "georgia/g1"
    place.mkdir(parents=True)
    for name in ("E07500", "E07501", "E07503"):
        scipy.io.savemat(place / f"{name}.mat", {"val": values}, format="4")
        written(place, name, f"{name}.mat", "16+24", values, ["# Dx: 426783006"])
    return tmp_path


@pytest.mark.slow  # a model is compiled, trained and evaluated: 11 s of a processor
def test_the_page_leads_from_raw_files_to_scores(raw: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(raw)
    runs.prepare(monkeypatch, tmp_path / "cache")
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    named = [words[2].removeprefix("elm_jax.") for words in commands]
    assert named == ["prepare", "prepare", "train", "prepare", "train"]
    for _, _, command, *arguments in commands:
        if command == "elm_jax.prepare":
            assert cli.guard(prepare.main, [*arguments, *(["--workers=1"] if "ecg_qa" not in arguments else [])]) == 0
        else:
            find_llm(cli.ConfigFlags.parse(arguments).load())  # what can be told before the data
            last = cli.ConfigFlags.parse([*arguments, *SMALL]).load()
    assert json.loads(Path("data/ecg_qa_report.json").read_text())["rows"]["test"] > 0
    train.main(last)  # of the page's two runs the one with both datasets
    metrics = json.loads(Path("runs/both/eval/ecg_qa_georgia_questions-test/metrics.json").read_text())
    assert metrics["n"] > 0 and "exact_match" in metrics["metrics"]
