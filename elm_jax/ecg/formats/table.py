"""Tables of numbers (CSV, TSV, text): a column a lead under its name, a row a sample, perhaps a column of the time."""

import io
import re
from pathlib import Path

import numpy as np

from elm_jax.ecg.formats.named_values import RATES, UNITS, folded
from elm_jax.ecg.stored import AGAIN, Channel, Stored, inflate, read_file
from elm_jax.errors import UserError

WHAT = "a table of numbers, a column for each lead, with their names above"
MOST = 256 << 20  # bytes of text
_LONGEST, _MOST_COLUMNS, _MOST_COMMENTS, _COMMENT = 20_000, 512, 1000, 150  # the first and the last: characters
_SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3, "us": 1e-6}
_TIMES = ("time", "t", "seconds", "sec", "ms", "milliseconds", "timestamp", "times")
_COUNTS = ("sample", "samples", "index", "n", "sampleindex", "samplenumber", "unnamed:0", "")
_NUMBER = re.compile(r"\s*[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d{1,3})?\s*|nan", re.IGNORECASE)
_SAID = re.compile(r"#\s*([\w .-]{1,40}?)\s*[:=]\s*([^\s].{0,80})")
LEAST_RATE = 20.0  # of a time without a unit: a slower one is in milliseconds, or counts


def read_table(path: Path) -> Stored:
    """The columns of a table. A name may hold the unit: `II (mV)`, `time [ms]`; lines `# fs: 500` and `# unit: uV`
    above it are read too. Raises UserError.
    """
    data = read_file(path, WHAT, MOST)
    if path.suffix.casefold() == ".gz":
        data = inflate(path, data, 31)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    said, head, body = _parts(path, text)
    mark = next((mark for mark in ("\t", ";", ",") if mark in head), None)  # None: blanks
    titles = [title.strip().strip("\"'").strip() for title in head.split(mark)]
    named = not all(_NUMBER.fullmatch(title) for title in titles)
    if not 2 <= len(titles) <= _MOST_COLUMNS:
        raise UserError(path, f"{len(titles)} columns in its first line", WHAT, "part them by commas or tabs")
    columns = _numbers(path, body if named else f"{head}\n{body}", mark, len(titles))
    names, units = zip(*map(_name_and_unit, titles if named else [""] * len(titles)), strict=True)
    rate, unit = _said(path, said)
    first = folded(names[0])
    if first in _TIMES or not named and _is_even(columns[0]):
        rate = rate or _rate_of(path, units[0] or (first if first in _SECONDS else ""), columns[0])
        names, units, columns = names[1:], units[1:], columns[1:]
    elif named and first in _COUNTS:
        names, units, columns = names[1:], units[1:], columns[1:]
    rows = zip(names, columns, units, strict=True)
    return Stored(path, [Channel(name, values, rate, own or unit or None) for name, values, own in rows])


def _parts(path: Path, text: str) -> tuple[list[tuple[str, str]], str, str]:
    """What comment lines above the table say, its first line, and the rest."""
    said = []
    for _ in range(_MOST_COMMENTS):
        line, _, text = text.partition("\n")
        if len(line) > _LONGEST:
            raise UserError(path, f"a line of {len(line)} characters", WHAT, AGAIN)
        if match := _SAID.fullmatch(line.strip()[:_COMMENT]):
            said.append((match[1], match[2]))
        elif line.strip() and not line.startswith("#"):
            return said, line.strip("\r"), text
    raise UserError(path, "no line with names", WHAT, AGAIN)


def _numbers(path: Path, text: str, mark: str | None, count: int) -> np.ndarray:
    """(columns, rows) float64."""
    if mark in (";", "\t") and "," in text[:_LONGEST]:
        text = text.replace(",", ".")
    try:
        if "\0" in text or not text.strip():
            raise ValueError("no line of numbers" if "\0" not in text else "a NUL")
        found = np.loadtxt(io.StringIO(text), delimiter=mark, comments=None, ndmin=2, quotechar='"')
    except ValueError as error:
        raise UserError(path, f"what is no table of numbers ({error})", WHAT, AGAIN) from None
    if found.shape[1] != count:
        raise UserError(path, f"{found.shape[1]} numbers under {count} names", "one under each", AGAIN)
    return found.T


def _name_and_unit(title: str) -> tuple[str, str]:
    """`II (mV)`, `II [mV]`. No pattern: in a title of ten thousand brackets it would look for minutes."""
    start = max(title.rfind("("), title.rfind("["))
    return (title[:start].strip(), title[start + 1 : -1].strip()) if start > 0 and title[-1] in ")]" else (title, "")


def _said(path: Path, said: list[tuple[str, str]]) -> tuple[float | None, str]:
    """Rate and unit that comments state."""
    rate = next((value for name in RATES for key, value in said if folded(key) == name), None)
    unit = next((value.strip() for key, value in said if folded(key) in UNITS), "")
    if rate is None:
        return None, unit
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*(?:hz)?", rate.strip().casefold())
    if match is None:
        raise UserError(path, f"the rate {rate!r}", "samples a second", "correct it")
    return float(match[1]), unit


def _is_even(values: np.ndarray) -> bool:
    """Whether it goes up by the same step always, but for a quarter of a step, as digits are cut."""
    if len(values) < 2 or not np.isfinite(values).all() or values[-1] <= values[0]:
        return False
    line = np.linspace(values[0], values[-1], len(values))
    return bool(np.abs(values - line).max() < 0.25 * (values[-1] - values[0]) / (len(values) - 1))


def _rate_of(path: Path, unit: str, times: np.ndarray) -> float | None:
    """Samples a second of a column of times; None where it may as well count samples."""
    if not _is_even(times):
        raise UserError(path, "times that are not evenly spaced", "a recording without gaps", "leave it out, or cut it")
    step = (times[-1] - times[0]) / (len(times) - 1)
    if unit and unit.casefold() not in _SECONDS:
        raise UserError(path, f"times in {unit!r}", "s, ms or us", "name the unit so")
    seconds = step * _SECONDS[unit.casefold()] if unit else step
    rate = float(f"{1 / seconds:.6g}")  # times are printed with few digits
    return rate if unit or rate >= LEAST_RATE else None
