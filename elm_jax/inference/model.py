"""A trained model, ready to answer: a run folder's weights on a mesh, and batched generation from prompts.

Dimension letters: B prompts, P prompt tokens, S signal slots, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.assemble import Assembly, assemble, make_arrays
from elm_jax.config import Config, EvalConfig
from elm_jax.data.batch import Signal, empty_signals, put_signal
from elm_jax.data.chat import Rendered, answer_ids, decode, stop_ids
from elm_jax.data.ecg_tokens import write_prompt
from elm_jax.errors import UserError
from elm_jax.inference.engine import CHUNK, Engine, Options
from elm_jax.inference.requests import Event, Piece, Request
from elm_jax.models.hints import placed
from elm_jax.runtime.checkpoint import Checkpoints
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, batch_ways, check_heads, make_mesh
from elm_jax.training import run
from elm_jax.training.state import array_shardings


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt with its ECGs as the run's `SignalSpec` loads them."""

    rendered: Rendered
    signals: Sequence[Signal]


class Answer(NamedTuple):
    """An answer of `TrainedModel.stream`: the prompt's number, the text, seconds in the model, tokens drawn.

    `seconds` are those from the prompt's turn to its end, of which others had their share.
    """

    number: int
    text: str
    seconds: float
    tokens: int


class TrainedModel:
    """The model of the run folder `config.workdir`, laid out on `config.mesh`.

    Args:
        which: `latest`, `best` (else latest) or a step.
    Raises:
        UserError: no checkpoint, or weights that are not the run's.
    """

    def __init__(self, config: Config, which: str = "best") -> None:
        self.config, self.folder = config, Path(config.workdir)
        self.mesh = make_mesh(config.mesh)
        self.assembly: Assembly = assemble(config, self.folder / "tokenizer")
        check_heads(self.mesh, self.assembly.llm)
        self.step, arrays = self._load(which)
        self.arrays = arrays
        self.stops = stop_ids(self.assembly.tokenizer, self.assembly.text.family)
        self._embed = jax.jit(self._inputs, out_shardings=self._rows)
        llm = self.assembly.structure.bind(arrays).llm
        ways = batch_ways(self.mesh)
        self._engine = Engine(llm, self._embedded, self.stops, MeshPlacement(self.mesh), ways)

    def answers(self, prompts: Sequence[Prompt], options: EvalConfig, seed: int = 0) -> list[str]:
        """The model's answers, one per prompt, in their order; see `stream`."""
        found = {answer.number: answer.text for answer in self.stream(prompts, options, seed)}
        return [found[number] for number in range(len(prompts))]

    def stream(self, prompts: Iterable[Prompt], options: EvalConfig, seed: int = 0) -> Iterator[Answer]:
        """Answers as they are finished. Prompts are read as rows become free, twice `options.batch_size` ahead.

        Where answers are drawn (`options.temperature`), a prompt's depends on the seed and the prompt's number, not
        on the others.

        Raises:
            UserError: a prompt does not fit the context beside `options.max_new_tokens`.
        """
        tokens: dict[int, list[int]] = {}
        for event in self._events(prompts, options, seed):
            tokens.setdefault(event.number, []).extend(event.tokens)
            if event.seconds is not None:
                ids = tokens.pop(event.number)
                yield Answer(event.number, self._text(ids), event.seconds, len(ids))

    def spoken(self, prompt: Prompt, options: EvalConfig, seed: int = 0) -> Iterator[str]:
        """One answer in pieces, as it comes. Their sum is the answer."""
        ids: list[int] = []
        said = ""
        for event in self._events([prompt], options, seed, chunk=1):
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
            request = self._request(0, prompt, max(map(len, endings)))
            start = len(request.ids)
            for ending in endings:
                ids = np.concatenate([request.ids, ending])
                requests.append(replace(request, ids=ids, edges=(*request.edges, start - 1)))
                starts.append(start)
        scores = self._engine.score(requests, starts).reshape(len(many), len(options)).astype(np.float64)
        likely = np.exp(scores - scores.max(axis=1, keepdims=True))
        found = likely / likely.sum(axis=1, keepdims=True)
        return found[0] if isinstance(prompts, Prompt) else found

    def _events(
        self, prompts: Iterable[Prompt], options: EvalConfig, seed: int, chunk: int = CHUNK
    ) -> Iterator[Event]:
        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                yield self._request(number, prompt, options.max_new_tokens)

        drawn = Options(options.temperature, options.top_p, options.repetition_penalty, seed)
        return self._engine.run(requests(), options.batch_size, drawn, chunk)

    def _text(self, ids: Sequence[int]) -> str:
        return decode(ids, self.assembly.tokenizer, self.assembly.text.family)

    def written(self, prompt: Prompt, new: int) -> Prompt:
        """The prompt with its ECGs in the text, where ECGs are symbols.

        Raises:
            UserError: it does not fit the context beside `new` tokens, however its ECGs are cut.
        """
        tokens, room = self.assembly.signal.tokens, self.assembly.llm.max_len - new
        if tokens is None or not prompt.signals:
            return prompt
        ecgs = cast(Sequence[np.ndarray], prompt.signals)
        rendered = write_prompt(prompt.rendered, ecgs, tokens.least, min(self.config.data.max_len, room))
        if len(rendered.ids) > room:
            raise UserError(
                "eval.max_new_tokens", f"{new} beyond a prompt of {len(rendered.ids)} tokens",
                f"at most the model's context, {self.assembly.llm.max_len}, together",
                "shorten the text, or lower --config.eval.max_new_tokens or --config.data.min_ecg_tokens",
            )  # fmt: skip
        return Prompt(rendered, [])

    def _request(self, number: int, prompt: Prompt, new: int) -> Request:
        """What the engine is asked for a prompt."""
        prompt = self.written(prompt, new)
        rendered, context = prompt.rendered, self.assembly.llm.max_len
        if not 0 < len(rendered.ids) <= context - new:
            raise UserError(
                "eval.max_new_tokens", f"{new} beyond a prompt of {len(rendered.ids)} tokens",
                f"a prompt with a token, and at most the model's context, {context}, together",
                "lower --config.eval.max_new_tokens",
            )  # fmt: skip
        edges = (rendered.system_end, rendered.signal_end)
        return Request(number, rendered.ids, prompt.signals, rendered.signal_positions, edges, new)

    def _embedded(self, pieces: Sequence[Piece], rows: int, width: int) -> jax.Array:
        """The LLM's inputs (rows, width, D) of pieces of prompts, padded on the right."""
        arrays = self._arrays(pieces, rows, width)
        on_devices = [jax.tree.map(lambda leaf: jax.device_put(leaf, self._rows), x) for x in arrays]
        return self._embed(self.arrays, *on_devices)

    def _arrays(self, pieces: Sequence[Piece], rows: int, width: int) -> tuple[Any, ...]:
        """Tokens and slots (B, P), signals (leaves (B, S, ...)) and their weights (B, S); S is a power of two, or 0."""
        most = max(len(piece.request.ecgs(piece.begin, piece.end)) for piece in pieces)
        slots = 1 << (most - 1).bit_length() if most else 0
        tokens, signal_slot = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        signals = empty_signals(self.assembly.signal.layout, rows, slots)
        weights = np.zeros((rows, slots), np.float32)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece.ids)] = piece.ids
            ecgs = piece.request.ecgs(piece.begin, piece.end)
            positions = piece.request.places[ecgs.start : ecgs.stop] - piece.begin
            signal_slot[row, positions.reshape(-1)] = np.arange(positions.size)
            for slot, ecg in enumerate(ecgs):
                put_signal(signals, (row, slot), piece.request.signals[ecg])
                weights[row, slot] = 1
        return tokens, signal_slot, signals, weights

    def _inputs(self, arrays: Any, tokens: Any, slot: Any, signals: Any, weights: Any) -> jax.Array:
        with placed(MeshPlacement(self.mesh)):
            elm = self.assembly.structure.bind(arrays)
            if not weights.shape[1]:
                return elm.llm.embed(tokens, elm.dtype)
            return elm.inputs(tokens, slot, elm.signal_embeddings(signals, weights))

    @property
    def _rows(self) -> jax.sharding.NamedSharding:
        return batch_sharding(self.mesh, micro_batches=False)

    def _load(self, which: str) -> tuple[int, dict[str, jax.Array]]:
        checkpoints = Checkpoints(self.folder, read_only=True)
        step = checkpoints.find(which)
        if step is None:
            raise UserError(str(self.folder), "no checkpoint", "a trained run", "train it first")
        structure = self.assembly.structure
        shardings = array_shardings(structure, self.mesh)
        like = structure.abstract(shardings)
        restored, inherited = checkpoints.restore_arrays(step, like), run.inherited(self.folder, like)
        saved = checkpoints.meta(step)["frozen"]
        checkpoints.close()
        frozen = inherited | make_arrays(self.assembly, shardings, known={*restored, *inherited})
        run.check_frozen(str(self.folder), saved, frozen, set(saved))
        compute = jnp.dtype(self.config.llm.compute_dtype)
        # What is multiplied in the compute dtype is kept in it; norms and statistics stay as they are.
        cast = {n: x.astype(compute) if n.endswith((".kernel", ".table")) else x for n, x in restored.items()}
        return step, {**frozen, **cast}
