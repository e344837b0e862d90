"""Which patient is in which split, and whether a table keeps to it."""

import hashlib
from collections.abc import Iterable

SPLITS = ("train", "val", "test")


def split_of(patient: str, seed: int, val: float, test: float) -> str:
    """The split of a patient: a hash of (seed, patient) alone decides, so it is the same in every dataset."""
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"


def leaks(rows: Iterable[tuple[str, Iterable[str]]]) -> dict[str, tuple[str, ...]]:
    """Patients found in more than one split, with those splits; {} if none. rows: (split, patients)."""
    seen: dict[str, set[str]] = {}
    for split, patients in rows:
        for patient in patients:
            seen.setdefault(patient, set()).add(split)
    return {patient: tuple(sorted(splits)) for patient, splits in seen.items() if len(splits) > 1}
