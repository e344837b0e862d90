"""Which questions are shown as examples: every kind in turn, spread over the split, with their ECGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elm_jax.data.dataset import Dataset
from elm_jax.errors import UserError
from elm_jax.pictures.ecg_paper import Example, gallery
from elm_jax.scoring.metrics import is_right

EXAMPLES = 6  # ECGs in the picture


def draw_examples(path: Path, dataset: Dataset, predictions: Sequence[Mapping[str, Any]]) -> None:
    """A picture of questions with their ECGs and answers; none where there is nothing to show."""
    examples = [example for _, example in chosen_examples(dataset, predictions, EXAMPLES)]
    path.unlink(missing_ok=True)
    if examples:
        gallery(examples, dataset.signal.sampling_rate, path)


def chosen_examples(
    dataset: Dataset, predictions: Sequence[Mapping[str, Any]], count: int
) -> list[tuple[Mapping[str, Any], Example]]:
    """At most `count` predictions about the dataset's records, each with its ECGs.

    The ECGs are drawn as recorded, whatever the model was shown; one that cannot be read is left out.
    """
    records = {record.id: i for i, record in enumerate(dataset.records)}
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for prediction in predictions:
        place = records.get(_record(prediction))
        if place is not None and dataset.records[place].ecg_paths:
            by_name.setdefault(str(prediction.get("name", "")), []).append(prediction)
    chosen: dict[str, Mapping[str, Any]] = {}
    for place in range(count if by_name else 0):  # the kinds take turns, each moving on through the split
        group = list(by_name.values())[place % len(by_name)]
        prediction = group[place * len(group) // count]
        chosen.setdefault(str(prediction["id"]), prediction)
    found = []
    for prediction in chosen.values():
        index = records[_record(prediction)]
        try:
            paths = dataset.records[index].ecg_paths
            ecgs = [dataset.signal.load_raw(path, dataset.key(index, i)) for i, path in enumerate(paths)]
        except UserError:  # with data.perturb nothing has read it before
            continue
        right = is_right(str(prediction.get("name", "")), prediction["answer"], prediction["truth"])
        texts = str(prediction.get("question", "")), str(prediction["answer"]), str(prediction["truth"])
        found.append((prediction, Example(ecgs, *texts, right)))
    return found


def _record(prediction: Mapping[str, Any]) -> str:
    return str(prediction["id"]).rpartition("#")[0]
