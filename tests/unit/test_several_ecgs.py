"""A conversation about two ECGs: it matters which is which, and not where in the batch the conversation stands."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from support import RandomConversations, batch_of, tiny_elm

from elm_jax.data.batch import Batch, Conversation, Group


def logits(batch: Batch) -> np.ndarray:
    """(B, M, V) at the supervised positions."""
    structure, arrays = tiny_elm()
    micro = jax.tree.map(lambda x: x[0], batch)

    @jax.jit
    def run(arrays, micro):
        elm = structure.bind(arrays)
        hidden = elm.hidden(micro)
        return elm.llm.logits(jax.numpy.take_along_axis(hidden, micro.target_index[..., None], axis=1))

    return np.asarray(run(arrays, micro))


def test_swapping_two_ecgs_changes_the_answer_and_permuting_the_batch_does_not() -> None:
    talk = RandomConversations()
    asked: list[Conversation] = [talk.ask(talk.recording(2), 4, 2), talk.ask(talk.recording(2), 3, 2, late_ecgs=1)]
    asked.append(talk.ask(talk.recording(1)))

    def row_logits(conversations: list[Conversation]) -> np.ndarray:
        return logits(batch_of([[Group(0, [c])] for c in conversations]))[:, :2]  # two supervised tokens each

    straight = row_logits(asked)
    swapped = row_logits([replace(c, signals=(c.signals or [])[::-1]) for c in asked])
    for row, conversation in enumerate(asked):
        moved = np.abs(swapped[row] - straight[row]).max()
        assert moved > 1e-3 if len(conversation.signals or []) == 2 else moved == 0
    order = [2, 0, 1]
    np.testing.assert_allclose(row_logits([asked[i] for i in order]), straight[order], rtol=0, atol=1e-5)
