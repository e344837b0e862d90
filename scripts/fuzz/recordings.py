"""Recordings and ECG-Byte tokenizers: valid files, and what reads them."""

import io
import json
import pickle
import random
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from elm_jax.ecg import shards
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.symbols import files as symbolic_files
from elm_jax.symbols.coder import EcgByte
from scripts.fuzz.changes import Files, flipped, in_json

SAMPLES = 40


def read_recording(path: Path) -> None:
    """Read a recording and hold what comes out against what is promised."""
    found = read_ecg(path)
    assert found.signal.shape[0] == 12 and np.isfinite(found.signal).all() and found.sampling_rate > 0


def read_tokenizer(path: Path) -> None:
    tokenizer = EcgByte.load(path)
    assert len(tokenizer) == 256 + len(tokenizer.merges)


def npy() -> list[Files]:
    signal = np.random.default_rng(0).normal(size=(12, SAMPLES))
    record = {"ecg": signal, "report": ["sinus rhythm"], "target_sf": 250, "leads": LEADS, "gain": np.float32(1)}
    objects = np.empty((), object)
    objects[()] = record | {"names": np.array(LEADS), "more": np.array([1, "a", None], object)}
    found = []
    for array in (signal, signal.astype("<f4"), np.asfortranarray(signal), (signal * 100).astype(">i2"), objects):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        found.append({"a.npy": file.getvalue()})
    header = found[-1]["a.npy"][: found[-1]["a.npy"].index(b"\n") + 1]
    return found + [{"a.npy": header + pickle.dumps(objects, protocol)} for protocol in (2, 3, 5)]


def shards_of_one() -> list[Files]:
    """Indices of shards in which one record lies behind what is the format's own."""
    signal = np.random.default_rng(2).normal(size=(12, SAMPLES))
    said = {"report": "sinus rhythm", "target_sf": 250, "npy_path": "b/a_0.npy", "leads": LEADS}
    records = [shards.pack(signal + more, gains, said)[0] for gains, more in (([200.0] * 12, 0), (None, 40))]
    return [_indexed(bytes(shards.OWN) + record) for record in records]


def _indexed(shard: bytes) -> Files:
    index = io.BytesIO()
    shards.write_index(index, [("a_0", 0, max(len(shard) - shards.OWN, 0), 0, 0)])
    return {shards.INDEX: index.getvalue(), shards.shard_name(0): shard}


def read_shard(index: Path) -> None:
    read_recording(index.with_name("a_0.npy"))


def in_record(rng: random.Random, data: bytes) -> bytes:
    """Another header of a record, with the length that fits it; of an index some bits."""
    start = shards.OWN
    if data[start : start + 4] != b"ECG1":
        return flipped(rng, data)
    end = start + 16 + int.from_bytes(data[start + 4 : start + 8], "little")
    header = in_json(rng, data[start + 16 : end])
    return data[: start + 4] + len(header).to_bytes(4, "little") + data[start + 8 : start + 16] + header + data[end:]


def indexed(rng: random.Random, files: Files) -> Files:
    """Mostly the index has the shard's size, and the record the checksum that fits what it holds."""
    shard = files.get(shards.shard_name(0), b"")
    if rng.random() < 0.3:
        return files
    with suppress(ValueError, OSError, KeyError, TypeError, RecursionError):
        header, packed, _ = shards.parted(shard[shards.OWN :])
        said = json.loads(header)
        count = 2 * len(said["leads"]) * said["segment_len"]
        if 0 < count < 1 << 20:
            shard = shard[: shards.OWN] + shards.sealed(header, shards.codec().decompress(packed, count), packed)
    return _indexed(shard)


def wfdb() -> list[Files]:
    values = np.random.default_rng(1).integers(-100, 100, (SAMPLES, 12))
    found = []
    for form in (16, 212, 80, 24, 32, 61, 160, 310, 311):
        lines = [f"a.dat {form} 1000/mV 12 0 {values[0, i]} 0 0 {lead}" for i, lead in enumerate(LEADS)]
        found.append({"a.hea": _header("a", 12, lines), "a.dat": _packed(values.ravel(), form)})
    lines = [f"a.dat 16x2+24 1000.5(-7)/uV 12 0 0 0 0 {lead}" for lead in LEADS]
    data = bytes(24) + np.repeat(values, 2).astype("<i2").tobytes()
    found.append({"a.hea": _header("a", 12, lines, "250/500(0) 40 10:00:00 01/02/2003"), "a.dat": data})
    parts = {}
    for name in ("p1", "p2"):
        lines = [f"{name}.dat 16 1000/mV 12 0 {values[0, i]} 0 0 {lead}" for i, lead in enumerate(LEADS)]
        parts |= {f"{name}.hea": _header(name, 12, lines), f"{name}.dat": _packed(values.ravel(), 16)}
    master = f"a/2 12 500 {2 * SAMPLES}\np1 {SAMPLES}\np2 {SAMPLES}\n".encode()
    found.append({"a.hea": master, **parts})
    layout = _header("lay", 12, [f"~ 0 1000/mV 12 0 0 0 0 {lead}" for lead in LEADS], "500 0")
    master = f"a/3 12 500 {2 * SAMPLES}\nlay 0\np1 {SAMPLES}\np2 {SAMPLES}\n".encode()
    found.append({"a.hea": master, "lay.hea": layout, **parts})
    return found


def _header(name: str, count: int, lines: list[str], rest: str = f"500 {SAMPLES}") -> bytes:
    return "\n".join([f"{name} {count} {rest}", *lines, "# a comment", ""]).encode()


def _packed(values: np.ndarray, form: int) -> bytes:
    if form in (16, 61, 160):
        return (values + (32768 if form == 160 else 0)).astype({16: "<i2", 61: ">i2", 160: "<u2"}[form]).tobytes()
    if form in (24, 32):
        whole = values.astype("<i4").view(np.uint8).reshape(-1, 4)
        return whole[:, : form // 8].tobytes()
    if form == 80:
        return (values + 128).astype(np.uint8).tobytes()
    if form == 212:
        a, b = (values[i::2] & 0xFFF for i in (0, 1))
        return np.stack([a & 0xFF, a >> 8 | b >> 4 & 0xF0, b & 0xFF], 1).astype(np.uint8).tobytes()
    return (values & 0x3FF).astype("<i4").tobytes()  # three of ten bits in four bytes: what they are does not matter


def tokenizers() -> list[Files]:
    tokenizer = EcgByte([b"aa", b"ab", b"aab", b"\xff\x00"], settings={"seed": 0})
    order = [256, *range(256), 257, 258, 259]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.json", "a.pkl"):
            tokenizer.save(Path(folder, name))
            found.append({name: Path(folder, name).read_bytes()})
    merges = [(list(merge), 256 + i) for i, merge in enumerate(tokenizer.merges)]
    contents = ({i: str(i) for i in order}, merges)
    return found + [{"a.pkl": pickle.dumps(contents, protocol)} for protocol in (2, 3, 4, 5)]


def pickles() -> list[Files]:
    """The pickles alone, without numpy's header."""
    found = [files["a.npy"] for files in npy()]
    alone = [data[data.index(b"\n") + 1 :] for data in found if b"'|O'" in data[:100]]
    return [{"a.pickle": data} for data in alone] + [files for files in tokenizers() if "a.pkl" in files]


def signed(rng: random.Random, files: Files) -> Files:
    """JSON of ours mostly gets the checksum that fits, where it is JSON still."""
    if "a.json" in files and rng.random() < 0.7:
        try:
            contents = json.loads(files["a.json"])
            contents.pop("sha256", None)
            whole = {**contents, "sha256": symbolic_files.checksum(contents)}
            return {**files, "a.json": json.dumps(whole).encode()}
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
    return files
