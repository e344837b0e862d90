"""What a file stores, before leads are chosen of it: its channels, each in its own unit and at its own rate."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elm_jax.ecg.names import millivolts
from elm_jax.ecg.npy import MAX_BYTES
from elm_jax.errors import UserError, some
from elm_jax.folders import read_regular

UNPACKED, GROWTH = 16 << 20, 100  # what is packed may become so many bytes, or so many times larger
AGAIN = "download or export it again"


@dataclass(frozen=True)
class Channel:
    """values (L,), of which values · gain + offset is in `unit`; unit and rate (Hz): None where the file says none."""

    name: str
    values: np.ndarray
    rate: float | None
    unit: str | None
    gain: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Stored:
    """The channels of a file, and what it says in words."""

    path: Path
    channels: Sequence[Channel]
    report: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(channel.name for channel in self.channels)

    @property
    def says_units(self) -> bool:
        return all(channel.unit is not None for channel in self.channels)

    def gains(self, rows: Sequence[int], unit: str | None = None) -> tuple[float, ...] | None:
        """Converter steps a mV of the channels `rows`, which can be read; None where they are no whole numbers."""
        chosen = [self.channels[row] for row in rows]
        if any(channel.values.dtype.kind not in "iu" for channel in chosen):
            return None
        steps = (channel.gain * (millivolts(channel.unit or unit or "mV") or 1.0) for channel in chosen)
        return tuple(1 / abs(step) for step in steps)

    def read(self, rows: Sequence[int], unit: str | None = None) -> tuple[np.ndarray, float | None]:
        """The channels `rows`: (len(rows), L) float64 in mV, and their samples a second.

        `unit` is that of channels which say none; else it is mV. Raises UserError for a unit that is not of volts,
        for whole numbers of no unit, whose gain nobody knows, and for channels of several rates or lengths.
        """
        chosen = [self.channels[row] for row in rows]
        rates, lengths = {channel.rate for channel in chosen}, {len(channel.values) for channel in chosen}
        if len(rates) > 1 or len(lengths) > 1:
            found = [f"{len(c.values)} samples" + (f" at {c.rate:g} Hz" if c.rate else "") for c in chosen]
            raise UserError(self.path, f"leads of {some(dict.fromkeys(found))}", "all alike", "export them so")
        signal = np.empty((len(chosen), lengths.pop()))
        for row, channel in zip(signal, chosen, strict=True):
            own = channel.unit if channel.unit is not None else unit or "mV"
            scale = millivolts(own)
            if scale is None:
                found = f"unit {own!r} of signal {channel.name}"
                raise UserError(self.path, found, "V, mV, µV or nV", "export it in one of these")
            if not np.isfinite(channel.gain) or channel.gain == 0 or not np.isfinite(channel.offset):
                found = f"gain {channel.gain:g} and offset {channel.offset:g} of signal {channel.name}"
                raise UserError(self.path, found, "a gain that is not 0, and numbers", AGAIN)
            with np.errstate(over="ignore", invalid="ignore"):
                row[:] = (channel.values * channel.gain + channel.offset) * scale
        unsaid = unit is None and any(channel.unit is None for channel in chosen)
        if unsaid and signal.any() and np.array_equal(signal, np.rint(signal), equal_nan=True):
            fix = "add the unit, put the record's .hea beside it, or say it: --assume-unit uV of prepare, --unit uV of "
            fix += "measure, read_ecg(path, unit='uV')"
            raise UserError(self.path, "whole numbers without a unit", "a unit, or mV with fractions", fix)
        return signal, rates.pop()


def read_file(path: Path, what: str, most: int = MAX_BYTES) -> bytes:
    """What a file of at most `most` bytes holds. Raises UserError."""
    return read_regular(path, what, "check the path (and data.root)", most)


def check_size(path: Path, claimed: int, stored: int) -> None:
    """Raise UserError where `stored` packed bytes claim to become more than they may."""
    most = min(MAX_BYTES, max(UNPACKED, GROWTH * stored))
    if claimed > most:
        raise UserError(path, f"{stored} packed bytes that become {claimed}", f"at most {most}", AGAIN)


def inflate(path: Path, packed: bytes | memoryview, wbits: int = zlib.MAX_WBITS) -> bytes:
    """Unpacked bytes of one zlib stream (gzip: wbits 31). Raises UserError: damaged, cut, or far too large."""
    most = min(MAX_BYTES, max(UNPACKED, GROWTH * len(packed)))
    machine = zlib.decompressobj(wbits)
    try:
        data = machine.decompress(packed, most + 1)
    except zlib.error as error:
        raise UserError(path, f"packed bytes that are damaged ({error})", "what can be unpacked", AGAIN) from None
    if len(data) > most or not machine.eof:
        found = f"{len(packed)} packed bytes that become more than {most}" if len(data) > most else "packed bytes, cut"
        raise UserError(path, found, "all of them, and no more than a recording has", AGAIN)
    return data
