"""What a dataset says of its recordings: the row that each one is."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from elm_jax.ecg.recording import Recording, read_ecg
from elm_jax.errors import refused
from elm_jax.folders import check_regular

_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True, slots=True)
class RawRecording:
    """What a dataset says of one recording.

    path: below the raw folder, as `read` takes it; row: which of the recordings in that file, where it holds several.
    patient: an id or several ("17+23"), "" where it is not told: somebody of whom there is no other recording.
    split: "train", "val" or "test"; None: by a hash of the patient. fold: the dataset's own, from 1 on.
    report: the cardiologist's or the machine's words, if any, or its statements one by one. wave: what the machine
    measured, as `wave_text` puts it. questions: (kind, question, answer) about it.
    name: of its segments; "": the path with _ for /.
    """

    path: str
    patient: str = ""
    split: str | None = None
    report: str | tuple[str, ...] = ""
    questions: Sequence[tuple[str, str, str]] = ()
    name: str = ""
    row: int | None = None
    fold: int | None = None
    wave: str = ""

    @property
    def words(self) -> str:
        """The report as a text."""
        return self.report if isinstance(self.report, str) else " ".join(self.report)

    @property
    def stem(self) -> str:
        """What its segments are called."""
        return self.name or self.path.replace("/", "_")

    @property
    def where(self) -> str:
        """What a report calls it."""
        return self.path if self.row is None else f"{self.path}, row {self.row}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What an index has that is no recording to be prepared: listed in the report under `kind`."""

    kind: str
    what: str
    why: str


def read_double(path: Path, rate: float | None = None, unit: str | None = None) -> Recording:
    """The recording of a file of any format, or WFDB record: (12, L) float64 in canonical order, mV.

    `rate` (Hz) and `unit` are those of files which state none, as for `read_ecg`.
    """
    return read_ecg(path, unstated_rate=rate, unit=unit, dtype=np.float64)


@dataclass(frozen=True)
class RawDataset:
    """A dataset as it is downloaded.

    title: its name in print. holds: what its folder has, for `--help` and errors. recordings: of a folder, what there
    is; raises UserError where its index cannot be read. read: a recording's file (and its row, where it has one), the
    leads in the canonical order, float64. named: as `recordings`, with the English names of the statements that the
    dataset has as codes for a report; None where it has none. given: what a user says of its files, by which others
    would be made of them: a folder's settings have it. takes_table: whether a user's table may say reports and patients
    of its recordings (`--table`).
    """

    title: str
    holds: str
    recordings: Callable[[Path], Iterable[RawRecording | LeftOut]]
    read: Callable[..., Recording] = read_double
    named: Callable[[Path], Iterable[RawRecording | LeftOut]] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    takes_table: bool = False


def records_below(raw: Path) -> Iterator[str]:
    """The WFDB records in a folder and those in it, without their suffix, in order; hidden ones left out."""
    for path in sorted(raw.rglob("*.hea")):
        below = path.relative_to(raw)
        if not any(part.startswith(".") for part in below.parts):
            yield below.with_suffix("").as_posix()


def _lines(header: Path) -> list[str]:
    check_regular(header, "a WFDB header")
    with refused(header, "an unreadable file", "a WFDB header", "download it again"), header.open("rb") as file:
        return [line.strip() for line in file.read(_LONGEST_HEADER).decode("utf-8", "replace").splitlines()]


def comments(header: Path) -> list[str]:
    """The lines of a WFDB header that begin with #, without it. Raises UserError."""
    return [line[1:].strip() for line in _lines(header) if line.startswith("#")]


def segments_of(header: Path) -> list[str]:
    """The names of the records that a WFDB record of several segments is made of; of another none. Raises UserError."""
    said = [line.split() for line in _lines(header) if line and not line.startswith("#")]
    return [name for name, *_ in said[1:] if name != "~"] if said and "/" in said[0][0] else []


def told(header: Path) -> dict[str, str]:
    """Of `comments` those that read `key: value`."""
    parted = (line.partition(":") for line in comments(header))
    return {key.strip(): value.strip() for key, colon, value in parted if colon}


def unlike_a_path(path: str) -> str | None:
    """What is wrong with a path that a table gives: it may not lead out of the folder."""
    parts = PurePosixPath(path)
    inside = path and not parts.is_absolute() and ".." not in parts.parts
    return None if inside else "not a path below the raw folder"
