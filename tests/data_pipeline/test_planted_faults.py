"""What may be wrong with raw files and tables, planted: `prepare` and its check tell each in words, and go on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_jax import cli
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.synthetic import synthesize
from elm_jax.prepare import main

RATE = 250
ARMS = ([0, 2, 1, 4, 3, 5], [0])  # limb leads with the arms' electrodes exchanged: their order, and which is negated


def record(folder: Path, name: str, signal: np.ndarray, gain: float = 1000, samples: int | None = None) -> Path:
    """A WFDB record of a signal (12, L) in mV, written in steps of 1 µV; returns the file of its samples."""
    file = folder / f"{name}.dat"
    file.write_bytes(np.rint(signal.T * 1000).astype("<i2").tobytes())
    lines = [f"{name} 12 {RATE} {samples or signal.shape[1]}"]
    lines += [f"{file.name} 16 {gain:g}(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Where recordings with faults were prepared, and the report."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("out")
    heart = synthesize((7, 0), RATE, 2500).astype(np.float64)
    record(raw, "good", heart)
    order, negated = ARMS
    limbs = heart[order]
    limbs[negated] *= -1
    record(raw, "arms_exchanged", np.concatenate([limbs, heart[6:]]))
    swapped = heart.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    record(raw, "leads_swapped", swapped)
    record(raw, "wrong_gain", heart, gain=10)
    table = np.rint(heart.T * 1000).astype(int)
    rows = "\n".join(",".join(map(str, row)) for row in table)
    (raw / "microvolts_unsaid.csv").write_text(f"# fs: {RATE}\n{','.join(LEADS)}\n{rows}\n")
    with_fractions = "\n".join(",".join(f"{value + 0.25}" for value in row) for row in table)
    (raw / "microvolts_as_mv.csv").write_text(f"# fs: {RATE}\n{','.join(LEADS)}\n{with_fractions}\n")
    file = record(raw, "truncated", heart)
    file.write_bytes(file.read_bytes()[:30_000])
    record(raw, "lying", heart, samples=10**12)
    (raw / "bomb.csv.gz").write_bytes(gzip.compress(bytes(24 << 20)))
    record(raw, "good_again", 1.2 * heart)  # under another name, at another gain
    assert cli.guard(main, ["folder", "--raw", str(raw), "--out", str(out), "--workers", "1"]) == 0
    return out, json.loads((out / "folder_report.json").read_text())


@pytest.mark.parametrize(
    "kind, name, says",
    [
        ("reversal", "arms_exchanged", "arms"),
        ("limb_sums", "leads_swapped", "II and III"),
        ("scale", "wrong_gain", "mV"),
        ("unreadable", "microvolts_unsaid.csv", "unit"),
        ("scale", "microvolts_as_mv.csv", "mV"),
        ("unreadable", "truncated", "an unreadable record"),
        ("unreadable", "lying", "samples"),
        ("unreadable", "bomb.csv.gz", "packed bytes that become more than"),
    ],
)
def test_a_planted_fault_is_told(
    told: tuple[Path, dict[str, dict[str, str]]], kind: str, name: str, says: str
) -> None:
    assert says in told[1][kind][name], told[1][kind][name]


def test_what_has_no_fault_is_prepared_without_a_word(told: tuple[Path, dict[str, dict[str, str]]]) -> None:
    lists = [found for found in told[1].values() if isinstance(found, dict)]
    assert not any(name in found for name in ("good", "good_again") for found in lists)


def test_a_copy_and_a_patient_in_two_splits_are_told(
    told: tuple[Path, dict[str, dict[str, str]]], tmp_path: Path
) -> None:
    out, _ = told
    paths = [f"folder/preprocessed_2500/{name}_0.npy" for name in ("good", "good_again")]
    for name, patients in (("copies", ["1", "2"]), ("patients", ["3", " 3.0"])):
        rows = {"ecg_path": paths, "patient_id": patients, "split": ["train", "test"]}
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
        tables = ["--tables", str(tmp_path / f"{name}.parquet")]
        assert cli.guard(main, ["check", "--out", str(out), "--workers", "1", *tables]) == 1
        report = json.loads((out / "check_report.json").read_text())
        assert list(report["copies_in_several_splits"]) == [" and ".join(paths)]
        assert report["patients_in_several_splits"] == ({"3": "test, train"} if name == "patients" else {})
