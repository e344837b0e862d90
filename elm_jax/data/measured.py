"""What is measured of the ECG of a record, for who holds answers against it. Each recording is measured once."""

from dataclasses import replace
from functools import lru_cache

from elm_jax.data.represent import FLATLINE, NOISE, SignalSpec
from elm_jax.data.sources import Record
from elm_jax.ecg.beats.measurements import measure
from elm_jax.scoring.grounding import Evidence, evidence_of

_KEPT = 1 << 16  # recordings whose measurements are remembered, some KB each


class Measured:
    """Record -> the evidence in its one recording: as `spec` reads it, all leads that it has, whatever a control shows
    in its place. None for a record with no recording, or several."""

    def __init__(self, spec: SignalSpec) -> None:
        self._spec = replace(spec, perturb=None, further={}, some_leads=True)
        self._of = lru_cache(_KEPT)(self._measure)

    def __call__(self, record: Record) -> Evidence | None:
        """Raises UserError where the recording cannot be read."""
        if len(record.ecg_paths) != 1 or record.ecg_paths[0] in (NOISE, FLATLINE):
            return None
        return self._of(record.ecg_paths[0])

    def _measure(self, path: str) -> Evidence:
        signal, leads = self._spec.recorded(path, 0)
        return evidence_of(measure(signal, self._spec.sampling_rate, leads))
