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
from runs import saved_arrays

from elm_jax import cli, pairs
from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config
from elm_jax.data.batch import BatchShape, Group, collate
from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.loader import Loaded, StepSource
from elm_jax.data.plan import Plan
from elm_jax.errors import UserError
from elm_jax.evaluation import pairs as drawing
from elm_jax.evaluation.pairs import draw_pairs
from elm_jax.inference.requests import Piece
from elm_jax.inference.speaker import Answer, Prompt, Speaker
from elm_jax.models.functional import Arrays
from elm_jax.objectives import log_probs
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.scoring.rewards import REWARDS, Answered, register_reward
from elm_jax.symbols.coder import EcgByte
from elm_jax.training import loop
from elm_jax.training.rollouts import Rollouts, _sample, _Scored
from elm_jax.weights.judge import PairJudge

ANSWERS, NEW = 3, 4
WRONG: dict[str, Any] = {}  # by the truth: what its answers are worth in place of their length, or an error
LLM = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 64, "max_len": 256}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "rollouts")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    yield
    REWARDS.pop("of_length", None)
    WRONG.clear()


def table(folder: Path) -> Path:
    """Conversations of two turns about recordings."""
    said = (("user", "Is it regular?"), ("assistant", "regular"), ("user", "How fast is {}?"), ("assistant", "6{}"))
    rows = []
    for i in range(8):
        turns = [{"role": role, "content": text.format(i)} for role, text in said]
        rows.append({"ecg_path": f"demo:train:{i}", "text": turns, "patient_id": i})
    path = folder / "two_turns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward(answered: Answered) -> float:
    found = WRONG.get(answered.truth, len(answered.answer) % 5)
    if isinstance(found, Exception):
        raise found
    return found


def config(folder: Path, elm: str = "mlp_llava", **changes: Any) -> Config:
    usual: dict[str, Any] = {
        "objective": "sapo", "data__names": [str(table(folder))], "data__val_fraction": 0.0, "llm__scratch": LLM,
        "data__max_len": 128, "rl__answers": ANSWERS, "rl__max_new_tokens": NEW, "rl__rewards": ["of_length"],
        "train__batch_size": 2, "train__steps": 4, "train__save_every": 2, "optim__warmup_ratio": 0.0,
    }  # fmt: skip
    if elm == "ecg_byte":
        EcgByte([b"m" * 2**n for n in range(1, 7)]).save(folder / "coder.json")
        usual |= {
            "elm": elm, "update": "llm", "encoder__name": None, "encoder__config": "{}", "data__leads": "II",
            "data__representation": "symbolic", "data__ecg_tokenizer": str(folder / "coder.json"),
            "data__max_len": 1024, "llm__scratch": {**LLM, "max_len": 1024},
        }  # fmt: skip
    register_reward("of_length", reward)
    return runs.config(changes.pop("workdir", folder / "run"), **{**usual, **changes})


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
    # In drawing, a prompt, its ECG with it, is computed once for all its answers.
    lengths = [len(one.prompt.rendered.ids) for one in scored.values()]
    shared = scored[min(scored)].prompt.rendered.system_end
    tokens = sum(len(piece.ids) for piece in computed)
    assert tokens == shared + sum(n - shared for n in lengths)
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
    if elm == "ecg_byte":
        return
    # A record whose reward fails, or is no number, weighs nothing and is named.
    monkeypatch.setitem(WRONG, f"6{places[0]}", ValueError("no truth"))
    monkeypatch.setitem(WRONG, f"6{places[1]}", float("nan"))
    spoiled, _ = rollouts._step(source, 0, arrays)
    bad = {bad.id: bad.error for bad in spoiled.bad}
    ids = [source.dataset.records[i].id for i in places[:2]]
    assert bad.keys() == set(ids)
    assert bad[ids[0]].startswith("the reward: found ValueError: no truth; expected ")
    assert bad[ids[1]].startswith("the reward: found of_length=nan; expected ")
    assert learnt(spoiled, "old") == found[2 * ANSWERS :]


@pytest.mark.slow  # trains for a step, and answers
def test_pairs_are_drawn_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = config(tmp_path, objective="sft", train__steps=1, train__save_every=1)
    assert loop.train(begun)
    out, keys = tmp_path / "pairs.jsonl", ["--config.rl.rewards=('of_length',)", "--config.data.val_fraction=0.0"]
    keys += ["--config.rl.max_new_tokens=4", "--config.rl.temperature=1.0"]
    drawn = ["--checkpoint", str(tmp_path / "run"), *keys]
    assert cli.guard(pairs.main, [*drawn, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and f"{len(rows)} pairs in {out}" in capsys.readouterr().out
    for row in rows:
        (_, before, asked, answer), worse = row["text"], row["rejected"]
        assert before["content"] == "regular" and "How fast" in asked["content"]
        assert len(answer["content"]) % 5 - len(worse) % 5 == row["margin"] > 0
    learnt = config(tmp_path, objective="dpo", data__names=[str(out)], data__max_len=256)
    assert len(assemble(learnt).dataset("train").length_index("none", 0).length) == len(rows)
    WRONG.update({f"6{i}": 1.0 for i in range(8)})
    assert cli.guard(pairs.main, [*drawn, "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "pairs: found none: " in told and "; take other --config.rl.rewards, with partial credit" in told
    # Where all answers are alike, a step learns nothing: neither Adam nor the rate goes on.
    first = saved_arrays(tmp_path / "run", 1)
    policy = config(
        tmp_path, workdir=str(tmp_path / "policy"), init_from=str(tmp_path / "run"), train__steps=2,
        optim__skip_spikes=6.0,
    )  # fmt: skip
    assert loop.train(policy)
    told = capsys.readouterr().err
    assert told.count("all answers to a question were rewarded alike, which teaches nothing") == 1
    assert told.splitlines()[-1] == f"{tmp_path / 'policy'}: done, step 2"
    last = saved_arrays(tmp_path / "policy", 2)
    counts = {name: int(x) for name, x in last.items() if name.endswith(("['count']", "['seen']"))}
    assert any("seen" in name for name in counts) and len(counts) > 1 and not any(counts.values()), counts
    for name in first:
        if name.startswith(("trained", "statistics")):
            np.testing.assert_array_equal(last[name], first[name], err_msg=name)


def test_a_pair_has_what_its_prompt_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The think tag that was given stands in both answers; the truth does not stand before them; a prompt that is too
    long is a bad record."""

    asked_for: list[Prompt] = []

    class Model:
        def __init__(self, config: Config, which: str) -> None:
            self.assembly, self.folder, self.step = assemble(config), "run", 1

        def written(self, prompt: Prompt, new: int) -> Prompt:
            return prompt

        def stream(self, prompts: Iterator[Prompt], options: Any, seed: int) -> Iterator[Answer]:
            for number, prompt in enumerate(prompts):
                asked_for.append(prompt)
                for answer in range(len(prompt.draws or ())):
                    yield Answer(number, "ab"[: 1 + answer], 0.0, 1, True)

    monkeypatch.setattr(drawing, "TrainedModel", Model)
    asked = {"role": "user", "content": "How fast?"}
    rows = [
        [asked, {"role": "assistant", "content": "<think>\nLook.</think>60"}, {"role": "user", "content": "And now?"}],
        [asked, {"role": "assistant", "content": "60"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "How fast? " * 300}, {"role": "assistant", "content": "60"}],
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(
        json.dumps({"ecg_path": f"demo:train:{i}", "text": row, "patient_id": i}) + "\n" for i, row in enumerate(rows)
    ))  # fmt: skip
    usual = {"data__names": [str(path)], "data__explicit_thinking": True, "data__max_bad_records": 0.5}
    made = [one.pair for one in draw_pairs(config(tmp_path, **usual))]
    told = capsys.readouterr().err
    assert "asked.jsonl:2: found a prompt of" in told and "less rl.max_new_tokens" in told
    for row, given in zip(made, ["<think>\n", ""], strict=True):
        assert row["text"] == [asked, {"role": "assistant", "content": f"{given}ab"}]
        assert row["rejected"] == f"{given}a" and row["margin"] == 1
    kept = tmp_path / "kept.jsonl"
    begun = draw_pairs(config(tmp_path, **usual), kept=kept)
    one = next(begun)
    begun.close()
    lines = kept.read_bytes()
    assert lines.count(b"\n") == 2, "what it is, and the one that has come"
    again = lines.splitlines()[1]
    kept.write_bytes(lines + again + b"\n" + again[:-9])  # one that two processes have drawn, and a stop within a line
    asked_for.clear()
    other = config(tmp_path, rl__batch_size=1, eval__limit=1, data__timeout=1.0, **usual)  # which changes no pair
    assert [found.pair for found in draw_pairs(other, kept=kept)] == made and one.pair == made[0]
    assert kept.read_bytes().startswith(lines) and kept.read_bytes().count(b"\n") == 4
    assert len(asked_for) == 1, "the first record is not asked again"
    with pytest.raises(UserError, match="kept.jsonl: found pairs of another run, step, split, judge or config"):
        next(draw_pairs(config(tmp_path, **usual), kept=kept, by="FOLDER"))
    with pytest.raises(UserError, match=r"rl\.max_new_tokens: found 256; expected less than the model's context, 256"):
        next(draw_pairs(config(tmp_path, rl__max_new_tokens=256, **usual)))


def saved(model: Any, folder: Path, tokenizer: Any) -> Path:
    """A folder of Hugging Face's."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow  # PyTorch's import
def test_a_model_of_preferences_judges(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from transformers import (
        DebertaV2Config,
        DebertaV2ForSequenceClassification,
        DebertaV2Model,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|source|>", "<|candidate1|>", "<|candidate2|>"]})
    marks: Any = tokenizer.convert_tokens_to_ids(["<|source|>", "<|candidate1|>", "<|candidate2|>"])
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 1.0,
    }  # fmt: skip
    said = "What is the rate?", "72", "It is slow."
    worth = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes)).eval()
    judge = PairJudge(saved(worth, tmp_path / "worth", tokenizer))
    with torch.no_grad():
        each = [float(worth(**tokenizer(said[0], said[n], return_tensors="pt")).logits) for n in (1, 2)]
    assert judge.margin(*said) == pytest.approx(each[0] - each[1], abs=1e-5) and abs(each[0] - each[1]) > 1e-3

    names = "source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"
    own: dict[str, Any] = {**dict(zip(names, marks, strict=True)), "n_tasks": 2}
    encoder, head = DebertaV2Model(DebertaV2Config(**sizes, **own)).eval(), torch.nn.Linear(32, 16)
    last, folder = torch.nn.Linear(16, 2), saved(encoder, tmp_path / "pairs", tokenizer)
    arrays = {f"pretrained_model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    for place, layer in ((1, head), (4, last)):
        arrays |= {f"head_layer.{place}.{name}": x.detach() for name, x in layer.named_parameters()}
    save_file(arrays, folder / "model.safetensors")

    def ahead(question: str, one: str, other: str) -> float:
        text = f"<|source|>{question}<|candidate1|>{one}<|candidate2|>{other}"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            asked, *answers = (encoder(ids).last_hidden_state[0][ids[0] == mark][0] for mark in marks)
            scores = [last(torch.tanh(head(torch.cat([asked, answer])))).mean() for answer in answers]
        return float(scores[0] - scores[1])

    expected = (ahead(*said) - ahead(said[0], said[2], said[1])) / 2
    assert PairJudge(folder).margin(*said) == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3
    assert PairJudge(folder).margin(said[0], said[2], said[1]) == pytest.approx(-expected, abs=1e-5)
    with pytest.raises(UserError, match="without config.json"):
        PairJudge(tmp_path)
    many = DebertaV2ForSequenceClassification(DebertaV2Config(**{**sizes, "num_labels": 3}))
    with pytest.raises(UserError, match="3 outputs"):
        PairJudge(saved(many, tmp_path / "many", tokenizer))

    long = "It is very slow. " * 400
    assert np.isfinite(judge.margin(said[0], long, "72"))  # more than the 512 positions
    for template in ("{{ raise_exception('no') }}", "{{ nothing.at.all }}"):
        judge._tokenizer.chat_template = template
        with pytest.raises(UserError, match="--judge: found a model that fails at"):
            judge.margin(*said)
    judge._tokenizer.chat_template = None
    whole = judge._tokenizer
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    told = json.loads((tmp_path / "worth" / "tokenizer.json").read_text()) | {"pre_tokenizer": split}
    judge._tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))
    with pytest.raises(UserError, match="--judge: found a model that fails at"):  # a panic of the tokenizer's
        judge.margin("a" * 40 + "!", *said[1:])
    judge._tokenizer = whole
    with torch.no_grad():
        judge._model.classifier.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="--judge: found .* nan better; expected a finite number"):
        judge.margin(*said)

    claims: dict[str, Any] = {
        "vocab_size": 10**12, "hidden_size": 10**6, "max_position_embeddings": 10**12, "num_hidden_layers": 10**9,
        "n_tasks": 10**11, "num_labels": 10**9, "hidden_act": 3, "layer_norm_eps": "x",
    }  # fmt: skip
    for where in (folder, tmp_path / "worth"):
        whole = (where / "config.json").read_text()
        for name, claim in claims.items():
            if where == folder or name != "n_tasks":
                (where / "config.json").write_text(json.dumps({**json.loads(whole), name: claim}))
                with pytest.raises(UserError, match=r"--judge: found .*config.json|which cannot be read"):
                    PairJudge(where)
        with (where / "pytorch_model.bin").open("wb") as beside:  # which is not read
            beside.truncate(10**10)
        (where / "config.json").write_text(json.dumps({**json.loads(whole), "vocab_size": 10**7}))
        with pytest.raises(UserError, match=r"--judge: found .*config.json asks for \d+ numbers"):
            PairJudge(where)
        (where / "config.json").write_text(whole)
        PairJudge(where)
        (where / "model.safetensors").write_bytes((where / "model.safetensors").read_bytes()[:-9])
        with pytest.raises(UserError, match=r"--judge: found .*, which cannot be read"):
            PairJudge(where)
