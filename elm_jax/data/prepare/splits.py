"""Which patient is in which split, and whether a table keeps to it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val", "test")
HELD_OUT = 0.1  # of the patients, in val and in test, where a dataset has no splits of its own
_LEGACY_SEED, _LEGACY_FOLDS, _LEGACY_PART = 42, 5, 0.7


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a row is: its patients, and where the dataset itself puts it."""

    patients: tuple[str, ...]
    split: str | None = None
    fold: int | None = None


def split_of(patient: str, seed: int, val: float, test: float) -> str:
    """The split of a patient: a hash of (seed, patient) alone decides, so it is the same in every dataset."""
    place = _place(patient, seed)
    return "test" if place < test else "val" if place < test + val else "train"


def fold_of(patient: str, seed: int, folds: int) -> int:
    """The one of `folds` disjoint folds, 1 to `folds`, that tests a patient: by the same hash."""
    return int(_place(patient, seed) * folds) + 1


def _place(patient: str, seed: int) -> float:
    """In [0, 1)."""
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    return min(int.from_bytes(digest[:8], "big") / 2**64, 1 - 2**-53)


def one_person(rows: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Patients who share a row, and so must share a split -> the first of them by name; others are not in it."""
    first: dict[str, str] = {}

    def of(patient: str) -> str:
        while patient in first and first[patient] != patient:
            patient = first[patient]
        return patient

    for patients in rows:
        if len(patients) > 1:
            heads = sorted({of(patient) for patient in patients})
            first |= dict.fromkeys(heads, heads[0])
            first |= {patient: heads[0] for patient in patients}
    return {patient: of(patient) for patient in first}


def splits_of(owners: Sequence[Owner], rule: str, folds: int = 0, seed: int = 0) -> list[tuple[str, ...]]:
    """The splits of each row: one, or one for each fold ("fold1_train", …).

    rule "official": the dataset's own, else the first that another row of the patient has, else by patient; "patient":
    by patient; with `folds` the folds are the dataset's own where it has them and there are as many, for "official",
    else by patient; "legacy": `legacy_split`, five times. Whoever shares a row with another is that other person, too.
    """
    persons = one_person(owner.patients for owner in owners)
    people = [persons.get(owner.patients[0], owner.patients[0]) for owner in owners]
    if rule == "legacy":
        tests = [set(legacy_split(people, fold)[1]) for fold in range(_LEGACY_FOLDS)]
        return [tuple(_named(k, row in test) for k, test in enumerate(tests, 1)) for row in range(len(owners))]
    if not folds:
        own = [owner.split if rule == "official" else None for owner in owners]
        pairs = list(zip(own, people, strict=True))
        others = {person: split for split, person in reversed(pairs) if split}
        return [(split or others.get(who) or split_of(who, seed, HELD_OUT, HELD_OUT),) for split, who in pairs]
    own_folds = {owner.fold for owner in owners}
    official = rule == "official" and own_folds == set(range(1, folds + 1))
    tested = [
        owner.fold if official else fold_of(person, seed, folds) for owner, person in zip(owners, people, strict=True)
    ]
    return [tuple(_named(fold, fold == test) for fold in range(1, folds + 1)) for test in tested]


def _named(fold: int, tests: bool) -> str:
    return f"fold{fold}_{'test' if tests else 'train'}"


def legacy_split(keys: Sequence[str | None], fold: int) -> tuple[list[int], list[int]]:
    """The reference's split number `fold`, 0 to 4: the rows that train and those that test, in its order.

    A group is what has the same key, None a group of its own. The groups, those with a key first, are shuffled, sorted
    from the largest to the smallest, and put into train where they fit below 0.7 of the rows, else into test. Five of
    these overlap in their test rows, some rows are never tested, and whoever has many recordings nearly always trains.
    """
    grouped: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            grouped.setdefault(key, []).append(row)
    groups = [*grouped.values(), *([row] for row, key in enumerate(keys) if key is None)]
    np.random.default_rng(_LEGACY_SEED + fold).shuffle(groups)  # type: ignore[arg-type]
    groups.sort(key=len, reverse=True)
    train: list[int] = []
    test: list[int] = []
    most = round(_LEGACY_PART * len(keys))
    for group in groups:
        (train if len(train) + len(group) <= most else test).extend(group)
    return train, test


def leaks(rows: Iterable[tuple[str, Iterable[str]]]) -> dict[str, tuple[str, ...]]:
    """Patients found in more than one split of a fold, with those splits; {} if none. rows: (split, patients)."""
    seen: dict[tuple[str, str], set[str]] = {}
    for split, patients in rows:
        fold = split.partition("_")[0] if split.startswith("fold") else ""
        for patient in patients:
            seen.setdefault((patient, fold), set()).add(split)
    return {patient: tuple(sorted(splits)) for (patient, _), splits in seen.items() if len(splits) > 1}
