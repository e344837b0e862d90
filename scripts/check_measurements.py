"""Measurements of real recordings against what is known of them: rates, hand-measured intervals, labels, time.

    python scripts/check_measurements.py --real FOLDER

FOLDER has ptbxl, cinc2021, cpsc2018 and further databases below ecg, as the reference data of the tests has. Rates are
held against the median of three leads of XQRS (wfdb), hand-measured intervals are those of tests/data. Prints a line of
JSON and a sentence; exits with 1 where the promise fails: 90 % of PR and QT within 25 ms, of QRS within 15 ms.
Takes some minutes, for XQRS.
"""

import argparse
import ast
import csv
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from wfdb.processing import XQRS

from elm_jax.ecg.beats.measurements import Measurements, measure
from elm_jax.ecg.beats.words import describe
from elm_jax.ecg.recording import Recording, read_ecg
from elm_jax.errors import UserError

HAND = Path(__file__).parents[1] / "tests" / "data" / "hand_measured.csv"
WITHIN = {"pr_ms": 25, "qrs_ms": 15, "qt_ms": 25}
THREE = (1, 7, 10)  # leads II, V2, V5
FOLDERS = ("ptbxl/records500", "cinc2021", "cpsc2018", "code15", "ludb", "ptbdb")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, metavar="FOLDER", help="the folder that has ecg/")
    parser.add_argument("--no-rates", action="store_true", help="without XQRS, which takes the most time")
    options = parser.parse_args()
    logging.disable()
    root = options.real / "ecg"
    found: dict[str, Measurements] = {}
    rates, seconds = Counter[str](), []
    off: list[str] = []
    for path in recordings(root):
        try:
            recording = read_ecg(path, unstated_rate=500)
        except UserError:
            rates["unreadable"] += 1
            continue
        begin = time.process_time()
        name = str(path.relative_to(options.real))
        found[name] = measure(recording.signal, recording.sampling_rate)
        if recording.signal.shape[1] <= 10 * recording.sampling_rate:
            seconds.append(time.process_time() - begin)
        if not options.no_rates:
            near = agrees(found[name], recording)
            rates["within 2 bpm" if near else "not"] += 1
            off += [] if near else [name]
    hand = {use: against_hand(found, use) for use in ("check", "tuned")}
    figures = {
        "recordings": len(found), "rates": dict(rates), "rates_not": off, "hand": hand,
        "labels": labels(found, root / "ptbxl"),
        "fibrillation": fibrillation(found, options.real), "coarse": coarse(found, root / "ptbxl", options.real),
        "median_ms": round(1000 * float(np.median(seconds)), 1), "most_ms": round(1000 * max(seconds), 1),
    }  # fmt: skip
    print(json.dumps(figures))
    held = all(part["near"] >= 0.9 * part["of"] for part in hand["check"].values())
    print(f"{'held' if held else 'NOT held'}: hand-measured intervals near for nine of ten")
    return 0 if held else 1


def recordings(root: Path) -> list[Path]:
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*")) if file.is_file()]
    heads = [file for file in files if file.suffix == ".hea"]
    return heads + [f for f in files if f.suffix == ".mat" and f.with_suffix(".hea") not in heads]


def agrees(found: Measurements, recording: Recording) -> bool:
    rates = []
    for lead in THREE:
        detector = XQRS(sig=recording.signal[lead].astype(float), fs=recording.sampling_rate)
        detector.detect(verbose=False)
        at = detector.qrs_inds
        rates.append(60 * recording.sampling_rate * (len(at) - 1) / (at[-1] - at[0]) if len(at) > 1 else np.nan)
    rate = found.values["rate"].value
    return rate is not None and abs(rate - float(np.nanmedian(rates))) <= 2


def against_hand(found: dict[str, Measurements], use: str) -> dict[str, dict[str, float]]:
    """For each interval how many are near, of how many, and the mean and median error in ms."""
    errors: dict[str, list[float]] = {name: [] for name in WITHIN}
    by_path = {str(Path(name).with_suffix("")): m for name, m in found.items()}
    for row in csv.DictReader(HAND.open()):
        for name in WITHIN if row["use"] == use else ():
            value = by_path[str(Path(row["recording"]).with_suffix(""))].values[name.removesuffix("_ms")].value
            if row[name]:
                errors[name].append(np.nan if value is None else value - float(row[name]))
    return {
        name: {
            "near": int(np.sum(np.abs(e) <= WITHIN[name])), "of": len(e),
            "mean": round(float(np.nanmean(e)), 1), "median_size": round(float(np.nanmedian(np.abs(e))), 1),
        }
        for name, e in errors.items()
    }  # fmt: skip


def labels(found: dict[str, Measurements], ptbxl: Path) -> dict[str, Any]:
    """What PTB-XL's cardiologists said, and what is measured: counts of [yes, of]."""
    with (ptbxl / "ptbxl_database.csv").open() as file:
        codes = {Path(row["filename_hr"]).name: ast.literal_eval(row["scp_codes"]) for row in csv.DictReader(file)}
    told = {name: (codes.get(Path(name).stem, {}), m) for name, m in found.items() if "ptbxl" in name}

    def share(code: str, holds: Any, without: tuple[str, ...] = ()) -> list[int]:
        asked = [m for has, m in told.values() if code in has and not set(without) & set(has)]
        return [sum(bool(holds(m)) for m in asked), len(asked)]

    def above(name: str, limit: float) -> Any:
        return lambda m: (m.values[name].value or 0) > limit

    return {
        "AFIB: fibrillation": share("AFIB", lambda m: m.rhythm.regularity == "fibrillation"),
        "SR: fibrillation": share("SR", lambda m: m.rhythm.regularity == "fibrillation"),
        "SARRH: varying": share("SARRH", lambda m: m.rhythm.regularity == "varying"),
        "PVC: early beats of another look": share("PVC", lambda m: m.rhythm.ectopic),
        "NORM: beats of another look": share("NORM", lambda m: m.rhythm.ectopic, ("PVC",)),
        "1AVB: PR > 200": share("1AVB", above("pr", 200)), "NORM: PR > 200": share("NORM", above("pr", 200), ("1AVB",)),
        "CLBBB: QRS > 120": share("CLBBB", above("qrs", 120)), "CRBBB: QRS > 120": share("CRBBB", above("qrs", 120)),
        "NORM: ST elevation said": share("NORM", lambda m: "ST elevation" in describe(m)),
        "NORM: ST depression said": share("NORM", lambda m: "ST depression" in describe(m)),
        "NORM: QRS > 120": share("NORM", above("qrs", 120)),
        "LAFB: axis < -30": share("LAFB", lambda m: (m.values["axis"].value or 0) < -30),
    }  # fmt: skip


def fibrillation(found: dict[str, Measurements], real: Path) -> dict[str, Any]:
    """Of all sets: which that no label calls fibrillation are called so, and how many of those that one does."""
    with (real / "ecg/ptbxl/ptbxl_database.csv").open() as file:
        told = {Path(row["filename_hr"]).name: row["scp_codes"] for row in csv.DictReader(file)}
    with (real / "ecg/cpsc2018/REFERENCE.csv").open() as file:
        told |= {row["Recording"]: f"CPSC {row['First_label']} {row['Second_label']}" for row in csv.DictReader(file)}
    counts: dict[str, Counter[str]] = {"ptbxl": Counter(), "others": Counter()}
    false = []
    for name, m in found.items():
        head = (real / name).with_suffix(".hea")
        label = told.get(Path(name).stem) or (head.read_text() if head.is_file() else "")
        has = any(sign in label for sign in ("'AFIB'", "164889003", "ibrillation", "CPSC 2"))
        called = m.rhythm.regularity == "fibrillation"
        part = counts["ptbxl" if "ptbxl" in name else "others"]
        part["found" if has and called else "missed" if has else "false" if called else "rightly not"] += 1
        false += [name] if called and not has else []
    return {**{name: dict(part) for name, part in counts.items()}, "false": false}


def coarse(found: dict[str, Measurements], ptbxl: Path, real: Path) -> dict[str, float]:
    """Median difference of PTB-XL's recordings at 100 Hz from the same at 500 Hz, ms."""
    differences: dict[str, list[float]] = {"pr": [], "qrs": [], "qt": []}
    for path in sorted((ptbxl / "records100").rglob("*.hea")):
        twin = str(path.relative_to(real)).replace("records100", "records500").replace("_lr", "_hr")
        recording = read_ecg(path)
        slow = measure(recording.signal, recording.sampling_rate)
        for name, kept in differences.items():
            a, b = slow.values[name].value, found[twin].values[name].value if twin in found else None
            kept += [a - b] if a is not None and b is not None else []
    return {name: round(float(np.median(np.abs(kept))), 1) for name, kept in differences.items() if kept}


if __name__ == "__main__":
    sys.exit(main())
