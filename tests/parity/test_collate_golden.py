"""The reference pads a batch on the left; our rows hold the same tokens, labelled places and signals, padded behind.

The golden's labels and signal places are drawn at random, so what is compared is where they are: in our batch a target
is always the token that stands there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from parity_log import record

from elm_jax.data.batch import ArraySpec, Batch, BatchShape, Conversation, Group, collate

IGNORED = -100


def conversation(cases: np.lib.npyio.NpzFile, number: int) -> Conversation:
    ids, labels, places, signal = (
        cases[f"item{number}/{name}"] for name in ("elm_input_ids", "elm_labels", "signal_id_indices", "ecg_signal")
    )
    supervised = labels != IGNORED
    supervised[0] = False  # nothing comes before the first token to predict it: a causal loss never reads its label
    placed = places[places >= 0].astype(np.int32)[None]  # -1: no place
    return Conversation(number, ids.astype(np.int32), supervised, placed, [signal.astype(np.float32)])


def found_in_row(batch: Batch, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row's ids, which of them are learnt, and the places of its signal tokens in their order."""
    real = batch.group_ids[row] > 0
    learnt, slots = np.zeros(real.sum(), bool), batch.target_weights[row] > 0
    places = batch.target_index[row][slots] + 1
    learnt[places] = batch.target_ids[row][slots] == batch.tokens[row][places]
    signal = np.flatnonzero(batch.signal_slot[row] >= 0)
    return batch.tokens[row][real], learnt, signal[np.argsort(batch.signal_slot[row][signal])]


def test_rows_hold_what_the_collated_batch_holds(golden: Callable[[str], Path]) -> None:
    cases = np.load(golden("text_collate") / "cases.npz")
    kinds = dict.fromkeys(name.split("/")[0] for name in cases)
    wholes = [kind for kind in kinds if not kind.startswith("item")]
    items = [conversation(cases, n) for n in range(len(kinds) - len(wholes))]
    longest = max(cases[f"{whole}/elm_input_ids"].shape[1] for whole in wholes)
    layout = ArraySpec(items[0].signals[0].shape)
    batch = collate([[Group(0, [item])] for item in items], BatchShape(longest, 1, longest), layout)
    assert items and len(wholes) > 1
    wrong = 0
    for whole in wholes:
        for row, item in enumerate(items):
            start = cases[f"{whole}/elm_input_ids"].shape[1] - len(item.ids)
            ids, learnt, places = found_in_row(batch, row)
            theirs = cases[f"{whole}/signal_id_indices"][row]
            wrong += not np.array_equal(ids, cases[f"{whole}/elm_input_ids"][row][start:])
            wrong += not np.array_equal(learnt[1:], cases[f"{whole}/elm_labels"][row][start + 1 :] != IGNORED)
            wrong += not np.array_equal(places, theirs[theirs >= 0] - start)
            wrong += cases[f"{whole}/elm_attention_mask"][row][:start].any()
        signals = cases["collated/ecg_signal"].astype(np.float32)
        wrong += not np.array_equal(batch.signals[:, 0], signals)
    record("text_collate", "differing ids, labelled places, signal places and signals", wrong, 0)
