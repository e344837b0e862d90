"""Where a model looks while it answers: attention from the answer's tokens to the ECG's and the text's.

The mean over layers and heads, as in ECG-Byte (section 5.5). It says what is mixed into the answer's states, not what
causes the answer: `dependence` tells that. T tokens, N signal tokens of an ECG, H heads, d head size, L samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.config import Config
from elm_jax.data.batch import Shown
from elm_jax.data.represent import SignalSpec
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.models.attention import padding_mask
from elm_jax.models.decoder import Decoder, Layer, Window
from elm_jax.models.encoders import ENCODERS
from elm_jax.models.hints import placed
from elm_jax.models.pooling import pooling_weights
from elm_jax.models.stack import Parts
from elm_jax.runtime.mesh import MeshPlacement

Part = tuple[int, int, int, int]  # of a signal: first lead, last lead, first sample, last sample; ends excluded


@dataclass(frozen=True)
class Attention:
    """What the answer's tokens attend to, summing to 1 over the prompt and the answer before each.

    tokens: the prompt's and the answer's, as text. weights: (T,) of all of them. ecg_tokens: of each ECG the places of
    its tokens. spans: of each ECG and token the parts of the signal that it stands for: what it was made of, before the
    encoder's layers mix them. answer_start: where the answer begins.
    """

    tokens: list[str]
    weights: np.ndarray
    ecg_tokens: list[list[int]]
    spans: list[list[list[Part]]]
    answer_start: int

    @property
    def ecg_share(self) -> float:
        """The part of the attention that goes to ECGs."""
        return float(sum(self.weights[places].sum() for places in self.ecg_tokens))

    @property
    def uniform_share(self) -> float:
        """The part that ECGs would have if each token of the prompt had the same."""
        return sum(map(len, self.ecg_tokens)) / max(1, self.answer_start)

    def over_signal(self, ecg: int, shape: tuple[int, int]) -> np.ndarray:
        """(C, L): the mean weight of the tokens that stand for each sample, relative to the largest.

        Where spans of tokens overlap, they share the samples: equal weights are the same everywhere, and the sum over
        the signal is the tokens' but for one factor. Samples that no token stands for have 0.
        """
        weight, tokens = np.zeros(shape), np.zeros(shape)
        for place, parts in zip(self.ecg_tokens[ecg], self.spans[ecg], strict=True):
            for a, b, c, d in parts:
                weight[a:b, c:d] += self.weights[place]
                tokens[a:b, c:d] += 1
        mean = weight / np.maximum(tokens, 1)
        return mean / mean.max() if mean.max() > 0 else mean


def attention(model: TrainedModel, prompt: Prompt, answer: str) -> Attention:
    """The attention while `answer`, tokenised anew, is read back after the prompt."""
    tokenizer = model.assembly.tokenizer
    written = model.written(prompt, model.config.eval.max_new_tokens)
    said = np.asarray(tokenizer.encode(answer, add_special_tokens=False) or [model.stops[0]], np.int32)
    start = len(written.rendered.ids)
    ids = np.concatenate([written.rendered.ids, said])[: model.assembly.llm.max_len]
    weights = _weights(model, written, ids)
    # A token's answer is made in the place before it.
    mean = weights[start - 1 : len(ids) - 1 if len(ids) > start else start].mean(0)
    by_embedding = _ecg_places(model, prompt, written)
    places = [[place for place in at if place >= 0] for at in by_embedding]
    ecgs, spans = prompt.signals or [{}] * len(places), []
    for at, ecg in zip(by_embedding, ecgs, strict=True):
        spans.append([s for s, place in zip(_spans(model, ids[at], ecg), at, strict=True) if place >= 0])
    return Attention([tokenizer.decode([int(i)]) for i in ids], mean, places, spans, start)


def _weights(model: TrainedModel, prompt: Prompt, ids: np.ndarray) -> np.ndarray:
    """(T, T): the mean over layers and heads."""
    inputs = model.embeddings(replace(model.request(0, prompt, 1), ids=ids))

    @jax.jit
    def run(arrays: Any, inputs: Any) -> jax.Array:
        with placed(MeshPlacement(model.mesh)):
            return _mean_weights(model.assembly.structure.bind(arrays).llm, inputs)

    return np.asarray(run(model.arrays, inputs[None]))[0]


def _mean_weights(llm: Decoder, x: jax.Array) -> jax.Array:
    """Embeddings (B, T, D) -> attention (B, T, T)."""
    valid = jnp.ones(x.shape[:2], jnp.int32)
    positions = llm.prompt_positions(valid)
    rotary, masks = llm.rotary(positions), llm.masks(padding_mask(valid), positions, positions)

    chains = llm.chains(valid, jnp.zeros_like(valid))

    def body(layer: Layer, window: Window, x: jax.Array, _: Parts) -> tuple[jax.Array, Parts]:
        if layer.attention is None:  # it has no weights
            return layer.recur(x, chains)[0], {}
        q, k, v, gate = layer.project(x, rotary[window])
        attended = llm.attend(q, k, v, masks[window], "xla")
        return layer.combine(x, attended, gate), {"attention": _head_mean(llm, q, k, masks[window])}

    _, found = llm.scan_layers(body, llm.placed(x, positions))
    return found["attention"].mean(0)


def _head_mean(llm: Decoder, q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """(B, T, S): what `attend` weighs values by, read off values that are unit vectors, d of them at a time."""
    size, keys = k.shape[-1], k.shape[1]
    parts = []
    for first in range(0, keys, size):
        unit = jnp.eye(keys, size, -first, dtype=jnp.float32)
        values = jnp.broadcast_to(unit[None, :, None], (*k.shape[:3], size))
        parts.append(llm.attend(q, k, values, mask, "xla").mean(2))
    return jnp.concatenate(parts, axis=-1)[..., :keys]


def _ecg_places(model: TrainedModel, prompt: Prompt, written: Prompt) -> list[list[int]]:
    """Of each ECG the places of its tokens in the written prompt, -1 of an embedding that it has not."""
    if written.signals or not prompt.signals:
        return [[int(i) for i in row] for row in written.rendered.signal_positions]
    symbols = model.assembly.signal.tokens
    assert symbols is not None
    own = np.flatnonzero(np.isin(written.rendered.ids, symbols.llm_ids))
    breaks = np.flatnonzero(np.diff(own) > 1) + 1
    return [[int(i) for i in part] for part in np.split(own, breaks)]


def _spans(model: TrainedModel, ids: np.ndarray, ecg: Shown) -> list[list[Part]]:
    """The parts of the signal that the tokens of one ECG stand for; a token that has no place stands for all of it.

    What an encoder reads of the ECG is asked for where that says its length.
    """
    spec, config = model.assembly.signal, model.config
    if spec.tokens is not None:
        return _symbol_spans(spec, ids)
    spans = []
    for view in config.slots:
        told = view in ecg and spec.views[view].some_leads
        samples = int(ecg[view]["samples"]) if told else spec.length
        spans += _view_spans((spec.shape[0], samples), config, view, model.assembly.encoders)
    return spans


def _view_spans(
    shape: tuple[int, int], config: Config, view: str, encoders: Mapping[str, Mapping[str, Any]]
) -> list[list[Part]]:
    """Of the tokens of one view."""
    (leads, samples), encoder = shape, config.encoder_of(view)
    whole, count = [(0, leads, 0, samples)], config.views[view].tokens or encoder.tokens
    if encoder.name is None:  # the connector's patches are the tokens
        by_lead, edges = False, range(0, samples + 1, samples // count)
    else:
        pooled, fields = ENCODERS[encoder.name].pooled, ENCODERS[encoder.name].config(encoders[view])
        if pooled is None:  # one vector of an image, from a CLS token, a mean or attention over all patches
            return [whole] * count
        by_lead = pooled.by_lead
        edges = pooled.edges(fields, leads * samples if by_lead else samples)
    spans = []
    for inside in pooling_weights(len(edges) - 1, count) > 0:
        positions = np.flatnonzero(inside)
        a, b = int(edges[positions[0]]), int(edges[positions[-1] + 1])
        parts = _unrolled(a, b, samples) if by_lead else [(0, leads, a, b)]
        spans.append(parts if a < b else whole)  # CLS alone has read all of them
    return spans


def _symbol_spans(spec: SignalSpec, ids: np.ndarray) -> list[list[Part]]:
    """A symbol stands for as many samples as it spells; leads follow one another."""
    assert spec.tokens is not None
    own = {int(token): i for i, token in enumerate(spec.tokens.llm_ids)}
    ends = np.cumsum(spec.tokens.coder.lengths[[own[int(token)] for token in ids]])
    starts = np.concatenate([[0], ends[:-1]])
    return [_unrolled(int(a), int(b), spec.shape[1]) for a, b in zip(starts, ends, strict=True)]


def _unrolled(start: int, end: int, samples: int) -> list[Part]:
    """Samples [start, end) of all leads, one after the other, lead by lead."""
    parts = []
    while start < end:
        lead, first = divmod(start, samples)
        last = min(samples, first + end - start)
        parts.append((lead, lead + 1, first, last))
        start += last - first
    return parts
