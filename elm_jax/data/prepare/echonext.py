"""EchoNext: arrays of waveforms, one for each split, and what the echocardiogram found."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.recording import Recording
from elm_jax.errors import UserError, refused
from elm_jax.folders import check_regular

INDEX, RATE = "EchoNext_metadata_100k.csv", 250.0
_FIX = "point --raw at the folder of EchoNext, or download it again"
_FINDINGS = {
    "lvef_lte_45_flag": "left ventricular systolic dysfunction",
    "lvwt_gte_13_flag": "left ventricular hypertrophy",
    "aortic_stenosis_moderate_or_greater_flag": "moderate or greater aortic stenosis",
    "aortic_regurgitation_moderate_or_greater_flag": "moderate or greater aortic regurgitation",
    "mitral_regurgitation_moderate_or_greater_flag": "moderate or greater mitral regurgitation",
    "tricuspid_regurgitation_moderate_or_greater_flag": "moderate or greater tricuspid regurgitation",
    "pulmonary_regurgitation_moderate_or_greater_flag": "moderate or greater pulmonary regurgitation",
    "rv_systolic_dysfunction_moderate_or_greater_flag": "right ventricular systolic dysfunction",
    "pericardial_effusion_moderate_large_flag": "pericardial effusion",
    "pasp_gte_45_flag": "pulmonary hypertension",
    "tr_max_gte_32_flag": "raised tricuspid regurgitation velocity",
}
_NONE = "no significant structural heart disease"


def _recordings(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """A row of the table is the next row of its split's array."""
    index = next((path for path in (raw / INDEX, raw / "1.1.1" / INDEX) if path.is_file()), raw / INDEX)
    below = index.parent.relative_to(raw).as_posix()
    place: dict[str, int] = {}
    for line, row in csv_rows(index, ("split", *_FINDINGS), index, "EchoNext's table", _FIX):
        split = (row["split"] or "").strip()
        number = place[split] = place.get(split, -1) + 1
        flags = [(row[name] or "").strip() for name in _FINDINGS]
        if "" in flags:
            yield LeftOut("without_findings", f"{split} {number}", f"line {line} has an empty flag")
            continue
        found = [name for name, flag in zip(_FINDINGS.values(), flags, strict=True) if flag in ("1", "1.0", "True")]
        yield RawRecording(
            f"{below}/EchoNext_{split}_waveforms.npy".removeprefix("./"),
            row.get("patient_key") or "",
            split if split in ("train", "val", "test") else None,
            "; ".join(found) or _NONE,
            name=f"echonext_{split}_{number}",
            row=number,
        )


@lru_cache(maxsize=8)
def _open(path: Path) -> np.ndarray:
    """(n, 1, samples, 12), mapped into memory."""
    check_regular(path, "EchoNext's waveforms")
    with refused(path, "an unreadable array", "EchoNext's waveforms", _FIX, Exception):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 4 or array.shape[1] != 1 or array.shape[3] != len(LEADS) or array.dtype.kind != "f":
        raise UserError(path, f"{array.dtype} of shape {array.shape}", "(n, 1, samples, 12) of real numbers", _FIX)
    return array


def _read(path: Path, row: int) -> Recording:
    array = _open(path)
    if row >= len(array):
        raise UserError(path, f"{len(array)} recordings", f"one at {row}", _FIX)
    return Recording(np.ascontiguousarray(array[row, 0].T, dtype=np.float64), LEADS, RATE)


ECHONEXT = RawDataset("EchoNext", f"{INDEX}, and EchoNext_train_waveforms.npy and the like", _recordings, _read)
