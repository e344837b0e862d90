"""What several tests build: tiny models and batches of random conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.data.batch import ArraySpec, Batch, BatchShape, Conversation, Group, collate
from elm_jax.models.connectors import build_connector
from elm_jax.models.decoder import Decoder
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import build_encoder, merl
from elm_jax.models.families import scratch_config
from elm_jax.models.functional import Arrays, Structure, structure_of

LEADS, SAMPLES, SIGNAL_TOKENS, VOCABULARY = 3, 64, 2, 64
SIGNAL_SHAPE = (LEADS, SAMPLES)
SIGNAL_LAYOUT = {"ecg": ArraySpec(SIGNAL_SHAPE)}


def tiny_elm(heads: int = 2, hidden: int = 32, layers: int = 2, seed: int = 0) -> tuple[Structure, Arrays]:
    """An ELM of a small ResNet, an MLP connector and a decoder, in float32."""

    def build() -> ELM:
        rngs = nnx.Rngs(seed)
        sizes = {"hidden": hidden, "layers": layers, "heads": heads, "mlp": 2 * hidden, "max_len": 256}
        llm = scratch_config(sizes, VOCABULARY)
        config = {"resnet_type": "tiny", "width": 8, "num_leads": LEADS}
        encoder = build_encoder("merl", config, SIGNAL_TOKENS, rngs)
        connector = build_connector("mlp", encoder.width, hidden, rngs=rngs)
        return ELM(encoder, connector, Decoder(llm, rngs), jnp.float32)

    with mock.patch.dict(merl.LAYOUTS, tiny=(merl.basic, (1,))):  # one block: compiles in a fraction of the time
        structure = structure_of(build)
        return structure, jax.jit(lambda: structure.arrays(build()))()


class RandomConversations:
    """Conversations of a system prompt of 5 tokens, ECGs and a question with an answer."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.system = self.rng.integers(1, VOCABULARY, 5).astype(np.int32)
        self.count = 0

    def recording(self, ecgs: int = 1) -> list[dict[str, Any]]:
        return [{"ecg": self.rng.random(SIGNAL_SHAPE).astype(np.float32)} for _ in range(ecgs)]

    def ask(
        self, signals: list[dict[str, Any]], question: int = 4, answer: int = 2, late_ecgs: int = 0
    ) -> Conversation:
        """A conversation; `late_ecgs` of its ECGs stand after the question instead of before it."""
        placeholders = np.full(SIGNAL_TOKENS, 1, np.int32)
        early = len(signals) - late_ecgs
        words = self.rng.integers(1, VOCABULARY, question).astype(np.int32)
        reply = self.rng.integers(1, VOCABULARY, answer).astype(np.int32)
        parts = [self.system, *[placeholders] * early, words, *[placeholders] * late_ecgs, words[:1], reply]
        ids = np.concatenate(parts)
        starts = [len(self.system) + SIGNAL_TOKENS * e for e in range(early)]
        starts += [
            len(self.system) + SIGNAL_TOKENS * early + question + SIGNAL_TOKENS * e for e in range(late_ecgs)
        ]
        supervised = np.zeros(len(ids), bool)
        supervised[-answer:] = True
        positions = np.array([[s + n for n in range(SIGNAL_TOKENS)] for s in starts], np.int32)
        self.count += 1
        return Conversation(
            self.count - 1, ids, supervised, positions.reshape(len(signals), SIGNAL_TOKENS), signals
        )


def batch_of(rows: Sequence[list[Group]], tokens: int = 64, signals: int = 8, targets: int = 24) -> Batch:
    """One micro-batch of these rows."""
    return stack_micro_batches([collate(list(rows), BatchShape(tokens, signals, targets), SIGNAL_LAYOUT)])


def stack_micro_batches(batches: list[Batch]) -> Batch:
    """Micro-batches of equal shape: every array gets the leading axis A."""
    return jax.tree.map(lambda *parts: np.stack(parts), *batches)
