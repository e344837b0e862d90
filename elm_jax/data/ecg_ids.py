"""An ECG as ids for an encoder: those of ECG-Byte between a begin and an end. No token of a language model is among
them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elm_jax.ecg.recording import LEADS
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.files import BYTES

PADDED = -1  # in a batch, an id that is none
SPECIAL, OF_LEADS = 3, 2 * len(LEADS)  # ids behind ECG-Byte's: padding, begin and end; begin and end of each lead


@dataclass(frozen=True, repr=False)
class EcgIds:
    """ECG-Byte with ids beside its own: padding, begin, end, and with `by_lead` a begin and an end of each lead.

    length: ids of a sequence, at most. leads: which of the 12 canonical leads a signal has, in its order.
    """

    coder: EcgByte
    length: int
    leads: tuple[int, ...]
    by_lead: bool = False

    def __repr__(self) -> str:
        """Changes with all that decides which ids an ECG has."""
        return f"EcgIds({self.coder.fingerprint}, {self.length}, {self.leads}, {self.by_lead})"

    @property
    def vocab_size(self) -> int:
        return len(self.coder) + SPECIAL + (OF_LEADS if self.by_lead else 0)

    def encode(self, signal: np.ndarray, eps: float) -> np.ndarray:
        """A signal (C, L) -> (length,) int32, with `PADDED` behind its ids.

        With `by_lead` the leads share their range. Of a sequence that is too long the end is cut, but for its last id.
        Raises UserError where the extension is missing.
        """
        begin, samples = len(self.coder) + 1, signal.shape[1]
        parts: list[np.ndarray | list[int]] = [[begin]]
        letters = self.coder.to_symbols(signal, eps)
        if self.by_lead:
            for place, lead in enumerate(self.leads):
                own = self.coder.encode_symbols(letters[place * samples : (place + 1) * samples])
                parts += [[begin + 2 + 2 * lead], own, [begin + 3 + 2 * lead]]
        else:
            parts.append(self.coder.encode_symbols(letters))
        ids = np.concatenate([*parts, [begin + 1]]).astype(np.int32)
        if len(ids) > self.length:
            ids = np.append(ids[: self.length - 1], ids[-1])
        return np.pad(ids, (0, self.length - len(ids)), constant_values=PADDED)

    def decode(self, ids: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """The samples (n,) float64, lead after lead, that ids (T,) spell, `low` and `high` being the ECG's minimum and
        maximum; ids that spell none are passed over."""
        letters = list(self.coder.symbols.encode("latin-1"))
        own = ids[np.isin(ids, letters) | ((ids >= BYTES) & (ids < len(self.coder)))]
        return self.coder.decode(own, (1, int(self.coder.lengths[own].sum())), low, high)[0]
