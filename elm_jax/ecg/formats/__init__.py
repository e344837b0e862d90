"""The formats of recordings besides `.npy` and WFDB: which reader reads which file."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from elm_jax.ecg.formats.dicom import read_dicom
from elm_jax.ecg.formats.edf import read_edf
from elm_jax.ecg.formats.hdf5 import read_hdf5
from elm_jax.ecg.formats.mat import read_mat
from elm_jax.ecg.formats.scp import read_scp
from elm_jax.ecg.formats.table import read_table
from elm_jax.ecg.formats.vendor_xml import read_xml
from elm_jax.ecg.stored import Stored

Reader = Callable[[Path], Stored]  # raises UserError for what it cannot read
READERS: dict[str, Reader] = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz"), read_table),
    **dict.fromkeys((".edf", ".bdf", ".rec"), read_edf),
    **dict.fromkeys((".h5", ".hdf5"), read_hdf5),
    **dict.fromkeys((".dcm", ".dicom"), read_dicom),
    ".mat": read_mat,
    ".scp": read_scp,
    ".xml": read_xml,
}
BEGINNINGS: tuple[tuple[int, bytes, Reader], ...] = (
    (128, b"DICM", read_dicom),
    (16, b"SCPECG", read_scp),
    (0, b"\x89HDF\r\n\x1a\n", read_hdf5),
    (0, b"0       ", read_edf),
    (0, b"\xffBIOSEMI", read_edf),
    (0, b"<?xml", read_xml),
)


def reader_of(path: Path) -> Reader | None:
    """Who reads the file at `path`: by its ending in upper or lower case, else (archives give DICOM files none) by how
    it begins; None: no file, or of no known kind."""
    if not os.path.isfile(path):  # which raises nothing, however long the name is
        return None
    endings = [suffix.casefold() for suffix in path.suffixes[-2:]]
    reader = READERS.get("".join(endings)) or READERS.get(endings[-1] if endings else "")
    if reader is None:
        with suppress(OSError), path.open("rb") as file:
            start = file.read(132)
            return next((reader for at, mark, reader in BEGINNINGS if start[at : at + len(mark)] == mark), None)
    return reader
