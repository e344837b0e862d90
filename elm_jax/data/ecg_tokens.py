"""An ECG as tokens of the language model: the ids of ECG-Byte become tokens `signal_<id>`, spliced into the text.

A conversation is rendered with one `<signal>` where an ECG belongs; `write_ecgs` puts the ECG's tokens there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax import compat as behaviours
from elm_jax.data.batch import Signal
from elm_jax.errors import UserError
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import Rendered


@dataclass(frozen=True)
class EcgTokens:
    """ECG-Byte with the language model's id of each of its ids."""

    coder: EcgByte
    llm_ids: np.ndarray  # (len(coder),) int32
    least: int  # tokens of an ECG that truncation keeps

    @property
    def fingerprint(self) -> str:
        """Changes with all that decides how many tokens an ECG has."""
        return f"{self.coder.fingerprint}:{self.least}"

    def encode(self, signal: np.ndarray, eps: float) -> np.ndarray:
        """A signal (C, L) -> its tokens (n,) int32. Raises UserError where the extension is missing."""
        ids = self.coder.encode(signal, eps=eps)
        assert isinstance(ids, np.ndarray)
        return self.llm_ids.take(ids)

    def expand(
        self, render: Callable[[int | None], Rendered], ecgs: Sequence[np.ndarray], limit: int | None,
        length: int | None = None, varies: bool = False, compat: tuple[str, ...] = (),
    ) -> Rendered:  # fmt: skip
        """What `render` makes within so many tokens, with the ECGs' tokens in it, within `limit` and `length`.

        The ECGs take the room that the text leaves, but each keeps `data.min_ecg_tokens`: for these text gives way.
        Where they vary from epoch to epoch the text does not: it makes room as if each ECG had at least so many.
        """
        if limit is None or not ecgs:
            rendered = render(limit)
            return write_ecgs(rendered, ecgs) if ecgs else rendered
        if len(ecgs) == 1 and behaviours.enabled("truncate_tokens", compat):
            return _cut_as_reference(render(None), ecgs[0], limit, self.least)
        kept = len(ecgs) * max(self.least - 1, 0) if varies else reserved(ecgs, self.least)
        try:
            rendered = render(limit - kept)
        except UserError as error:
            if error.where != "data.max_len":
                raise
            found = f"{limit} tokens, {kept + len(ecgs)} of them for ECGs (data.min_ecg_tokens)"
            fix = "raise data.max_len or lower data.min_ecg_tokens"
            raise UserError(error.where, found, "room for the text beside the ECGs", fix) from error
        room = min(limit, length or limit) - len(rendered.ids) + len(ecgs)
        return write_ecgs(rendered, cut_ecgs(ecgs, room))


def add_ecg_tokens(tokenizer: Any, path: str | Path, least: int, compat: tuple[str, ...] = ()) -> EcgTokens:
    """Give a tokenizer, where it has them not yet, the tokens of the ECG-Byte file at `path`.

    They are ordinary tokens, in the order of their ids; under compat "signal_token_order" in the order of the file,
    which the reference's checkpoints need. Raises UserError for a file that is no ECG-Byte tokenizer.
    """
    coder = EcgByte.load(path)
    in_file_order = behaviours.enabled("signal_token_order", compat)
    order = coder.order if in_file_order else range(len(coder))
    tokenizer.add_tokens([f"signal_{i}" for i in order])
    ids = tokenizer.convert_tokens_to_ids([f"signal_{i}" for i in range(len(coder))])
    return EcgTokens(coder, np.asarray(ids, np.int32), least)


def write_ecgs(rendered: Rendered, ecgs: Sequence[np.ndarray]) -> Rendered:
    """`rendered`, which has one placeholder for each ECG, with the ECGs' tokens (n,) in their place.

    No signal positions are left: the model reads these ECGs as it reads text.
    """
    places = rendered.signal_positions[:, 0]
    assert len(places) == len(ecgs), (len(places), len(ecgs))
    ids, supervised, begin = [], [], 0
    for place, tokens in zip(places, ecgs, strict=True):
        ids += [rendered.ids[begin:place], tokens]
        supervised += [rendered.supervised[begin:place], np.zeros(len(tokens), bool)]
        begin = place + 1
    more = [len(tokens) - 1 for tokens in ecgs]

    def moved(end: int) -> int:
        return end + sum(m for place, m in zip(places, more, strict=True) if place < end)

    return replace(
        rendered,
        ids=np.concatenate([*ids, rendered.ids[begin:]]).astype(np.int32),
        supervised=np.concatenate([*supervised, rendered.supervised[begin:]]),
        signal_positions=np.zeros((0, 0), np.int32),
        system_end=moved(rendered.system_end),
        signal_end=moved(rendered.signal_end),
    )


def write_prompt(rendered: Rendered, ecgs: Sequence[np.ndarray], least: int, limit: int) -> Rendered:
    """A rendered prompt with its ECGs' tokens written into it, cut where text and ECGs exceed `limit` tokens.

    As in training, each ECG keeps `least` tokens, even where the limit is exceeded then.
    """
    room = limit - len(rendered.ids) + len(ecgs)
    return write_ecgs(rendered, cut_ecgs(ecgs, max(room, reserved(ecgs, least) + len(ecgs))))


def reserved(ecgs: Sequence[Signal], least: int) -> int:
    """Tokens beyond their placeholders that ECGs keep, whatever is truncated."""
    return sum(min(len(tokens), max(least, 1)) - 1 for tokens in ecgs)


def cut_ecgs(ecgs: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """The ECGs' tokens, the longest ones cut at their ends until all fit into `room` tokens."""
    lengths = sorted(len(tokens) for tokens in ecgs)
    limit = max(lengths, default=0)
    if sum(lengths) > room:
        left, limit = room, 0
        for i, length in enumerate(lengths):
            limit = left // (len(lengths) - i)
            if length > limit:
                break
            left -= length
    return [tokens[:limit] for tokens in ecgs]


def kept_as_reference(before: int, ecg: int, after: int, limit: int, least: int) -> tuple[int, int]:
    """How many tokens of the ECG and of the text behind it the reference keeps in `limit` (compat).

    It gives the ECG what the text leaves, but no less than `least`, and cuts the end of the text behind it.
    Raises UserError where the text before leaves no room.
    """
    if before + ecg + after <= limit:
        return ecg, after
    if before + least > limit:
        raise UserError(
            "data.min_ecg_tokens", f"{least} beside {before} tokens before the ECG", f"together at most {limit}",
            "lower data.min_ecg_tokens or raise data.max_len",
        )  # fmt: skip
    kept = min(ecg, max(least, limit - before - after))
    return kept, min(after, limit - before - kept)


def _cut_as_reference(rendered: Rendered, ecg: np.ndarray, limit: int, least: int) -> Rendered:
    """The ECG's symbols in place, cut as the reference cuts them and the text behind them."""
    place, length = int(rendered.signal_positions[0, 0]), len(rendered.ids)
    kept, after = kept_as_reference(place, len(ecg), length - place - 1, limit, least)
    end = place + 1 + after
    if not rendered.supervised[:end].any():
        raise UserError(
            "data.max_len", str(limit), "room for a token of the answer behind the ECG",
            "raise it, lower data.min_ecg_tokens, or leave truncate_tokens out of compat",
        )  # fmt: skip
    cut = replace(rendered, ids=rendered.ids[:end], supervised=rendered.supervised[:end])
    return write_ecgs(cut, [ecg[:kept]])
