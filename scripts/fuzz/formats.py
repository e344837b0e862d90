"""Recordings of other formats than `.npy` and WFDB: valid files."""

import importlib.util
import io
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io

from elm_jax.ecg.names import LEADS
from scripts.fuzz import recordings, writers
from scripts.fuzz.changes import Files
from scripts.fuzz.writers import EIGHT, EVEN, STEPS

SHORT, SHORTER = STEPS[:, :40], EVEN[:, :40]


def mat() -> list[Files]:
    signal, found = SHORT / 1000, []
    named = {"ecg": signal, "fs": 500.0, "leads": np.array(LEADS, object), "report": "sinus rhythm"}
    cpsc = {"ECG": {"sex": "Male", "age": 61, "data": signal}}
    whole = {"val": SHORT.astype(np.int16), "unit": "uV", "Fs": np.uint16(500), "labels": list(LEADS)}
    for values, packed in ((named, False), (cpsc, False), (whole, False), (named, True)):
        file = io.BytesIO()
        scipy.io.savemat(file, values, do_compression=packed)
        found.append({"a.mat": file.getvalue()})
    file = io.BytesIO()
    scipy.io.savemat(file, {"signal": signal, "fs": 500, "unit": "mV"}, format="4")
    return [*found, {"a.mat": file.getvalue()}]


def records() -> list[Files]:
    """WFDB records, of a matrix of MATLAB 5 too."""
    lines = "".join(f"a.mat 16+24 1000(3)/mV 16 0 0 0 0 {lead}\n" for lead in LEADS)
    return [*recordings.wfdb(), {"a.hea": f"a 12 500 40\n{lines}".encode(), **mat()[2]}]


def edf() -> list[Files]:
    frames = [row.reshape(4, 10) for row in SHORT]
    labels = [f"ECG {lead}" for lead in LEADS]
    notes = np.zeros((4, 7), int)
    labels, noted = ["EDF Annotations", *labels], [notes, *frames]
    return [
        {"a.edf": _written(lambda path: writers.edf(path, LEADS, frames))},
        {"a.edf": _written(lambda path: writers.edf(path, labels, noted, kind=b"EDF+C"))},
        {"a.bdf": _written(lambda path: writers.edf(path, LEADS, frames, wide=True, records=-1))},
    ]


def tables() -> list[Files]:
    rows = np.concatenate([np.arange(40)[None] * 0.002, SHORT / 1000]).T
    text = "\n".join(",".join(f"{value:g}" for value in row) for row in rows)
    plain = "\n".join("\t".join(f"{value:g}" for value in row[1:]) for row in rows)
    semicolons = text.replace(",", ";").replace(".", ",")
    return [
        {"a.tsv": f"time (s),{','.join(LEADS)}\n{text}\n".encode()},
        {"a.tsv": f"\ufeff# fs: 500 Hz\r\n# unit: uV\r\n{chr(9).join(LEADS)}\r\n{plain}\r\n".encode()},
        {"a.tsv": f"t;{';'.join(f'ECG {lead} [mV]' for lead in LEADS)}\n{semicolons}\n".encode()},
        {"a.tsv": f"{text}\n".encode()},
    ]


def xml() -> list[Files]:
    packed = writers.xli(writers.residuals(SHORT))
    found = [writers.aecg(steps=SHORT), writers.aecg([f"MDC_ECG_LEAD_{lead}" for lead in EIGHT], SHORTER)]
    found += [writers.muse(steps=SHORTER), writers.muse(LEADS, SHORT)]
    plain = SHORT.astype("<i2").tobytes()
    philips = [writers.philips(packed, milliseconds=80), writers.philips(plain, "", milliseconds=80)]
    return [{"a.xml": text.encode()} for text in found] + [
        {"a.xml": text.replace("UTF-16", encoding).encode(encoding)}
        for text, encoding in zip(philips, ("UTF-16", "UTF-8"), strict=True)
    ]


def scp() -> list[Files]:
    values = sorted({value for row in SHORTER for value in writers.differences(row, 1).tolist()})
    table = {value: f"{place:010b}" for place, value in enumerate(values)}
    codes = b"".join(struct.pack("<BBBhI", 10, 10, 1, value, int(code[::-1], 2)) for value, code in table.items())
    own = struct.pack("<HH", 1, len(values)) + codes
    found = [writers.scp(steps=SHORTER, order=order) for order in (0, 1, 2)]
    found += [writers.scp(LEADS, SHORT, tables=None), writers.scp(steps=SHORTER, order=1, tables=own, table=table)]
    return [{"a.scp": data} for data in found]


def sealed(rng: random.Random, files: Files) -> Files:
    """SCP-ECG mostly says its own length and has no checksum."""
    data = files.get("a.scp", b"")
    if len(data) > 6 and rng.random() < 0.9:
        return {**files, "a.scp": b"\0\0" + struct.pack("<I", len(data)) + data[6:]}
    return files


def dicom() -> list[Files]:
    if importlib.util.find_spec("pydicom") is None:
        return []
    found = [lambda path: writers.dicom(path, steps=SHORT), lambda path: writers.dicom(path, EIGHT, SHORTER, "SCPECG")]
    return [{"a.dcm": _written(write)} for write in found]


def hdf5() -> list[Files]:
    if importlib.util.find_spec("h5py") is None:
        return []
    import h5py

    def write(path: Path, name: str, packed: str | None) -> None:
        with h5py.File(path, "w") as file:
            data = file.create_dataset(name, data=SHORT / 1000, compression=packed)
            data.attrs["fs"], data.attrs["leads"], file["unit"] = 500, list(LEADS), "mV"

    kinds = (("ecg", None), ("record/signal", None), ("tracings", "gzip"))
    return [{"a.h5": _written(lambda path, of=of: write(path, *of))} for of in kinds]


def _written(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "a"))
        return Path(folder, "a").read_bytes()
