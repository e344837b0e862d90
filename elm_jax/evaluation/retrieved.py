"""What was retrieved for the ECGs of an evaluation, and how much of the scores it brings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from elm_jax.data.dataset import Dataset
from elm_jax.errors import UserError
from elm_jax.evaluation.controls import RETRIEVED
from elm_jax.retrieval.index import hash_of, study_of
from elm_jax.retrieval.lookup import Retriever

SHOWN, LONGEST = 20, 300  # ECGs of the table, and characters of a report


def retrieved_for(datasets: Iterable[tuple[Dataset, Iterable[int]]]) -> dict[str, Any]:
    """What was found for the ECGs of these records of each dataset: how often an ECG's own study or its patient, how
    often the same entry, how far away; and a table of the first.

    own_study and same_patient count ECGs. commonest: the share of ECGs that were given the entry which most were given.
    """
    ecgs, counts, distances, given = 0, Counter[str](), list[float](), Counter[int]()
    shown, seen = list[dict[str, Any]](), set[int]()
    k = 0
    for dataset, records in datasets:
        retriever = dataset.signal.retrieval
        assert isinstance(retriever, Retriever)
        k = retriever.k
        for record, sought in dataset.sought(records):
            if sought.name in seen:
                continue
            seen.add(sought.name)
            try:
                found = retriever.entries(sought)
            except UserError:  # a record that was left out
                continue
            ecgs += 1
            own = [entry.study == study_of(sought.path) for entry, _ in found]
            known = retriever.owners(sought) - {hash_of("patient", sought.path)}
            patient = [any(hash_of("patient", one) in known for one in entry.patients) for entry, _ in found]
            counts["own_study"] += any(own)
            counts["same_patient"] += any(patient)
            counts["fewer_than_k"] += len(found) < k
            given.update(entry.row for entry, _ in found)
            distances += [distance for _, distance in found[:1]]
            if len(shown) < SHOWN:
                pairs = zip(own, patient, strict=True)
                whose = ["own study" if a else "same patient" if b else "another" for a, b in pairs]
                shown += [
                    {"record": record.id, "ecg": sought.path, "retrieved": entry.path, "whose": who,
                     "distance": float(distance), "report": entry.report[:LONGEST]}
                    for (entry, distance), who in zip(found, whose, strict=True)
                ]  # fmt: skip
    names = "own_study", "same_patient", "fewer_than_k"
    return {
        "ecgs": ecgs, "k": k, **{name: counts[name] for name in names},
        "entries": len(given), "commonest": max(given.values(), default=0) / max(ecgs, 1),
        "median_distance": float(np.median(distances)) if distances else None, "shown": shown,
    }  # fmt: skip


def brought(metrics: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Metric -> control -> what the score has more than under each control of what is retrieved."""
    return {
        metric: {
            name: score["value"] - controls[name][metric]["value"]
            for name in RETRIEVED
            if metric in controls.get(name, {})
        }
        for metric, score in metrics.items()
    }


def retrieval_notes(found: Mapping[str, Any]) -> list[str]:
    """What one should know of what was retrieved before one reads a score."""
    own, patient, ecgs = found["own_study"], found["same_patient"], found["ecgs"]
    told = []
    if own or patient:
        told.append(
            f"retrieval: of {ecgs} ECGs {own} were given a report of their own study and {patient} one of their own "
            "patient: the score is that of who looks the answer up"
        )
    if found["commonest"] > 0.5 and ecgs > 1:
        told.append(f"retrieval: {found['commonest']:.0%} of the ECGs were given one and the same recording")
    return told
