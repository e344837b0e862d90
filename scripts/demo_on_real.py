"""Does the demo, which was shown nothing but synthetic ECGs, read real ones? It is asked about recordings of PTB-XL.

    python scripts/demo_on_real.py --run runs/demo --ptb-xl FOLDER [--out FOLDER]

Each recording at 500 Hz in PTB-XL's folder is asked for its heart rate and, where the cardiologists' statements name
sinus rhythm, atrial fibrillation or flutter, whether its rhythm is regular. The truth of a rate is that of the R peaks,
between the first and the last: wfdb's XQRS finds them in each lead, and the median of the leads counts. A miss is shown
with how many leads agree with that median: where few do, the truth itself is in doubt.

`elm_jax.evaluate` asks, scores and runs the controls; its reports are in the run's folder. Left in --out: the
questions (`heart_rate.jsonl`, `regularity.jsonl`), the tables (`tables.md`) and pictures of the missed recordings.
"""

import argparse
import ast
import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import wfdb
from wfdb.processing import XQRS

import elm_jax
from elm_jax.pictures.ecg_paper import draw_ecg

QUESTIONS = {"heart_rate": "What is the heart rate?", "regularity": "Is the rhythm regular or irregular?"}
SCORES = {"heart_rate": "heart_rate.within_5_bpm", "regularity": "exact_match"}
SINUS, IRREGULAR = {"SR", "SBRAD", "STACH"}, {"AFIB", "AFLT"}
NEAR = 5  # beats per minute
DRAWN = 12  # pictures of misses at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a trained demo")
    parser.add_argument("--ptb-xl", type=Path, required=True, help="folder with ptbxl_database.csv and records500")
    parser.add_argument("--out", type=Path, default=Path("runs/demo_on_real"), help="what is made of it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    records = list(questions(options.ptb_xl))
    columns = ("question", "recordings", "score (95 %)", "zeros", "noise", "shuffled", "no ECG", "best constant")
    rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    misses: list[dict[str, Any]] = []
    for kind in QUESTIONS:
        table = options.out / f"{kind}.jsonl"
        table.write_text("".join(json.dumps(record) + "\n" for record in records if record["name"] == kind))
        evaluate(options.run, options.ptb_xl, table)
        results = options.run / "eval" / f"{kind}-test"
        answers = joined(table, results / "predictions.jsonl")
        rows.append(row(kind, json.loads((results / "metrics.json").read_text()), len(answers)))
        misses += [answer for answer in answers if not right(kind, answer)]
        if kind == "regularity":
            told = Counter((answer["rhythm"], answer["answer"]) for answer in answers)
            rhythms = [f"{rhythm}: {n} times {answer!r}" for (rhythm, answer), n in sorted(told.items())]
    text = "\n".join([*rows, "", *rhythms, "", *missed(misses), ""])
    (options.out / "tables.md").write_text(text)
    for answer in [miss for miss in misses if miss["name"] == "heart_rate"][:DRAWN]:
        recording = elm_jax.read_ecg(options.ptb_xl / answer["recording"])
        title = f"{answer['recording']}: answer {answer['answer']}, truth {answer['truth']}, {answer['leads']}"
        path = options.out / f"{Path(answer['recording']).name}.png"
        draw_ecg(recording.signal, recording.sampling_rate, path, title=title)
    print(text)


def questions(ptb_xl: Path) -> list[dict[str, Any]]:
    """The records of both kinds, one after the other for each recording that is there."""
    found = []
    with (ptb_xl / "ptbxl_database.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if (ptb_xl / f"{row['filename_hr']}.hea").is_file()]
    for row in rows:
        codes = set(ast.literal_eval(row["scp_codes"]))
        rates = leads_rates(ptb_xl / row["filename_hr"])
        rate = float(np.nanmedian(rates))
        near = int((np.abs(rates - rate) <= NEAR).sum())
        rhythm = "AFIB or AFLT" if codes & IRREGULAR else "sinus rhythm" if codes & SINUS else "not stated"
        truths = {"heart_rate": str(round(rate))}
        if rhythm != "not stated":
            truths["regularity"] = "regular" if rhythm == "sinus rhythm" else "irregular"
        for kind, truth in truths.items():
            turns = [{"from": "human", "value": QUESTIONS[kind]}, {"from": "gpt", "value": truth}]
            found.append({
                "ecg_path": row["filename_hr"], "patient_id": row["patient_id"], "split": "test", "name": kind,
                "text": json.dumps(turns), "recording": row["filename_hr"], "rhythm": rhythm,
                "leads": f"{near} of {len(rates)} leads agree", "statements": " ".join(sorted(codes)),
            })  # fmt: skip
    return found


def leads_rates(record: Path) -> np.ndarray:
    """Beats per minute between the first and the last R peak, in each lead; NaN where fewer than two are found."""
    found = wfdb.rdrecord(str(record))
    rates = []
    for lead in found.p_signal.T:
        detector = XQRS(sig=lead, fs=found.fs)
        detector.detect(verbose=False)
        peaks = detector.qrs_inds
        rates.append(60 * found.fs * (len(peaks) - 1) / (peaks[-1] - peaks[0]) if len(peaks) > 1 else np.nan)
    return np.array(rates)


def evaluate(run: Path, root: Path, table: Path) -> None:
    command = [
        sys.executable, "-m", "elm_jax.evaluate", f"--checkpoint={run}", f"--config.data.names={table.resolve()}",
        f"--config.data.root={root.resolve()}", "--noconfig.log.progress",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def joined(table: Path, predictions: Path) -> list[dict[str, Any]]:
    """The predictions, each with what the record says that it answers: its id ends in the record's number."""
    records = [json.loads(line) for line in table.read_text().splitlines()]
    found = [json.loads(line) for line in predictions.read_text().splitlines()]
    return [records[int(line["id"].rpartition("#")[0].rpartition(":")[2])] | line for line in found]


def row(kind: str, metrics: dict[str, Any], count: int) -> str:
    name = SCORES[kind]
    score, controls = metrics["metrics"][name], metrics["controls"]
    low, high = score["ci95"]
    told = [controls[control][name]["value"] for control in ("zeros", "noise", "shuffled", "text_only")]
    values = " | ".join(f"{value:.3f}" for value in (*told, metrics["baselines"]["constant"][name]))
    return f"| {kind} | {count} | {score['value']:.3f} ({low:.3f} to {high:.3f}) | {values} |"


def right(kind: str, answer: dict[str, Any]) -> bool:
    if kind == "regularity":
        return answer["answer"] == answer["truth"]
    return answer["answer"].isdigit() and abs(int(answer["answer"]) - int(answer["truth"])) <= NEAR


def missed(misses: list[dict[str, Any]]) -> list[str]:
    lines = ["| recording | question | answer | truth | R peaks | statements |", f"|{'---|' * 6}"]
    for miss in misses:
        lines.append(
            f"| {Path(miss['recording']).name} | {miss['name']} | {miss['answer']} | {miss['truth']} "
            f"| {miss['leads']} | {miss['statements']} |"
        )
    return lines


if __name__ == "__main__":
    main()
