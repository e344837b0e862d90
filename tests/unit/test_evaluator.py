"""The controls and the blind baselines that stand beside a score."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from elm_jax.data.sources import Record
from elm_jax.evaluation.evaluator import shuffled_recordings, summary
from elm_jax.evaluation.metrics import aggregate, is_right


def dataset_of(records: list[Record]) -> Any:
    return SimpleNamespace(records=records, key=lambda i, place=0: (1000 + i, place))


def record(i: int, *paths: str, name: str = "kind", patient: str | None = None) -> Record:
    return Record(paths, None, name, patient or f"p{i}", f"set:{i}", 0)


def test_shuffling_gives_every_question_the_recording_of_another_patient() -> None:
    # Three questions a recording; patients have one recording or two.
    records = [record(i, f"{i // 3}.npy", patient=f"p{min(i // 3, 4)}") for i in range(18)]
    records += [record(i, f"{i}.npy", name="other") for i in range(18, 26)]
    records += [record(i, f"{i}a.npy", f"{i}b.npy") for i in range(26, 30)]
    owner = {r.ecg_paths: (r.patient, r.name) for r in records}
    given = shuffled_recordings(dataset_of(records))
    assert sorted(given) == list(range(len(records)))
    for i, recordings in given.items():
        paths = tuple(path for path, _ in recordings)
        patient, name = owner[paths]
        assert patient != records[i].patient and name == records[i].name
        assert len(paths) == len(records[i].ecg_paths)
    # Questions about one recording get one other recording, and each is given as often as it was asked about.
    assert len({given[i][0] for i in (0, 1, 2)}) == 1
    assert set(Counter(given[i][0][0] for i in range(18)).values()) == {3}
    assert [place for _, (_, place) in given[26]] == [0, 1]


def test_shuffling_keeps_how_frequent_noise_and_flat_lines_are() -> None:
    kinds = ["noise", "flatline", "x"] * 200
    records = [record(i, kind if kind != "x" else f"{i}.npy") for i, kind in enumerate(kinds)]
    given = shuffled_recordings(dataset_of(records))
    after = Counter(given[i][0][0] if given[i][0][0] in kinds else "x" for i in given)
    assert after == Counter(kinds)
    kept = np.mean([given[i][0][0] == kinds[i] for i in given if kinds[i] != "x"])
    assert 0.2 < kept < 0.47  # as often as chance has it: a third


def test_one_recording_alone_stays_as_it_is() -> None:
    assert shuffled_recordings(dataset_of([record(0, "a.npy")])) == {0: [("a.npy", (1000, 0))]}


def test_a_summary_has_a_column_for_each_control_and_baseline() -> None:
    predictions = [
        {"id": str(i), "name": "heart_rate", "patient": str(i), "answer": "60", "truth": str(60 + 10 * (i % 2))}
        for i in range(20)
    ]
    results = aggregate(predictions)
    results["controls"] = {"zeros": {"exact_match": {"value": 0.25, "ci95": [0, 1]}}}
    lines = summary(results).splitlines()
    assert lines[0].split() == ["score", "zeros", "constant", "majority"]
    exact = next(line for line in lines if line.startswith("exact_match")).split()
    assert exact == ["exact_match", "0.500", "0.250", "0.500", "0.500"]


def test_what_counts_as_right_depends_on_the_question() -> None:
    assert is_right("heart_rate", "about 62 bpm", "60") and not is_right("heart_rate", "70", "60")
    assert is_right("signal_type", "ECG", "ecg") and not is_right("other", "60", "62")
    assert is_right("other", "<think>so</think> yes", "Yes.")
