"""Grounded instruction data of prepared recordings: each read in five steps (`grounded`), without a model.

What is read are the segments of the tables <dataset>_records.parquet that `prepare` left, with their reports, patients
and splits. Leaves F.parquet, and F_report.json beside it, which lists what was left out, and which statements of
reports the measurements contradict.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.data.prepare.grounded import QUESTIONS, tell
from elm_jax.data.prepare.output import compact, write_rows
from elm_jax.data.prepare.raw import unlike_a_path
from elm_jax.data.prepare.splits import SPLITS
from elm_jax.data.prepare.work import in_order
from elm_jax.ecg.beats.measurements import measure
from elm_jax.ecg.recording import read_ecg
from elm_jax.errors import UserError, refused
from elm_jax.folders import write_json
from elm_jax.stopping import each

NAME = "grounding"  # of the records, by which evaluation holds their answers against what is measured
_TABLES = "*_records.parquet"
_COLUMNS = ["ecg_path", "patient_id", "split", "report"]
_MOST = 10_000_000  # recordings, and seeds


def prepare_grounding(
    records: Path, out: Path, length: int = 2500, recordings: int | None = None, thinking: bool = False, seed: int = 0,
    workers: int = 1, progress: bool = True, made_by: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the table `out` (.parquet) with paths relative to `records`; returns (and writes) the counts.

    Args:
        records: where `prepare` left segments of `length` samples with their tables.
        recordings: how many to read, drawn by `seed`; None: all.
        thinking: the steps are a thought, and the conclusion the answer; else all is the answer.
        workers: processes, on which nothing depends.

    Raises:
        UserError: there are no such segments, or of none is there anything to say.
    """
    for flag, number, least in (("--recordings", recordings, 1), ("--seed", seed, 0)):
        if number is not None and not least <= number <= _MOST:
            raise UserError(flag, str(number), f"{least} to {_MOST}", "correct it")
    rows = _rows(records, length)
    if recordings is not None:
        rows = [rows[n] for n in sorted(np.random.default_rng(seed).permutation(len(rows))[:recordings])]
    counts, left_out, contradicted = Counter[str](), dict[str, str](), dict[str, str]()

    def made() -> Iterator[dict[str, str]]:
        told = in_order(partial(_read, records, thinking, seed), rows, workers)
        bar = tqdm(each(told, "recording"), total=len(rows), desc="recordings", unit="", disable=not progress)
        for row, (question, answer, against, problem) in zip(rows, bar, strict=True):
            if problem:
                left_out[row["ecg_path"]] = problem
                continue
            if against:
                contradicted[row["ecg_path"]] = against
            counts[row["split"]] += 1
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            said = {"ecg_path": row["ecg_path"], "text": compact(turns), "name": NAME}
            yield {**said, "patient_id": row["patient_id"] or "", "split": row["split"]}

    write_rows(out, made())
    if not counts:
        first = next((f"{path}: {why}" for path, why in left_out.items()), "")
        raise UserError(records, f"nothing to say of {len(rows)} recordings ({first})", "ECGs", "prepare others")
    report = {
        **(made_by or {}),
        "recordings": len({row["ecg_path"] for row in rows} - left_out.keys()),
        "rows": {split: counts[split] for split in (SPLITS if set(counts) <= set(SPLITS) else sorted(counts))},
        "seed": seed,
        "left_out": left_out,
        "statements_left_out": contradicted,
    }
    write_json(out.with_name(f"{out.stem}_report.json"), report)
    return report


def _rows(records: Path, length: int) -> list[dict[str, str]]:
    """The rows of all tables of records about segments of this length."""
    import pyarrow.parquet as pq

    found, fix = [], "prepare recordings into this folder first, or give their --records"
    for file in sorted(records.glob(_TABLES)):
        with refused(file, "an unreadable table", "a table that prepare made", "prepare it again", Exception):
            for batch in pq.ParquetFile(file).iter_batches(columns=_COLUMNS):
                found += [row for row in batch.to_pylist() if f"/preprocessed_{length}/" in row["ecg_path"]]
    if not found:
        raise UserError(records, f"no {_TABLES} with segments of {length} samples", "prepared recordings", fix)
    return found


def _read(records: Path, thinking: bool, seed: int, row: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Question, answer, and the statements that are left out of it; or why there is none."""
    path = row["ecg_path"]
    try:
        if problem := unlike_a_path(path):
            raise UserError(path, problem, f"a recording in {records}", "correct the table")
        recording = read_ecg(records / path)
    except UserError as error:
        return "", "", "", str(error)
    found = measure(recording.signal, recording.sampling_rate, recording.leads)
    if not found.beats:
        return "", "", "", found.values["rate"].reason
    draw = np.random.default_rng([seed, zlib.crc32(path.encode())])
    question = QUESTIONS[int(draw.integers(len(QUESTIONS)))]
    told = tell(found, row["report"] or "", draw)
    return question, told.text(thinking), "; ".join(told.left_out), ""
