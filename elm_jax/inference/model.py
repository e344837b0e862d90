"""A trained model, ready to answer: a run folder's weights on a mesh, and batched generation from prompts.

Dimension letters: B prompts, P prompt tokens, S signal slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.assemble import Assembly, assemble, make_arrays
from elm_jax.config import Config, EvalConfig
from elm_jax.data.batch import Signal, empty_signals, put_signal
from elm_jax.data.chat import Rendered, decode, stop_ids
from elm_jax.data.ecg_tokens import write_prompt
from elm_jax.errors import UserError
from elm_jax.inference.generate import bucket, generate
from elm_jax.models.hints import placed
from elm_jax.runtime.checkpoint import Checkpoints
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, batch_ways, check_heads, make_mesh, replicated
from elm_jax.training import run
from elm_jax.training.state import array_shardings


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt with its ECGs as the run's `SignalSpec` loads them."""

    rendered: Rendered
    signals: Sequence[Signal]


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
        self._llm = self.assembly.structure.bind(arrays).llm
        self._embed = jax.jit(self._inputs, out_shardings=self._rows)

    def answers(
        self, prompts: Sequence[Prompt], options: EvalConfig, size: int | None = None, seed: int = 0
    ) -> list[str]:
        """The model's answers, one per prompt. `size`: prompts are filled up to so many, so that shapes recur."""
        prompts = [self.written(prompt, options.max_new_tokens) for prompt in prompts]
        size = -(-max(size or 0, len(prompts)) // batch_ways(self.mesh)) * batch_ways(self.mesh)
        ids = self._generate(prompts, size, options, seed)
        return [
            decode(row, self.assembly.tokenizer, self.assembly.text.family) for row in ids[: len(prompts)]
        ]

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

    def _generate(self, prompts: Sequence[Prompt], size: int, options: EvalConfig, seed: int) -> np.ndarray:
        arrays = self._arrays(prompts, size, options.max_new_tokens)
        on_devices = [jax.tree.map(lambda leaf: jax.device_put(leaf, self._rows), x) for x in arrays]
        with placed(MeshPlacement(self.mesh)):
            embeddings = self._embed(self.arrays, *on_devices[1:])
            ids = generate(
                self._llm, inputs_embeds=embeddings, attention_mask=on_devices[0],
                max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
                eos_ids=self.stops, key=jax.random.key(seed),
            )  # fmt: skip
        return np.asarray(jax.device_put(ids, replicated(self.mesh)))

    def _arrays(self, prompts: Sequence[Prompt], size: int, new: int) -> tuple[Any, ...]:
        """Mask, tokens, slots (B, P), signals (leaves (B, S, ...)), their weights (B, S); left-padded."""
        longest = max(len(p.rendered.ids) for p in prompts)
        if longest + new > self.assembly.llm.max_len:
            raise UserError(
                "eval.max_new_tokens", f"{new} beyond a prompt of {longest} tokens",
                f"at most the model's context, {self.assembly.llm.max_len}, together",
                "lower --config.eval.max_new_tokens",
            )  # fmt: skip
        width = bucket(longest)
        slots = max(1, max(len(p.signals) for p in prompts))
        mask, tokens = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
        signal_slot = np.full((size, width), -1, np.int32)
        signals = empty_signals(self.assembly.signal.layout, size, slots)
        weights = np.zeros((size, slots), np.float32)
        for row, prompt in enumerate(prompts):
            ids, positions = prompt.rendered.ids, prompt.rendered.signal_positions
            start = width - len(ids)
            mask[row, start:], tokens[row, start:] = 1, ids
            signal_slot[row, start + positions.reshape(-1)] = np.arange(positions.size)
            for slot, signal in enumerate(prompt.signals):
                put_signal(signals, (row, slot), signal)
                weights[row, slot] = 1
        return mask, tokens, signal_slot, signals, weights

    def _inputs(self, arrays: Any, tokens: Any, slot: Any, signals: Any, weights: Any) -> jax.Array:
        with placed(MeshPlacement(self.mesh)):
            elm = self.assembly.structure.bind(arrays)
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
