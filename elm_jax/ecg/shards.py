"""Many recordings in few files, each of which is still called by a name of its own, `<folder>/<name>.npy`.

A shard `part-00000.array_record` is an ArrayRecord file, which Grain reads at random, of uncompressed groups of one
record. A record is

    magic (4 bytes), length of the header (u32), checksum (u64, xxh3 of the planes, seeded by that of the header),
    header: JSON, what the reference's dictionary says, with each lead's `gain` (steps a mV) and `baseline`,
    planes: C·L whole numbers n as n + 128, so that the high bytes are nearly all 0: first all of these, then the low
    ones, as a block of LZ4. The signal is (n - baseline) / gain mV.

`shards.index` beside them tells by the hash of a name where its record lies: sorted, mapped into memory. Records are
read from there without the library, which believes what a file claims of its sizes: an ArrayRecord file is a sequence
of blocks of 64 KiB that begin with 24 bytes of its own, and a record lies in the rest in one piece. Offsets leave those
24 bytes out.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from elm_jax.ecg.npy import MAX_BYTES, read_bytes
from elm_jax.ecg.stored import GROWTH, UNPACKED
from elm_jax.errors import UserError, refused
from elm_jax.folders import read_json, write_atomic
from elm_jax.json_text import parse_json

INDEX = "shards.index"
BLOCK, OWN = 1 << 16, 24  # bytes of a block of the file, and those at its beginning that are the format's own
_MAGIC, _INDEX_MAGIC = b"ECG1", b"ELM_JAX shards 1"
_START, _INDEX_START = struct.Struct("<4sIQ"), struct.Struct("<16sQ")
_COLUMNS = (("hash", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("number", "<u4"))
_ROW = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)
_BIAS = np.uint16(128)
_STEPS = 65_534  # from the least to the largest number of a lead, which a 16-bit number holds on both sides of 0
_WHOLE = 1 << 22  # below it whole numbers, and what lies between them and 0, are whole in float32 too
_LZ4 = 255  # bytes that a byte of LZ4 becomes at most
_GAINS, _MOST = (1e-30, 1e12), 1e30
_FIX = "prepare it again"


def shard_name(number: int) -> str:
    return f"part-{number:05d}.array_record"


def pack(signal: np.ndarray, gains: Sequence[float] | None, said: Mapping[str, Any]) -> tuple[bytes, float]:
    """A signal (C, L) in mV as a record, and how far what is read differs from it at most, in mV.

    With the `gains` (C,) of its source (converter steps a mV) no number differs by more than half of such a step, and
    what lies on the steps comes back as it is. A lead whose gain is not known, or which has more steps than 16 bits, is
    scaled by its own range. `said` is what its dictionary has besides `ecg`.
    """
    signal = np.asarray(signal, np.float64)
    low, high, most = signal.min(1), signal.max(1), np.abs(signal).max(1)
    if not (most < _MOST).all():
        raise UserError("recording", f"values up to {most.max():g} mV", "an ECG", "correct its unit, or leave it out")
    known = np.full(len(signal), np.nan) if gains is None else np.asarray(gains, np.float64)
    fits = ((high - low) * known < _STEPS - 2) & (most * known < _WHOLE) & (known > _GAINS[0]) & (known < _GAINS[1])
    with np.errstate(divide="ignore"):
        ranged = np.minimum((_STEPS - 2) / (high - low), _WHOLE / 2 / most)
    ranged = np.where(np.isfinite(ranged), ranged, 1.0).clip(*_GAINS).astype(np.float32)
    gain = np.where(fits, known, ranged.astype(np.float64))
    whole = np.rint(signal * gain[:, None])
    half = _STEPS // 2
    centre = np.zeros(len(signal)).clip(whole.max(1) - half, whole.min(1) + half)
    steps = (whole - centre[:, None]).astype(np.int16)
    pairs = (steps.view(np.uint16) + _BIAS).astype("<u2").view(np.uint8).reshape(-1, 2)
    planes = np.ascontiguousarray(pairs.T[::-1]).tobytes()
    header = {**said, "segment_len": signal.shape[1], "gain": gain.tolist(), "baseline": (-centre).astype(int).tolist()}
    with refused("recording", "", "a name and a report in Unicode", "correct them"):
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    packed = codec().compress(planes, asbytes=True)
    if len(planes) > _most(len(packed)):
        found, fix = f"{len(planes)} bytes that become {len(packed)}", "leave it out, or choose a shorter --segment-len"
        raise UserError("recording", found, "an ECG, which is not flat", fix)
    error = np.abs(_millivolts(steps, gain, -centre, np.float64) - signal).max()
    return sealed(text, planes, packed), float(error)


def _most(packed: int) -> int:
    """Bytes that so many packed ones may become."""
    return min(MAX_BYTES, _LZ4 * packed, max(UNPACKED, GROWTH * packed))


def sealed(header: bytes, planes: Any, packed: bytes) -> bytes:
    """A record of these parts."""
    return _START.pack(_MAGIC, len(header), _checksum(header, planes)) + header + packed


def unpack(where: str, data: bytes, dtype: type[np.floating[Any]] = np.float64) -> dict[str, Any]:
    """The dictionary that the reference's `.npy` holds, `ecg` (C, L) in mV. Raises UserError, naming `where`.

    In float32 the numbers are those of float64, rounded: both divide the same whole numbers by the same gain.
    """
    try:
        text, packed, checksum = parted(data)
        said = parse_json(text)
        leads, gain, baseline = _checked(said)
        count = len(leads) * said["segment_len"]
        if not 0 < 2 * count <= _most(len(packed)):
            raise ValueError(f"{len(leads)} leads of {said['segment_len']} samples in {len(packed)} bytes")
        planes = codec().decompress(packed, 2 * count)
        if _checksum(text, planes) != checksum:
            raise ValueError("other content than was written")
    except (ValueError, OSError) as error:  # OSError: of LZ4
        raise UserError(where, f"a damaged record ({error})", "a recording as it was prepared", _FIX) from None
    high, low = np.frombuffer(planes, np.uint8).reshape(2, len(leads), -1)
    steps = np.left_shift(high, 8, dtype=np.uint16)
    steps |= low
    steps -= _BIAS
    del said["gain"], said["baseline"]
    return {**said, "ecg": _millivolts(steps.view(np.int16), gain, baseline, dtype)}


def parted(data: bytes) -> tuple[bytes, bytes, int]:
    """Header, packed planes and checksum of a record. Raises ValueError for what is none."""
    magic, length, checksum = _START.unpack_from(data) if len(data) >= _START.size else (b"", 0, 0)
    if magic != _MAGIC or len(data) < _START.size + length:
        raise ValueError("no record of a shard")
    return data[_START.size : _START.size + length], data[_START.size + length :], checksum


def _checked(said: Any) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
    """The names of the leads, their gains and baselines. Raises ValueError where a header has none that can be."""
    kinds = {"npy_path": str, "leads": list, "segment_len": int, "gain": list, "baseline": list}
    for key, kind in kinds.items():
        if not isinstance(said, dict) or type(said.get(key)) is not kind:
            raise ValueError(f"no {key}")
    leads, gain, baseline = said["leads"], said["gain"], said["baseline"]
    if not len(leads) == len(gain) == len(baseline) > 0:
        raise ValueError(f"{len(leads)} leads, {len(gain)} gains and {len(baseline)} baselines")
    sound = {*map(type, gain)} == {float} and _GAINS[0] <= min(gain) <= max(gain) <= _GAINS[1]
    if not sound or {*map(type, baseline)} != {int} or max(map(abs, baseline)) > 2 * _WHOLE:
        raise ValueError("a gain or baseline that none has")
    return leads, np.array(gain), np.array(baseline, np.float64)


def _millivolts(
    steps: np.ndarray, gain: np.ndarray, baseline: np.ndarray, dtype: type[np.floating[Any]]
) -> np.ndarray:
    """(C, L) of `dtype`. A quotient of two numbers that float32 holds is the same by way of float64, or without."""
    narrow = dtype == np.float32 and bool((gain.astype(np.float32) == gain).all())
    found = steps.astype(np.float32 if narrow else np.float64)
    if baseline.any():
        found -= baseline[:, None].astype(found.dtype)
    found /= gain[:, None].astype(found.dtype)
    return found.astype(dtype, copy=False)


def _checksum(header: bytes, planes: Any) -> int:
    return xxhash.xxh3_64_intdigest(planes, xxhash.xxh3_64_intdigest(header))


@lru_cache(1)
def codec() -> Any:
    """LZ4 without a frame. What it is asked to unpack to more than there is ends in what the memory held before."""
    import pyarrow  # slow to import, and not needed for other files

    return pyarrow.Codec("lz4_raw")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the record called `name` lies: `offset` and `size` in bytes of a shard, without what is its blocks' own."""

    name: str
    shard: str
    number: int
    offset: int
    size: int

    def read(self, dtype: type[np.floating[Any]] = np.float64) -> dict[str, Any]:
        """What the reference's `.npy` of the name would hold. Raises UserError, which names shard and number."""
        where, (start, end) = f"{self.shard}, record {self.number}", span(self.offset, self.size)
        if self.size < _START.size:
            raise UserError(where, f"{self.size} bytes", "a record", _FIX)
        data = read_bytes(self.shard, "a shard", start, end - start)
        first = BLOCK - start % BLOCK  # bytes up to the next block's own
        if first < len(data):
            parts = [data[:first], *(data[at + OWN : at + BLOCK] for at in range(first, len(data), BLOCK))]
            data = b"".join(parts)
        said = unpack(where, data, dtype)
        if os.path.basename(said["npy_path"]) != f"{self.name}.npy":
            found = f"the record of {said['npy_path']}"
            raise UserError(where, found, f"that of {self.name}, as {INDEX} has it", _FIX)
        return said


def span(offset: int, size: int) -> tuple[int, int]:
    """From where to where in the file lies what would be there without the blocks' own bytes."""
    last = offset + size - 1
    return offset + OWN * (offset // (BLOCK - OWN) + 1), last + OWN * (last // (BLOCK - OWN) + 1) + 1


def find(path: str) -> Place | None:
    """Where in a shard the recording lies that is called `path`, if that ends with .npy and is in its folder's index.

    Raises UserError for an index that is none.
    """
    if not path.endswith(".npy"):
        return None
    folder, name = os.path.split(path)
    index = os.path.join(folder, INDEX)
    try:
        stat = os.stat(index)
    except (OSError, ValueError):  # ValueError: of what no file can be called
        return None
    return _opened(index, stat.st_mtime_ns, stat.st_size).find(folder, name.removesuffix(".npy"))


def check_index(folder: str | Path, name: str = "") -> None:
    """Raise UserError where a folder has shards, and no index of them; or one that does not know the recording `name`,
    which is no file there either."""
    index = os.path.join(folder, INDEX)
    if os.path.exists(os.path.join(folder, name or INDEX)) or not os.path.exists(os.path.join(folder, shard_name(0))):
        return
    found = f"no such file, nor its name in {INDEX}" if os.path.exists(index) else f"shards without their {INDEX}"
    raise UserError(os.path.join(folder, name), found, "what prepare left", "run prepare again")


class _Index:
    """An index, mapped into memory; looked into, it is read where one looks. Raises UserError where it is none."""

    def __init__(self, path: str) -> None:
        magic, count = _INDEX_START.unpack(read_bytes(path, "an index of shards", 0, _INDEX_START.size))
        size = os.path.getsize(path)
        if magic != _INDEX_MAGIC or size != _INDEX_START.size + count * _ROW:
            raise UserError(path, f"{size} bytes that are no index", "what prepare left", _FIX)
        data = np.memmap(path, np.uint8, "r")
        self._columns: dict[str, np.ndarray] = {}
        at = _INDEX_START.size
        for name, kind in _COLUMNS:
            end = at + count * np.dtype(kind).itemsize
            self._columns[name] = np.asarray(data)[at:end].view(kind)
            at = end

    def find(self, folder: str, name: str) -> Place | None:
        key, hashes = np.uint64(_hash(name)), self._columns["hash"]
        row = int(hashes.searchsorted(key))
        if row == len(hashes) or hashes[row] != key:
            return None
        offset, size, shard, number = (int(self._columns[column][row]) for column, _ in _COLUMNS[1:])
        return Place(name, os.path.join(folder, shard_name(shard)), number, offset, size)


@lru_cache(64)
def _opened(path: str, mtime: int, size: int) -> _Index:
    """By what changes when the index is written anew."""
    return _Index(path)


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(errors="surrogateescape"))


def write_index(file: IO[bytes], rows: Iterable[tuple[str, int, int, int, int]]) -> None:
    """Name, offset, size, number of the shard and number in it, of each record. UserError for two of one hash."""
    columns = np.fromiter(((_hash(name), *row) for name, *row in rows), list(_COLUMNS))
    columns.sort(order="hash")
    if (columns["hash"][1:] == columns["hash"][:-1]).any():
        raise UserError(INDEX, "two recordings of one hash", "names that differ", "give one of them another name")
    file.write(_INDEX_START.pack(_INDEX_MAGIC, len(columns)))
    for name, _ in _COLUMNS:
        file.write(np.ascontiguousarray(columns[name]).tobytes())


@dataclass(frozen=True, slots=True)
class Listed:
    """A recording in a shard: the number there of its first segment, and offset and size of the record of each."""

    stem: str
    shard: int
    first: int
    error: float  # mV by which a number differs at most from what was prepared
    records: Sequence[tuple[int, int]]


def listed(folder: Path) -> Iterator[Listed]:
    """The recordings in the shards of a folder, as the list beside each (`part-00000.json`) has them.

    A shard that is missing, or not as long as its list says, counts as not there. Raises UserError for a list that is
    none.
    """
    for file in sorted(folder.glob("part-*.json")):
        fix = "remove it, and prepare again"
        facts, first = read_json(file, fix), 0
        with refused(file, "no list of recordings", "what prepare left", fix, ValueError, TypeError, KeyError):
            shard = int(file.stem.removeprefix("part-"))
            found = folder / shard_name(shard)
            if not found.is_file() or found.stat().st_size != facts["bytes"]:
                continue
            for stem, error, records in facts["recordings"]:
                yield Listed(str(stem), shard, first, float(error), [(int(at), int(size)) for at, size in records])
                first += len(records)


def names_in(folder: Path) -> list[str]:
    """What the recordings in the shards of a folder are called. Raises UserError as `listed`."""
    return [f"{one.stem}_{n}.npy" for one in listed(folder) for n in range(len(one.records))]


def write_shard(folder: Path, shard: int, recordings: Sequence[tuple[str, float, Sequence[bytes]]]) -> None:
    """A shard of recordings (stem, error in mV, a record for each segment), then the list beside it. UserError."""
    where, fix = folder / shard_name(shard), "--format npy writes a file for each segment"
    with refused(where, "no package array-record", "it, which comes with grain on Linux and macOS", fix, ImportError):
        from array_record.python.array_record_module import ArrayRecordWriter

    with tempfile.TemporaryDirectory() as folder_of_half:
        half = os.path.join(folder_of_half, where.name)
        writer = ArrayRecordWriter(half, "group_size:1,uncompressed")
        for _, _, records in recordings:
            for record in records:
                writer.write(record)
        writer.close()
        whole = Path(half).read_bytes()
    bare = b"".join(whole[at + OWN : at + BLOCK] for at in range(0, len(whole), BLOCK))
    at, rows = 0, []
    for stem, error, records in recordings:
        places = []
        for record in records:
            at = bare.find(record, at)
            if at < 0:
                raise UserError(where, "a file of another layout", "array-record as of version 0.8", fix)
            places.append((at, len(record)))
            at += len(record)
        rows.append((stem, error, places))
    text = json.dumps({"bytes": len(whole), "recordings": rows}, separators=(",", ":"))
    write_atomic(where, lambda file: file.write(whole), lasting=True)
    write_atomic(folder / f"part-{shard:05d}.json", lambda file: file.write(text.encode()), lasting=True)
