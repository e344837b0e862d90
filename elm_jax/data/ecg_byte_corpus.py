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

from elm_jax.data.ecg import LEADS, read_recording, to_segment
from elm_jax.data.symbolic import cores
from elm_jax.errors import UserError, nearest

ENDINGS = (".npy", ".hea")
_MOST_RATE, _MOST_LEN = 100_000, 10_000_000
_AHEAD = 8  # recordings begun, for each thread
Result = TypeVar("Result")


@dataclass(frozen=True)
class Form:
    """What is taken of a recording: its first `segment_len` samples at `sampling_rate` Hz, of `leads`, in their order.

    Raises UserError for a form that no recording can have.
    """

    sampling_rate: float = 250.0
    segment_len: int = 2500
    leads: tuple[str, ...] = LEADS

    def __post_init__(self) -> None:
        for name, most in (("sampling_rate", _MOST_RATE), ("segment_len", _MOST_LEN)):
            value = getattr(self, name)
            if not 0 < value <= most:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(flag, f"{value:g}", f"above 0 and at most {most}", "correct it")
        for lead in self.leads or ("",):
            if lead not in LEADS:
                raise UserError("--leads", repr(lead), ",".join(LEADS), nearest(lead, LEADS) or "correct it")
        if len(set(self.leads)) != len(self.leads):
            raise UserError("--leads", ",".join(self.leads), "each lead once", "name no lead twice")

    @property
    def symbols(self) -> int:
        """Samples of a recording, all leads together: as many symbols does it have."""
        return len(self.leads) * self.segment_len

    def describe(self) -> dict[str, Any]:
        """The form as a tokenizer's file states it."""
        return asdict(self) | {"leads": list(self.leads)}

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Form":
        """The form that a tokenizer's settings state; the default for what they do not."""
        known = {key: settings[key] for key in ("sampling_rate", "segment_len") if key in settings}
        return cls(**known, leads=tuple(settings.get("leads", LEADS)))

    def read(self, path: Path) -> np.ndarray:
        """The segment (C, L) float32 of a recording. Raises UserError for one that has no such segment."""
        signal = to_segment(read_recording(path), self.sampling_rate, self.segment_len)
        if self.leads == LEADS:
            return signal
        return signal[[LEADS.index(lead) for lead in self.leads]]


def find_recordings(places: Sequence[Path]) -> list[Path]:
    """The recordings in files (.npy, WFDB), folders (searched to the bottom) and lists (.txt, a path a line).

    A list names files and folders, relative to itself. The order is that of `places`, and within a folder that of the
    paths in it, on every machine; what is named twice counts once.
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
    if place.is_file() or place.with_name(f"{place.name}.hea").is_file():
        return [place]
    expected = "a .npy file, a WFDB record, a folder of them or a .txt list"
    raise UserError(str(place), "no such file or folder", expected, "check the path")


def _in_folder(folder: Path) -> list[Path]:
    parts = []
    for parent, _, names in os.walk(folder, followlinks=True):
        inside = Path(parent).relative_to(folder).parts
        parts += [(*inside, name) for name in names if name.endswith(ENDINGS) and not name.startswith(".")]
    return [folder.joinpath(*names) for names in sorted(parts)]


def _lines(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"an unreadable list ({error})", "a path a line", "check the file") from None
    return [path.parent / line.strip() for line in lines if line.strip()]


@dataclass
class Reader:
    """Reads recordings in `form` with threads. Of `total` in all the part `share` may be unreadable."""

    form: Form
    total: int
    share: float = 0.0
    threads: int = field(default_factory=cores)
    unreadable: dict[Path, str] = field(default_factory=dict)  # and why

    def each(
        self, paths: Sequence[Path], work: Callable[[np.ndarray], Result], title: str
    ) -> Iterator[tuple[Path, Result]]:
        """(path, work(signal)) of each recording in order, done a little ahead, with a bar of progress.

        signal is (C, L) float32. A recording that cannot be read, or for which `work` raises UserError, is left out.
        Raises UserError when too many are.
        """
        # Without a terminal there is no bar: a log would be full of it.
        bar = tqdm(total=len(paths), desc=title, unit="recording", disable=None)
        pool = ThreadPoolExecutor(self.threads)
        rest, begun = iter(paths), deque[tuple[Path, Future[Result]]]()
        try:
            while True:
                coming = islice(rest, self.threads * _AHEAD - len(begun))
                begun += [(path, pool.submit(lambda p: work(self.form.read(p)), path)) for path in coming]
                if not begun:
                    return
                path, done = begun.popleft()
                try:
                    result = done.result()
                except UserError as error:
                    self._leave_out(path, error)
                else:
                    yield path, result
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()

    def log(self, path: Path) -> None:
        """Write the unreadable recordings and why they are so into a text file; no file where there are none."""
        if self.unreadable:
            path.write_text("".join(f"{name}\t{why}\n" for name, why in self.unreadable.items()), encoding="utf-8")

    def _leave_out(self, path: Path, error: UserError) -> None:
        self.unreadable[path] = str(error)
        if len(self.unreadable) > self.share * self.total:
            raise UserError(
                str(path), f"{error.found} ({len(self.unreadable)} of {self.total} recordings unreadable)",
                f"{error.expected}, at most {self.share:g} of the recordings unreadable (--max-bad-records)",
                "mend it or leave it out, or raise --max-bad-records",
            )  # fmt: skip
