"""From the path in a record to the normalised array that a model takes."""

import zlib
from pathlib import Path

import numpy as np

from elm_jax.data.ecg import LEADS, normalize, read_recording, to_segment
from elm_jax.errors import UserError

NOISE, FLATLINE, DEMO = "noise", "flatline", "demo:"


def load_signal(
    ecg_path: str,
    *,
    root: str,
    leads: tuple[int, ...],
    length: int,
    sampling_rate: float,
    norm_eps: float,
    perturb: str | None,
    key: int,
) -> np.ndarray:
    """The signal at `ecg_path` (relative to `root`) as the model sees it.

    Returns (len(leads), length) float32 in [0, 1]. `leads` are indices into the canonical order. The paths
    "noise" and "flatline" stand for signals without a recording: standard normal samples drawn from
    key, and a constant; `perturb` puts the same in place of any recording. Paths that begin with
    "demo:" are generated. Raises UserError for a recording that cannot be read or is too short.
    """
    if perturb == "noise":
        key = zlib.crc32(ecg_path.encode(), key & 0xFFFFFFFF)  # recordings of one record differ
    ecg_path = {"zeros": FLATLINE, "noise": NOISE}.get(perturb or "", ecg_path)
    signal = load_raw(ecg_path, root=root, length=length, sampling_rate=sampling_rate, key=key)
    return normalize(signal[list(leads)], norm_eps)


def load_raw(ecg_path: str, *, root: str, length: int, sampling_rate: float, key: int) -> np.ndarray:
    """The 12 leads (12, length) before normalisation: in mV where the recording is. See `load_signal`."""
    if ecg_path == FLATLINE:
        return np.zeros((len(LEADS), length), np.float32)
    if ecg_path == NOISE:
        seed = np.array([key % 2**64, zlib.crc32(b"noise")], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=seed)).standard_normal((len(LEADS), length))
    if ecg_path.startswith(DEMO):
        from elm_jax.data.demo import load_demo_ecg

        return load_demo_ecg(ecg_path, sampling_rate, length)
    return _from_file(Path(root, ecg_path), sampling_rate, length)


def _from_file(path: Path, sampling_rate: float, length: int) -> np.ndarray:
    recording = read_recording(path, bare_rate=sampling_rate)
    try:
        return to_segment(recording, sampling_rate, length)
    except UserError as error:
        raise UserError(str(path), error.found, error.expected, error.fix) from None
