"""Answers of an ECG-language model: from rendered prompts with their ECGs to text.

Dimension letters: B prompts, P prompt tokens, S signal slots, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from elm_jax.assemble import Assembly
from elm_jax.config import EvalConfig
from elm_jax.data.batch import Shown, empty_signals, place_ecgs
from elm_jax.data.ecg_tokens import write_prompt
from elm_jax.errors import UserError
from elm_jax.inference.engine import CHUNK, Engine
from elm_jax.inference.requests import Event, Piece, Request
from elm_jax.inference.sampling import Sampling
from elm_jax.models.hints import placed
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, batch_ways, whole_to_device
from elm_jax.text.render import Rendered, answer_ids, decode, stop_ids


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt with its ECGs as the run's `SignalSpec` loads them.

    new: the most tokens of its answer; None: `eval.max_new_tokens`. draws: one for each of its answers, which are drawn
    together: what is drawn depends on it, beside the seed; from 0 to 2**31 - 1; None: one answer, by the prompt's place
    among the others. cut: tokens of its ECGs, where these are symbols, for which the context had no room.
    """

    rendered: Rendered
    signals: Sequence[Shown]
    new: int | None = None
    draws: tuple[int, ...] | None = None
    cut: int = 0


class Answer(NamedTuple):
    """An answer of `Speaker.stream`: the prompt's number, the text, seconds in the model, tokens drawn.

    `seconds` are those from the prompt's turn to its end, of which others had their share. ended: by an end token, not
    for want of room.
    """

    number: int
    text: str
    seconds: float
    tokens: int
    ended: bool


class Speaker:
    """A model that answers: the arrays of an assembly's structure, laid out on a mesh."""

    def __init__(self, assembly: Assembly, mesh: jax.sharding.Mesh, arrays: Mapping[str, jax.Array]) -> None:
        self.assembly, self.mesh, self.config = assembly, mesh, assembly.config
        self.stops = stop_ids(assembly.tokenizer, assembly.text.family)
        self._rows = batch_sharding(mesh, micro_batches=False)
        self._encode = jax.jit(self._signal_embeddings, out_shardings=self._rows)
        self._splice = jax.jit(self._inputs, out_shardings=self._rows)
        self.use(arrays)

    def use(self, arrays: Mapping[str, jax.Array]) -> None:
        """Answer with these arrays from now on; what is compiled stays."""
        self.arrays, llm = arrays, self.assembly.structure.bind(arrays).llm
        self.engine = Engine(llm, self._embedded, self.stops, MeshPlacement(self.mesh), batch_ways(self.mesh))

    def answers(self, prompts: Sequence[Prompt], options: EvalConfig, seed: int = 0) -> list[str]:
        """The model's answers, one per prompt, in their order; see `stream`."""
        found = {answer.number: answer.text for answer in self.stream(prompts, options, seed)}
        return [found[number] for number in range(len(prompts))]

    def stream(self, prompts: Iterable[Prompt], options: EvalConfig, seed: int = 0) -> Iterator[Answer]:
        """Answers as they are finished. Prompts are read as rows become free, eight times `options.batch_size` ahead.

        Where answers are drawn (`options.temperature`), a prompt's depend on the seed and its `draws`, not on the
        others.

        Raises:
            UserError: a prompt does not fit the context beside `options.max_new_tokens`.
        """
        tokens: dict[tuple[int, int], list[int]] = {}
        for event in self.events(prompts, options, seed):
            tokens.setdefault(event[:2], []).extend(event.tokens)
            if event.seconds is not None:
                ids = tokens.pop(event[:2])
                ended = bool(ids) and ids[-1] in self.stops
                yield Answer(event.number, self._text(ids), event.seconds, len(ids), ended)

    def spoken(self, prompt: Prompt, options: EvalConfig, seed: int = 0) -> Iterator[str]:
        """One answer in pieces, as it comes. Their sum is the answer."""
        ids: list[int] = []
        said = ""
        for event in self.events([prompt], options, seed, chunk=1):
            ids += event.tokens
            text = self._text(ids)
            # The last characters may still be parts of one, or white space that an answer does not end with.
            sure = text if event.seconds is not None else text.rstrip("\N{REPLACEMENT CHARACTER} ")
            if sure.startswith(said) and sure != said:
                yield sure[len(said) :]
                said = sure

    def option_probabilities(self, prompts: Prompt | Sequence[Prompt], options: Sequence[str]) -> np.ndarray:
        """(n, options) float64, or (options,) of a single prompt: how likely the answer begins with each option.

        An option's probability is the product of its tokens'; these are divided by their sum over the options.
        """
        many = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        tokenizer, family = self.assembly.tokenizer, self.assembly.text.family
        endings = [answer_ids(option, tokenizer, family) for option in options]
        requests, starts = [], []
        for prompt in many:
            request = self.request(0, prompt, max(map(len, endings)))
            start = len(request.ids)
            for ending in endings:
                ids = np.concatenate([request.ids, ending])
                requests.append(replace(request, ids=ids, edges=(*request.edges, start - 1)))
                starts.append(start)
        scores = self.engine.score(requests, starts).reshape(len(many), len(options)).astype(np.float64)
        likely = np.exp(scores - scores.max(axis=1, keepdims=True))
        found = likely / likely.sum(axis=1, keepdims=True)
        return found[0] if isinstance(prompts, Prompt) else found

    def events(
        self, prompts: Iterable[Prompt], options: EvalConfig, seed: int = 0, chunk: int = CHUNK
    ) -> Iterator[Event]:
        """Tokens as they are drawn, `chunk` at most at a time, with the number of their prompt and of the answer."""

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                new = options.max_new_tokens if prompt.new is None else prompt.new
                yield self.request(number, prompt, new)

        key = jax.random.key(seed)
        drawn = Sampling.of(options.temperature, options.top_p, options.repetition_penalty, key)
        return self.engine.run(requests(), options.batch_size, drawn, chunk)

    def _text(self, ids: Sequence[int]) -> str:
        return decode(ids, self.assembly.tokenizer, self.assembly.text.family)

    def written(self, prompt: Prompt, new: int) -> Prompt:
        """The prompt with its ECGs in the text, where ECGs are symbols: whole, unless the context ends before.

        `data.max_len` is no limit here: it is training's (spec/elms.md §4).

        Raises:
            UserError: it does not fit the context beside `new` tokens, however its ECGs are cut.
        """
        spec, tokens, room = self.assembly.signal, self.assembly.signal.tokens, self.assembly.llm.max_len - new
        if tokens is None or not prompt.signals:
            return replace(prompt, rendered=spec.shown.fitted(prompt.rendered, prompt.signals))
        ecgs = [ecg[spec.view] for ecg in prompt.signals]
        rendered = write_prompt(prompt.rendered, ecgs, tokens.least, room)
        if len(rendered.ids) > room:
            raise UserError(
                "eval.max_new_tokens", f"{new} beyond a prompt of {len(rendered.ids)} tokens",
                f"at most the model's context, {self.assembly.llm.max_len}, together",
                "shorten the text, or lower --config.eval.max_new_tokens or --config.data.min_ecg_tokens",
            )  # fmt: skip
        whole = len(prompt.rendered.ids) + sum(len(ecg) - 1 for ecg in ecgs)
        return replace(prompt, rendered=rendered, signals=[], cut=whole - len(rendered.ids))

    def request(self, number: int, prompt: Prompt, new: int) -> Request:
        """What the engine is asked for a prompt."""
        prompt = self.written(prompt, new)
        rendered, context = prompt.rendered, self.assembly.llm.max_len
        if new < 1 or not 0 < len(rendered.ids) <= context - new:
            raise UserError(
                "eval.max_new_tokens", f"{new} beyond a prompt of {len(rendered.ids)} tokens",
                f"a token at least of each, and at most the model's context, {context}, together",
                "lower --config.eval.max_new_tokens",
            )  # fmt: skip
        edges, draws = (rendered.system_end, rendered.signal_end), prompt.draws or (number,)
        return Request(number, rendered.ids, prompt.signals, rendered.signal_positions, edges, new, draws)

    def embeddings(self, request: Request) -> jax.Array:
        """The LLM's inputs (T, D) of all of a prompt."""
        ways, length = self.engine.ways, len(request.ids)
        return self._embedded([Piece(request, 0, length)], ways, length)[0]

    def _embedded(self, pieces: Sequence[Piece], rows: int, width: int) -> jax.Array:
        """The LLM's inputs (rows, width, D) of pieces of prompts, padded on the right."""
        arrays = self._arrays(pieces, rows, width)
        tokens, slot, signals, weights = (jax.tree.map(lambda x: whole_to_device(x, self._rows), x) for x in arrays)
        slots = weights.shape[1]
        self.engine.note(f"embed {rows}x{width}, {slots} ECGs in a row")
        # An encoder takes long to compile: apart, it is compiled once for all widths.
        return self._splice(self.arrays, tokens, slot, self._encode(self.arrays, signals, weights) if slots else None)

    def _arrays(self, pieces: Sequence[Piece], rows: int, width: int) -> tuple[Any, ...]:
        """Tokens and slots (B, P), signals (by view, leaves (B, S, ...)) and their weights (B, S).

        S is a power of two, or 0.
        """
        most = max(len(piece.request.ecgs(piece.begin, piece.end)) for piece in pieces)
        slots = 1 << (most - 1).bit_length() if most else 0
        tokens, signal_slot = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        signals = empty_signals(self.assembly.signal.layout, rows, slots)
        weights = np.zeros((rows, slots), np.float32)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece.ids)] = piece.ids
            ecgs = piece.request.ecgs(piece.begin, piece.end)
            positions = piece.request.places[ecgs.start : ecgs.stop]
            positions = np.where(positions < 0, -1, positions - piece.begin)
            shown = piece.request.signals[ecgs.start : ecgs.stop]
            place_ecgs(signals, weights, (row,), 0, shown, positions, signal_slot[row])
        return tokens, signal_slot, signals, weights

    def _signal_embeddings(self, arrays: Any, signals: Any, weights: Any) -> Any:
        with placed(MeshPlacement(self.mesh)):
            return self.assembly.structure.bind(arrays).signal_embeddings(signals, weights)

    def _inputs(self, arrays: Any, tokens: Any, slot: Any, embeddings: Any) -> Any:
        with placed(MeshPlacement(self.mesh)):
            elm = self.assembly.structure.bind(arrays)
            return elm.llm.embed(tokens, elm.dtype) if embeddings is None else elm.inputs(tokens, slot, embeddings)
