"""Recordings for the ECG-Byte tokenizer: found in files, folders and lists, read in threads, one segment of each.

What cannot be read is left out and counted; too many such recordings are an error.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from elm_jax.ecg import shards
from elm_jax.ecg.recording import LEADS, read_ecg, to_segment
from elm_jax.errors import UserError, refused
from elm_jax.folders import read_regular
from elm_jax.schema import check, key, walk
from elm_jax.symbols.coder import cores

ENDINGS = (".npy", ".hea")
_AHEAD = 8  # recordings begun, for each thread
Result = TypeVar("Result")


@dataclass(frozen=True)
class Form:
    """What is taken of a recording: its first `segment_len` samples at `sampling_rate` Hz, of `leads`, in their order.

    Raises UserError, which names the flag, for a form that no recording can have.
    """

    sampling_rate: float = key(250.0, "samples per second after resampling", limit="above 0 and at most 100000")
    segment_len: int = key(2500, "samples of an ECG after resampling", limit="from 1 to 10000000")
    leads: tuple[str, ...] = key(LEADS, "leads by name", choices=LEADS)

    def __post_init__(self) -> None:
        for name, k in walk(Form):
            check(f"--{name.replace('_', '-')}", k, getattr(self, name))
        if not self.leads:
            raise UserError("--leads", "no leads", "at least one", "name some, or leave it out for all 12")

    @property
    def symbols(self) -> int:
        """Samples of a recording, all leads together: as many symbols does it have."""
        return len(self.leads) * self.segment_len

    def describe(self) -> dict[str, Any]:
        """The form as a tokenizer's file states it."""
        return asdict(self) | {"leads": list(self.leads)}

    @classmethod
    def of(cls, settings: dict[str, Any], file: Path) -> "Form":
        """The form that the settings of a tokenizer's `file` state; the default for what they do not.

        Raises UserError, which names the file and the setting, for what no recording can have.
        """
        told = {name: k for name, k in walk(cls) if name in settings}
        if settings.get("leads") == []:
            raise UserError(f"{file}: settings.leads", "no leads", "at least one", "make the tokenizer again")
        return cls(**{name: check(f"{file}: settings.{name}", k, settings[name]) for name, k in told.items()})

    def read(self, path: Path) -> np.ndarray:
        """The segment (C, L) float32 of a recording. Raises UserError for one that has no such segment."""
        signal = to_segment(read_ecg(path), self.sampling_rate, self.segment_len)
        if self.leads == LEADS:
            return signal
        return signal[[LEADS.index(lead) for lead in self.leads]]


def find_recordings(places: Sequence[Path]) -> list[Path]:
    """The recordings in files (.npy, WFDB), folders (to the bottom, shards too) and lists (.txt, a path a line).

    A list names files and folders, relative to itself. The order is that of `places`, and within a folder that of the
    paths in it, on every machine; what is named twice counts once. Links are followed; a folder that can be reached in
    several ways, as through a link to a folder above it, is searched once.
    Raises UserError for a place that is none of these, and where no recording is found.
    """
    named = [name for place in places for name in (_lines(place) if place.suffix == ".txt" else [place])]
    found = dict.fromkeys(path for place in named for path in _in_place(place))
    if not found:
        where = ", ".join(map(str, places))
        raise UserError(where, "no recording", "files that end with .npy or .hea", "give a folder that has some")
    return list(found)


def _in_place(place: Path) -> Iterable[Path]:
    if place.is_dir():
        return _in_folder(place)
    if place.is_file() or place.with_name(f"{place.name}.hea").is_file() or shards.find(str(place)):
        return [place]
    expected = "a .npy file, a WFDB record, a folder of them or a .txt list"
    raise UserError(str(place), "no such file or folder", expected, "check the path")


def _in_folder(folder: Path) -> list[Path]:
    parts, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Sorted: of the ways into a folder the same one is taken on every machine.
        folders[:] = [name for name in sorted(folders) if _is_new(os.path.join(parent, name), seen)]
        inside = Path(parent).relative_to(folder).parts
        packed = shards.names_in(Path(parent)) if shards.INDEX in names else []
        parts += [(*inside, name) for name in (*names, *packed) if name.endswith(ENDINGS) and not name.startswith(".")]
    return [folder.joinpath(*names) for names in sorted(parts)]


def _is_new(folder: str, seen: set[str]) -> bool:
    """Whether a folder is not among those `seen`, by whatever name, to which it is added."""
    real = os.path.realpath(folder)
    new = real not in seen
    seen.add(real)
    return new


def _lines(path: Path) -> list[Path]:
    data = read_regular(path, "a list of recordings", "check the file")
    with refused(path, "an unreadable list", "a path a line", "check the file"):
        lines = data.decode("utf-8-sig").splitlines()
    return [path.parent / line.strip() for line in lines if line.strip()]


@dataclass
class Reader:
    """Reads recordings in `form` with threads. The part `share` (below 1) of each pass over some may be unreadable."""

    form: Form
    share: float = 0.0
    threads: int = field(default_factory=cores)
    unreadable: dict[Path, str] = field(default_factory=dict)  # and why

    def each(
        self,
        paths: Sequence[Path],
        work: Callable[[np.ndarray], Result],
        title: str,
        spare: Iterable[Path] = (),
    ) -> Iterator[tuple[Path, Result]]:
        """(path, work(signal)) of each recording in order, done a little ahead, with a bar of progress.

        signal is (C, L) float32. A recording that cannot be read, or for which `work` raises UserError, is left out,
        and the next of `spare`, as long as there are some, is read after the others in its place. Raises UserError when
        more are left out than the part `share` of `paths`, so at least one result comes of at least one path.
        """
        # Without a terminal there is no bar: a log would be full of it.
        bar = tqdm(total=len(paths), desc=title, unit="recording", disable=None)
        pool = ThreadPoolExecutor(self.threads)
        rest, others, begun = deque(paths), iter(spare), deque[tuple[Path, Future[Result]]]()
        left_out = 0
        try:
            while rest or begun:
                while rest and len(begun) < self.threads * _AHEAD:
                    path = rest.popleft()
                    begun.append((path, pool.submit(lambda p: work(self.form.read(p)), path)))
                path, done = begun.popleft()
                try:
                    result = done.result()
                except UserError as error:
                    left_out += 1
                    self._leave_out(path, error, left_out, len(paths))
                    instead = list(islice(others, 1))
                    rest += instead
                    bar.total += len(instead)
                else:
                    yield path, result
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()

    def log(self, path: Path) -> None:
        """Write the unreadable recordings and why they are so into a text file; no file where there are none."""
        if self.unreadable:
            lines = "".join(f"{name}\t{why}\n" for name, why in self.unreadable.items())
            path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # names can be any bytes

    def _leave_out(self, path: Path, error: UserError, count: int, total: int) -> None:
        self.unreadable[path] = str(error)
        if count > self.share * total:
            raise UserError(
                str(path), f"{error.found} ({count} of {total} recordings unreadable)",
                f"{error.expected}, at most {self.share:g} of the recordings unreadable (--max-bad-records)",
                "mend it or leave it out, or raise --max-bad-records",
            )  # fmt: skip
