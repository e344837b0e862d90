"""Answers of one prompt: the prompt is computed once, in drawing and in learning, and probabilities are those of a
forward pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config
from elm_jax.data.batch import BatchShape, Group, collate
from elm_jax.data.loader import Loaded, StepSource
from elm_jax.data.plan import Plan
from elm_jax.errors import UserError
from elm_jax.inference.requests import Piece
from elm_jax.inference.speaker import Speaker
from elm_jax.models.functional import Arrays
from elm_jax.objectives import log_probs
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.scoring.rewards import REWARDS, register_reward
from elm_jax.symbols.coder import EcgByte
from elm_jax.training import loop
from elm_jax.training.rollouts import Rollouts, _sample, _Scored

ANSWERS, NEW = 3, 4
LLM = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 64, "max_len": 256}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "rollouts")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    yield
    for name in {"of_length", "broken", "unending"} & set(REWARDS):
        del REWARDS[name]


def table(folder: Path) -> Path:
    """Conversations of two turns about recordings."""
    said = ["Is it regular?", "regular", "How fast does number {} beat?", "6{}"]
    rows = []
    for i in range(8):
        turns = [{"role": role, "content": text.format(i)} for role, text in zip(("user", "assistant") * 2, said)]
        rows.append({"ecg_path": f"demo:train:{i}", "text": turns, "patient_id": i})
    path = folder / "two_turns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, elm: str = "mlp_llava", **changes: Any) -> Config:
    usual: dict[str, Any] = {
        "objective": "sapo", "data__names": [str(table(folder))], "data__val_fraction": 0.0, "llm__scratch": LLM,
        "data__max_len": 128, "rl__answers": ANSWERS, "rl__max_new_tokens": NEW, "rl__rewards": ["of_length"],
        "train__batch_size": 2, "train__steps": 4, "train__save_every": 4, "optim__warmup_ratio": 0.0,
    }  # fmt: skip
    if elm == "ecg_byte":
        EcgByte([b"m" * 2**n for n in range(1, 7)]).save(folder / "coder.json")
        usual |= {
            "elm": elm, "update": "llm", "encoder__name": None, "encoder__config": "{}", "data__leads": "II",
            "data__representation": "symbolic", "data__ecg_tokenizer": str(folder / "coder.json"),
            "data__max_len": 1024, "llm__scratch": {**LLM, "max_len": 1024},
        }  # fmt: skip
    register_reward("of_length", lambda answered: len(answered.answer) % 5)
    return runs.config(folder / "run", **{**usual, **changes})


def ready(made: Config) -> tuple[Assembly, Arrays, StepSource, Rollouts]:
    assembly, mesh = assemble(made), make_mesh(made.mesh, jax.devices()[:1])
    arrays = Weights(assembly).place(array_shardings(assembly.structure, mesh))
    dataset = assembly.dataset("train")
    plan = Plan(dataset.length_index("none", 0), rows=2, max_len=made.data.max_len or 0, pack=True, seed=0)
    return assembly, arrays, StepSource(dataset, plan, steps=2), Rollouts(assembly, mesh)


def learnt(loaded: Loaded, name: str) -> list[list[float]]:
    """Numbers of each answer's tokens, in the order of the rows."""
    batch, found = jax.tree.map(lambda x: np.asarray(x)[0], loaded.batch), []
    for row in range(len(batch.tokens)):
        mine = batch.target_weights[row] > 0
        for sample in dict.fromkeys(batch.target_sample[row][mine].tolist()):
            found.append(batch.extras[name][row][mine & (batch.target_sample[row] == sample)].tolist())
    return found


def alone(assembly: Assembly, arrays: Arrays, answers: Sequence[tuple[_Scored, list[int]]]) -> list[np.ndarray]:
    """The log probabilities of the tokens of answers, each in a row that has nothing else."""
    samples = [_sample(one.sample, one.prompt, ids, {}) for one, ids in answers]
    shape = BatchShape(assembly.config.data.max_len or 0, 1, NEW)
    rows = collate([[Group(0, [sample])] for sample in samples], shape, assembly.signal.layout)

    def found(arrays: Arrays) -> jax.Array:
        model = assembly.structure.bind(arrays)
        return log_probs(model.llm, model.hidden(rows), rows, assembly.objective.temperature)

    return [x[: len(ids)] for x, (_, ids) in zip(np.asarray(jax.jit(found)(arrays)), answers, strict=True)]


@pytest.mark.slow  # compiles a model's answers
@pytest.mark.parametrize("elm", ["mlp_llava", "ecg_byte"])
def test_a_prompt_is_computed_once_and_its_answers_are_as_likely_as_alone(
    elm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Piece] = []
    embedded = Speaker._embedded

    def note(self: Speaker, pieces: Sequence[Piece], rows: int, width: int) -> jax.Array:
        computed.extend(pieces)
        return embedded(self, pieces, rows, width)

    monkeypatch.setattr(Speaker, "_embedded", note)
    made = config(tmp_path, elm)
    assembly, arrays, source, rollouts = ready(made)
    loaded, scored = rollouts._step(source, 0, arrays)
    assert len(scored) >= 2
    # In drawing, all but the last token of a prompt, its ECG among them, is computed for the first answer alone.
    lengths = [len(one.prompt.rendered.ids) for one in scored.values()]
    shared = scored[min(scored)].prompt.rendered.system_end
    tokens = sum(len(piece.ids) for piece in computed)
    assert tokens == shared + sum(n - 1 - shared + ANSWERS for n in lengths)
    ecgs = sum(len(piece.request.ecgs(piece.begin, piece.end)) for piece in computed)
    assert ecgs == (0 if elm == "ecg_byte" else len(scored))
    # So it is in learning.
    answered = sum(len(ids) for one in scored.values() for ids in one.answers)
    assert int((loaded.batch.group_ids > 0).sum()) == sum(lengths) + answered
    # Of two turns the last is answered, behind the true first one.
    for one in scored.values():
        before = assembly.tokenizer.decode(one.prompt.rendered.ids)
        assert one.truth == f"6{one.sample}" and before.count("regular") == 2
    # In the order of the rows:
    places = [i for row in source.plan.rows(0) for group in row for i in group.samples]
    expected = alone(assembly, arrays, [(scored[i], ids) for i in places for ids in scored[i].answers])
    found = learnt(loaded, "old")
    assert [len(one) for one in found] == [len(one) for one in expected]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-5)
