"""Is what is retrieved right? Reports and superclasses of PTB-XL, with the patient excluded and without.

    python scripts/retrieval_on_ptbxl.py --ptbxl FOLDER

FOLDER is PTB-XL as it is downloaded, or a part of it. Recordings are prepared in halves of 5 s; the first halves are
the index, and the second ones ask. Three protocols: the patient excluded, as by default; nothing excluded, where the
other half of the recording is there to be found; nothing excluded, and the asking half itself is in the index, as a
database of the whole dataset has it. Beside them what a recording drawn at random gives. Prints a line of JSON for each
row, a table, and a sentence; exits with 1 where a patient of their own is found by default.
"""

import argparse
import ast
import csv
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from elm_jax.config import DataConfig
from elm_jax.data.prepare import DATASETS
from elm_jax.data.prepare.runner import prepare_dataset
from elm_jax.data.specs import signal_spec
from elm_jax.retrieval.build import build_index
from elm_jax.retrieval.index import opened
from elm_jax.retrieval.lookup import Retriever
from elm_jax.scoring.answers import token_f1

RATE, LENGTH = 250, 1250
WAYS = (("feature", "z_scored"), ("feature", "raw"), ("signal", "raw"), ("combined", "z_scored"), ("combined", "raw"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptbxl", type=Path, required=True, metavar="FOLDER", help="with ptbxl_database.csv")
    options = parser.parse_args()
    classes = superclasses(options.ptbxl)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        prepare_dataset("ptb_xl", DATASETS["ptb_xl"], options.ptbxl, out, RATE, LENGTH, progress=False)
        rows = pq.read_table(out / "ptb_xl_records.parquet").to_pylist()
        for row in rows:
            row["split"] = "train"
        first, second = ([row for row in rows if row["ecg_path"].endswith(f"_{half}.npy")] for half in (0, 1))
        asked = [row for row in second if row["report"] and classes.get(number(row["ecg_path"]))]
        found = []
        for called, held, compat in (
            ("patient excluded", first, ()),
            ("nothing excluded, other half", first, ("rag_protocol",)),
            ("nothing excluded, itself", [*first, *second], ("rag_protocol",)),
        ):
            index = index_of(out, held, called.replace(" ", "_"))
            for mode, scaling in WAYS:
                retriever = Retriever(
                    str(index), 1, mode, scaling, "report", "system", "exact", tuple(range(12)), RATE, compat
                )
                one = {"protocol": called, "mode": mode, "scaling": scaling}
                found.append({**one, **judged(retriever, out, asked, classes)})
                print(json.dumps(found[-1]), flush=True)
        found.append({"protocol": "drawn at random", "mode": "", "scaling": "", **by_chance(asked, first, classes)})
        print(json.dumps(found[-1]))
    print("| protocol | mode | superclasses equal | report equal | token F1 | own study | one entry for |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        how = f"{one['mode']}, {one['scaling']}" if one["mode"] else ""
        cells = [f"{100 * one[key]:.0f} %" for key in ("superclass", "report", "f1", "own", "commonest")]
        print(f"| {one['protocol']} | {how} | {' | '.join(cells)} |")
    ours, theirs = (next(one for one in found if one["protocol"] == called) for called in (
        "patient excluded", "nothing excluded, itself"))  # fmt: skip
    print(
        f"Of {len(asked)} recordings what is retrieved has the right superclasses in {ours['superclass']:.0%} "
        f"with the patient excluded, and in {theirs['superclass']:.0%} where a recording may find itself."
    )
    return int(any(one["own"] for one in found if one["protocol"] == "patient excluded"))


def superclasses(folder: Path) -> dict[str, frozenset[str]]:
    """ecg_id -> its diagnostic superclasses, of statements whose likelihood is not 0."""
    with (folder / "scp_statements.csv").open(encoding="utf-8") as file:
        known = {row[""]: row["diagnostic_class"] for row in csv.DictReader(file) if row["diagnostic"]}
    with (folder / "ptbxl_database.csv").open(encoding="utf-8") as file:
        rows = [(row["ecg_id"], ast.literal_eval(row["scp_codes"])) for row in csv.DictReader(file)]
    return {
        name: frozenset(known[code] for code, likely in codes.items() if likely and known.get(code))
        for name, codes in rows
    }


def number(path: str) -> str:
    return str(int(Path(path).name.split("_")[2]))


def index_of(out: Path, rows: Sequence[dict[str, Any]], name: str) -> Path:
    table = out / f"{name}.jsonl"
    table.write_text("".join(json.dumps({**row, "text": row["report"] or "none"}) + "\n" for row in rows))
    data = DataConfig(names=(table.name,), root=str(out), sampling_rate=RATE, segment_len=LENGTH)
    build_index(data, out / name, signals=True, progress=False)
    return out / name


def judged(
    retriever: Retriever, out: Path, asked: Sequence[dict[str, Any]], classes: dict[str, frozenset[str]]
) -> dict[str, Any]:
    data = DataConfig(root=str(out), sampling_rate=RATE, segment_len=LENGTH)
    spec, given = signal_spec(data, 0), list[tuple[str, str]]()
    for row in asked:
        best = retriever.found(spec.sought(row["ecg_path"], 0, frozenset(row["patient_id"].split("+"))))
        entry = opened(retriever.folder).entry(best[0][0]) if best else None
        given.append((entry.path, entry.report) if entry else ("", ""))
    return scores(asked, given, classes)


def by_chance(
    asked: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]], classes: dict[str, frozenset[str]]
) -> dict[str, Any]:
    """The mean over ten draws of a recording of another patient."""
    rng, each = np.random.default_rng(0), []
    for _ in range(10):
        drawn = [
            rng.choice([i for i, row in enumerate(held) if row["patient_id"] != one["patient_id"]]) for one in asked
        ]
        each.append(scores(asked, [(held[i]["ecg_path"], held[i]["report"]) for i in drawn], classes))
    return {key: float(np.mean([one[key] for one in each])) for key in each[0]}


def scores(
    asked: Sequence[dict[str, Any]], given: Sequence[tuple[str, str]], classes: dict[str, frozenset[str]]
) -> dict[str, Any]:
    pairs = list(zip(asked, given, strict=True))
    return {
        "n": len(pairs),
        "superclass": float(
            np.mean([bool(p) and classes[number(row["ecg_path"])] == classes.get(number(p)) for row, (p, _) in pairs])
        ),
        "report": float(np.mean([row["report"] == text for row, (_, text) in pairs])),
        "f1": float(np.mean([token_f1(text, row["report"]) for row, (_, text) in pairs])),
        "own": float(np.mean([bool(p) and number(row["ecg_path"]) == number(p) for row, (p, _) in pairs])),
        "commonest": max(Counter(path for path, _ in given).values()) / len(given),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
