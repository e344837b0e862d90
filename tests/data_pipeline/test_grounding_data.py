"""Grounded data: each number in a reading is the measurement as printed, and the grounded evaluation agrees."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pyarrow.parquet as pq
import pytest

from elm_jax.config import DataConfig
from elm_jax.data.prepare.card import make_card
from elm_jax.data.prepare.grounded import STEPS, tell
from elm_jax.data.prepare.grounding import NAME, prepare_grounding
from elm_jax.data.prepare.output import NpyFiles, write_table
from elm_jax.data.sources import load_records
from elm_jax.ecg.beats.measurements import measure
from elm_jax.ecg.recording import read_ecg
from elm_jax.ecg.synthetic import synthesize
from elm_jax.errors import UserError
from elm_jax.prepare import main

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where `scripts` lies
from scripts.check_grounding import check

REPORTS = (
    "sinus rhythm. normal ECG",
    "third degree fantasy; heart rate 3/min. axis 170 degrees",
    "",
    "x",
    "atrial fibrillation",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `prepare` leaves it: five recordings with reports, one without heartbeats, one that is not there."""
    out = tmp_path_factory.mktemp("prepared")
    store, place = NpyFiles(out / "georgia" / "preprocessed_2500"), "georgia/preprocessed_2500"
    said = {"report": "", "original_sf": 250.0, "target_sf": 250.0, "segment_len": 2500, "ecg_path": ""}
    rows = []
    for number in range(7):
        signal = synthesize((5, number), 250.0, 2500)
        if number < 6:
            store.leave(store.pack(f"E{number}", (signal * (number != 5))[None], said, out, None))
        row = {
            "ecg_path": f"{place}/E{number}_0.npy",
            "patient_id": f"p{number}",
            "split": "test" if number == 4 else "train",
        }
        rows.append(row | {"report": REPORTS[number] if number < len(REPORTS) else ""})
    write_table(out / "georgia_records.parquet", rows)
    return out


def test_readings_are_grounded_and_what_cannot_be_read_is_listed(prepared: Path, tmp_path: Path) -> None:
    assert main(["grounding", "--records", str(prepared), "--out", str(tmp_path / "g.parquet"), "--workers", "2"]) == 0
    report = json.loads((tmp_path / "g_report.json").read_text())
    assert report["rows"] == {"train": 4, "val": 0, "test": 1}
    assert sorted(Path(path).name for path in report["left_out"]) == ["E5_0.npy", "E6_0.npy"]
    assert "heart rate 3/min; axis 170 degrees" in report["statements_left_out"].values()
    rows = pq.read_table(tmp_path / "g.parquet").to_pylist()
    assert {row["name"] for row in rows} == {NAME} and rows[4]["split"] == "test" and rows[0]["patient_id"] == "p0"
    for row in rows:
        recording, text = read_ecg(prepared / row["ecg_path"]), json.loads(row["text"])[1]["value"]
        counts = check(measure(recording.signal, recording.sampling_rate, recording.leads), text)
        assert counts["numbers"] > 10 and all(f"{step}.**" in text for step in STEPS)
        assert not any(
            counts[name] for name in ("numbers not measured", "wrong", "findings not cited", "planted not found")
        )
    assert len({json.loads(row["text"])[0]["value"] for row in rows}) > 1  # several wordings


def test_readings_depend_on_the_seed_alone_and_train(prepared: Path, tmp_path: Path) -> None:
    def made(name: str, **how: Any) -> bytes:
        prepare_grounding(prepared, tmp_path / name, progress=False, **how)
        return (tmp_path / name).read_bytes()

    assert made("a.parquet") == made("b.parquet", workers=2) != made("c.parquet", seed=1)
    prepare_grounding(prepared, prepared / "grounding.parquet", recordings=3, thinking=True, progress=False,
                      made_by={"dataset": "grounding"})  # fmt: skip
    records = load_records(DataConfig(names=("grounding.parquet",), root=str(prepared), val_fraction=0), "train", 0)
    text = records[0].text[1]["value"]
    assert text.startswith("<think>\n**Step 1") and text.endswith("</answer>") and records[0].name == NAME
    assert set(make_card(prepared).sources) == {"georgia"}


def test_what_cannot_be_grounded_is_said(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no .*_records.parquet with segments of 1000 samples"):
        prepare_grounding(prepared, tmp_path / "g.parquet", length=1000, progress=False)
    with pytest.raises(UserError, match="--recordings"):
        prepare_grounding(prepared, tmp_path / "g.parquet", recordings=0, progress=False)


def test_a_path_that_leads_out_of_the_records_is_listed_and_not_read(prepared: Path, tmp_path: Path) -> None:
    inside, place = tmp_path / "records", "georgia/preprocessed_2500/E0_0.npy"
    (inside / place).parent.mkdir(parents=True)
    (inside / place).write_bytes((prepared / place).read_bytes())
    (tmp_path / "other" / place).parent.mkdir(parents=True)
    (tmp_path / "other" / place).write_bytes((prepared / place).read_bytes())
    out = [f"../other/{place}", str(tmp_path / "other" / place)]
    rows = [{"ecg_path": path, "patient_id": "p", "split": "train", "report": ""} for path in (place, *out)]
    write_table(inside / "georgia_records.parquet", rows)
    report = prepare_grounding(inside, inside / "g.parquet", progress=False)
    assert report["recordings"] == 1 and sorted(report["left_out"]) == sorted(out)
    assert all("not a path below" in why for why in report["left_out"].values())


def test_without_a_report_the_limits_conclude_and_reasons_are_told() -> None:
    noisy = synthesize((5, 0), 250.0, 2500)
    noisy[6:] = 0.0
    told = tell(measure(noisy, 250.0), "", np.random.default_rng(0))
    assert "V1 (flat)" in told.steps[0] and "cannot be measured: no V1" in told.steps[2] and told.conclusions


def test_real_recordings() -> None:
    folder = goldens.shared() / "real/ecg/ptbxl/records500"
    if not folder.is_dir():
        pytest.skip("no real recordings: set ELM_JAX_SHARED")
    for number, file in enumerate(sorted(folder.rglob("*.hea"))[::45]):  # all of them: scripts/check_grounding.py
        recording = read_ecg(file)
        found = measure(recording.signal, recording.sampling_rate, recording.leads)
        counts = check(found, tell(found, "", np.random.default_rng(number)).text())
        assert not any(
            counts[name] for name in ("numbers not measured", "wrong", "findings not cited", "planted not found")
        )
