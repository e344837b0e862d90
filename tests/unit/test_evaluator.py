"""The controls and the blind baselines that stand beside a score, and records that cannot be evaluated."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_model import RATE, SECONDS, Asked, fake_config
from texts import write_records

from elm_jax.config import Config
from elm_jax.data.sources import Record
from elm_jax.ecg.beats.measurements import measure
from elm_jax.ecg.beats.words import describe
from elm_jax.ecg.synthetic import synthesize
from elm_jax.errors import UserError
from elm_jax.evaluation import controls, evaluator
from elm_jax.evaluation.controls import Question, kept_ecgs, shuffled_records
from elm_jax.evaluation.evaluator import evaluate, is_evaluated, results_folder
from elm_jax.evaluation.results import asked_with, summary
from elm_jax.keys import JudgeConfig
from elm_jax.scoring.metrics import Scorer, is_right
from elm_jax.scoring.summary import scores_of


def shuffled(records: list[Record], **options: Any) -> dict[int, tuple[str, ...]]:
    """Record -> the paths of the ECGs that it is asked about."""
    given = shuffled_records(dataset_of(records), **options)
    return {i: records[other].ecg_paths for i, other in given.items()}


def dataset_of(records: list[Record]) -> Any:
    return SimpleNamespace(records=records)


def record(i: int, *paths: str, name: str = "kind", patient: str | None = None) -> Record:
    return Record(paths, None, name, patient or f"p{i}", f"set:{i}", 0)


def test_shuffling_gives_every_question_the_recording_of_another_patient() -> None:
    # Three questions a recording; patients have one recording or two.
    records = [record(i, f"{i // 3}.npy", patient=f"p{min(i // 3, 4)}") for i in range(18)]
    records += [record(i, f"{i}.npy", name="other") for i in range(18, 26)]
    records += [record(i, f"{i}a.npy", f"{i}b.npy") for i in range(26, 30)]
    owner = {r.ecg_paths: (r.patient, r.name) for r in records}
    given = shuffled(records)
    assert sorted(given) == list(range(len(records)))
    for i, paths in given.items():
        patient, name = owner[paths]
        assert patient != records[i].patient and name == records[i].name
        assert len(paths) == len(records[i].ecg_paths)
    # Questions about one recording get one other recording, and each is given as often as it was asked about.
    assert len({given[i] for i in (0, 1, 2)}) == 1
    assert set(Counter(given[i] for i in range(18)).values()) == {3}


def test_shuffling_keeps_how_frequent_noise_and_flat_lines_are() -> None:
    kinds = ["noise", "flatline", "x"] * 200
    records = [record(i, kind if kind != "x" else f"{i}.npy") for i, kind in enumerate(kinds)]
    given = shuffled(records)
    after = Counter(path if path in kinds else "x" for (path,) in given.values())
    assert after == Counter(kinds)
    kept = np.mean([given[i] == (kinds[i],) for i in given if kinds[i] != "x"])
    assert 0.2 < kept < 0.47  # as often as chance has it: a third


def test_one_recording_alone_stays_as_it_is() -> None:
    assert shuffled([record(0, "a.npy")]) == {0: ("a.npy",)}


def test_a_kind_of_one_patient_is_given_the_ecgs_of_other_kinds() -> None:
    distinct = [record(i, f"{i}.npy", name=f"row {i}") for i in range(10)]
    given = shuffled(distinct)
    assert all(given[i] != (f"{i}.npy",) for i in range(10)), "a name for each row"
    assert Counter(given.values()) == Counter(r.ecg_paths for r in distinct), "each is given once"
    lonely = [*(record(i, f"{i}.npy") for i in range(6)), record(6, "6.npy", name="rare", patient="p6")]
    lonely += [record(7, "7a.npy", "7b.npy"), record(8, "8.npy", name="rare", patient="p6")]
    given = shuffled(lonely)
    assert {given[6][0], given[8][0]} <= {f"{i}.npy" for i in range(6)}, "rather another patient than another ECG"
    assert given[7] == ("7a.npy", "7b.npy"), "the only one of two ECGs"
    assert {given[i][0] for i in range(6)} == {f"{i}.npy" for i in range(6)}, "what is frequent stays among its own"


def test_ecgs_that_could_not_be_shuffled_are_counted() -> None:
    pairs = [record(i, "b.npy", f"{i}.npy", patient=f"x+{i}") for i in (1, 2)]
    dataset = dataset_of([record(0, "a.npy"), *pairs])
    asked = [Question(record, turn, "yes") for record, turn in ((0, 0), (0, 1), (1, 0), (2, 0))]
    found = kept_ecgs(dataset, shuffled_records(dataset), asked)
    assert found == {"answers": 4, "own_ecg": 2, "same_patient": 2}
    many = dataset_of([record(i, f"{i}.npy", name=str(i)) for i in range(4)])
    none = kept_ecgs(many, shuffled_records(many), [Question(i, 0, "") for i in range(4)])
    assert none == {"answers": 4, "own_ecg": 0, "same_patient": 0}


def test_a_summary_has_a_column_for_each_control_and_baseline() -> None:
    predictions = [
        {"id": str(i), "name": "heart_rate", "patient": str(i), "answer": "60", "truth": str(60 + 10 * (i % 2))}
        for i in range(20)
    ]
    results = scores_of(Scorer().table(predictions))
    results |= {"asked_with": asked_with(Config()), "unfinished_answers": 0, "cut_ecgs": 0}
    results["controls"] = {"zeros": {"exact_match": {"value": 0.25, "ci95": [0, 1]}}}
    lines = summary(results).splitlines()
    assert lines[0].split() == ["score", "zeros", "constant", "majority"]
    exact = next(line for line in lines if line.startswith("exact_match")).split()
    assert exact == ["exact_match", "0.500", "0.250", "0.500", "0.500"]
    results["shuffled_ecgs"] = {"answers": 60, "own_ecg": 0, "same_patient": 0}
    assert summary(results).splitlines() == lines
    results["shuffled_ecgs"] |= {"own_ecg": 3, "same_patient": 6}
    told = summary(results).splitlines()[-1]
    assert "of 60 answers 3 are about the question's own ECG and 6 about another one of the same patient" in told
    results |= {"unfinished_answers": 2, "cut_ecgs": 1, "empty_answers_left_out": 5}
    results["asked_with"]["perturb"] = "noise"
    told = "\n".join(summary(results).splitlines()[-4:])
    for what in ("the model was not shown the ECGs", "2 answers were cut off at 128 tokens", "1 questions", "5 empty"):
        assert what in told


def test_only_some_records_may_take_part_in_shuffling() -> None:
    records = [record(i, f"{i}.npy") for i in range(12)]
    given = shuffled(records, among=range(0, 12, 2))
    assert sorted(given) == list(range(0, 12, 2))
    assert {path for (path,) in given.values()} == {f"{i}.npy" for i in range(0, 12, 2)}


def test_recordings_of_one_patient_are_given_to_each_other() -> None:
    records = [record(i, f"{i // 2}.npy", patient="one") for i in range(6)]
    given = shuffled(records)
    assert all(given[i] != (f"{i // 2}.npy",) for i in range(6))
    assert {path for (path,) in given.values()} == {"0.npy", "1.npy", "2.npy"}


Ask = Callable[..., Asked]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """ask(context, ...): the model and its questions, one each about eight recordings; ecg_5 is damaged."""
    for i in range(8):
        np.save(tmp_path / f"ecg_{i}.npy", np.random.default_rng(i).normal(size=(12, SECONDS * RATE)))
    (tmp_path / "ecg_5.npy").write_bytes(b"no array")
    texts: list[Any] = [["x", "Is the rhythm regular?", ["yes" if i % 2 else "no"]] for i in range(8)]
    texts[2] = ["x", "Is it? " * 80, ["yes"]]
    write_records(tmp_path, texts, [f"ecg_{i}.npy" for i in range(8)], split="test")

    def make(context: int = 512, **keys: Any) -> Asked:
        data = {"data__names": ["records.jsonl"], "data__root": str(tmp_path), "log__progress": False}
        config = fake_config(**{**data, "workdir": str(tmp_path / "run"), "eval__batch_size": 3, **keys})
        model = Asked(config, context)
        monkeypatch.setattr(evaluator, "TrainedModel", lambda *_: model)
        return model

    return make


def results(config: Config) -> dict[str, Any]:
    return json.loads((results_folder(config, "test") / "metrics.json").read_text())


def test_bad_records_are_named_counted_and_left_out_of_every_score(
    ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ask(context=128, data__max_bad_records=0.3)
    evaluate(model.config)
    found = results(model.config)
    assert found["bad"] == 2 and found["n"] == 6 and found["metrics"]["exact_match"]["value"] == 3 / 6
    assert set(found["controls"]) == {"zeros", "noise", "text_only", "shuffled"} and is_evaluated(model.config, "test")
    assert not is_evaluated(replace(model.config, eval=replace(model.config.eval, labels="ptbxl")), "test")
    errors = capsys.readouterr().err
    assert "left out: record records.jsonl:2: found a prompt of " in errors
    assert "left out: record records.jsonl:5: " in errors and "ecg_5.npy" in errors
    assert len(model.prompts) == 6 * (1 + 3 + evaluator.SHUFFLES)
    (results_folder(model.config, "test") / "report.html").unlink()
    assert not is_evaluated(model.config, "test"), "a stop before the report was written"


@pytest.mark.parametrize(
    ("context", "who", "why"), [(128, 2, "eval.max_new_tokens"), (1024, 5, "ecg_5.npy")], ids=["length", "recording"]
)
def test_one_bad_record_too_many_is_an_error(ask: Ask, context: int, who: int, why: str) -> None:
    model = ask(context)
    with pytest.raises(UserError, match=rf"record records.jsonl:{who}: .*data.max_bad_records") as caught:
        evaluate(model.config)
    assert why in str(caught.value)
    assert who == 5 or not model.prompts, "lengths are known before anything is generated"
    assert not (results_folder(model.config, "test") / "metrics.json").exists()


def test_scores_are_there_before_the_controls_are_run(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ask(data__max_bad_records=0.3)
    monkeypatch.setattr(controls, "shuffled_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model.config)
    assert results(model.config)["metrics"]["exact_match"]["value"] == 4 / 7
    assert (results_folder(model.config, "test") / "examples.png").is_file()
    assert not is_evaluated(model.config, "test"), "a restart runs it again"


def test_folds_are_evaluated_with_one_model_and_what_training_saw_of_them_is_said(ask: Ask, tmp_path: Path) -> None:
    splits = ["fold1_test", "fold1_test", "fold1_train", "fold2_test", "fold2_test", "fold2_test", "fold1_train"]
    rows = [
        {"ecg_path": f"ecg_{i if i < 5 else 0}.npy", "text": ["x", "Is it?", ["yes" if i < 4 else "no"]], "name": "x",
         "patient_id": f"p{2 if i == 3 else i}", "split": split}
        for i, split in enumerate(splits)
    ]  # fmt: skip
    (tmp_path / "folds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"eval__controls": ["zeros"], "eval__protocol": "elm-2026-08", "data__val_fraction": 0.0}
    model = ask(data__names=["folds.jsonl"], eval__folds=[1, 2], **keys)
    out = evaluate(model.config)
    found = json.loads((out / "metrics.json").read_text())
    assert [(run["fold"], run["n"]) for run in found["runs"]] == [(1, 2), (2, 3)]
    assert found["metrics"]["exact_match"]["value"] == pytest.approx((1 + 1 / 3) / 2), "the mean over folds"
    assert found["over_runs"]["exact_match"]["std"] == pytest.approx((2 / 3) / 2**0.5)
    assert found["questions_about_training_patients"] == 1, "patient 2 is in the training records of fold 1"
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["fold"] for line in lines) == [1, 1, 2, 2, 2] and len(model.prompts) == 10
    assert {"id", "prompt", "answer", "truth", "seconds"} <= set(lines[0])


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["demo"], "demo-test"),
        (["demo:train=8,val=4,test=2"], "demo-test"),
        (["ecg_qa.parquet", "reports.jsonl"], "ecg_qa_reports-test"),
        (["ecg_qa/test.parquet"], "test-test"),
        (["/data/prepared/ecg_qa.parquet"], "ecg_qa-test"),
    ],
)
def test_an_evaluation_is_called_as_its_files_and_split_are(names: list[str], folder: str) -> None:
    config = fake_config(data__names=names, data__root="/data/prepared", workdir="run")
    assert results_folder(config, "test") == Path("run/eval") / folder


def test_an_evaluation_is_told_by_what_it_always_was() -> None:
    """With another key, or one less, all that was evaluated before would be set aside and asked anew."""
    config, drawn = Config(), {"batch_size", "folds", "limit", "max_new_tokens", "repetition_penalty", "temperature"}
    config = replace(config, data=replace(config.data, prefixes={"/old": "/new"}), eval=replace(config.eval, ema=True))
    model = SimpleNamespace(config=config, step=7, arrays={"a": np.zeros(1, np.float32)})
    found = evaluator._identity(model, "test", [])  # type: ignore[arg-type]
    assert set(found) == {"asked", "step", "weights", "split", "records", "config", "eval"}
    assert set(found["eval"]) == {*drawn, "top_p"}
    assert {part: set(x) for part, x in found["config"].items() if isinstance(x, dict)} == {
        "data": {
            "ecg_tokenizer", "explicit_thinking", "fold", "leads", "max_len", "min_ecg_tokens", "names", "norm_eps",
            "normalize", "outside_root", "perturb", "representation", "root", "sampling_rate", "segment_len",
            "system_prompt",
        },
        "llm": {
            "attention", "chat", "compute_dtype", "dropout", "lora", "name", "param_dtype", "remat", "scan", "scratch",
        },
        "mesh": {"data", "fsdp", "tensor"},
    }  # fmt: skip
    masked = replace(config, data=replace(config.data, missing="mask"))
    other = SimpleNamespace(config=masked, step=7, arrays=model.arrays)
    assert evaluator._identity(other, "test", [])["config"]["data"]["missing"] == "mask"  # type: ignore[arg-type]
    averaged = SimpleNamespace(config=config, step=7, arrays={"a": np.ones(1, np.float32)})
    assert evaluator._identity(averaged, "test", [])["weights"] != found["weights"]  # type: ignore[arg-type]


def test_nothing_to_ask_is_an_error(ask: Ask) -> None:
    model = ask(data__max_bad_records=0.3, eval__limit=1)
    Path(model.config.data.root, "ecg_0.npy").unlink()
    with pytest.raises(UserError, match="no question"):
        evaluate(model.config)


def test_what_counts_as_right_depends_on_the_question() -> None:
    assert is_right("heart_rate", "about 62 bpm", "60") and not is_right("heart_rate", "70", "60")
    assert is_right("signal_type", "ECG", "ecg") and not is_right("other", "60", "62")
    assert is_right("other", "<think>so</think> yes", "Yes.")


def test_answers_are_held_against_what_is_measured_of_the_questions_own_ecg(ask: Ask, tmp_path: Path) -> None:
    keys = {"data__sampling_rate": 250, "data__segment_len": 2500, "data__max_bad_records": 0.3}
    model = ask(context=256, eval__grounding=["all"], eval__controls=["zeros", "shuffled"], **keys)
    signals = [synthesize((5, i), 250.0, 2500) for i in range(8)]
    for i in (0, 1, 3, 4, 6, 7):
        np.save(tmp_path / f"ecg_{i}.npy", signals[i])
    told = {f"Is the rhythm regular {i}?": describe(measure(signals[i], 250.0)) for i in range(8)}
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for (question, _), row in zip(told.items(), rows, strict=True):
        row["text"] = ["x", question, ["yes"]]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model.reply = lambda prompt: next(text for asked, text in told.items() if asked in prompt.rendered.prompt)
    evaluate(model.config)
    found = results(model.config)
    whole = {"value": 1.0, "ci95": [1.0, 1.0]}
    assert found["metrics"]["grounding.precision"] == found["metrics"]["grounding.recall"] == whole
    assert found["controls"]["zeros"]["grounding.precision"]["value"] == 1.0, "the question's own ECG's"
    assert found["grounding"]["kinds"]["rate"]["right"] >= found["n"] == 6 and not found["grounding"]["contradictions"]
    model.reply = lambda prompt: "Heart rate 300/min."
    shutil.rmtree(results_folder(model.config, "test"))
    evaluate(model.config)
    found = results(model.config)
    assert found["metrics"]["grounding.precision"]["value"] == 0.0
    assert len(found["grounding"]["contradictions"]["rate"]) == found["n"]
    page = (results_folder(model.config, "test") / "report.html").read_text()
    assert "Held against what is measured" in page and "Contradictions: rate" in page


def test_kept_answers_are_scored_again_where_recordings_are_gone(ask: Ask, tmp_path: Path) -> None:
    model = ask(data__max_bad_records=0.3, eval__controls=["zeros"], eval__grounding=["all"])
    evaluate(model.config)
    before, asked = results(model.config), len(model.prompts)
    assert "grounding_unread" not in before
    for i in range(8):
        (tmp_path / f"ecg_{i}.npy").unlink()
    evaluate(model.config)
    found = results(model.config)
    assert len(model.prompts) == asked and found["metrics"]["exact_match"] == before["metrics"]["exact_match"]
    assert found["grounding_unread"] == found["n"] == 7 and "grounding" not in found
    assert "7 records are not held against their ECGs" in summary(found)


def test_a_judge_that_is_not_there_leaves_the_scores(ask: Ask) -> None:
    judge = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", retries=0, timeout=5.0)
    model = ask(data__max_bad_records=0.3, eval__controls=[], eval__grounding=["all"])
    model.config = replace(model.config, eval=replace(model.config.eval, judge=judge))
    evaluate(model.config)
    found = results(model.config)
    assert found["metrics"]["exact_match"]["value"] == 4 / 7 and "http://127.0.0.1:9" in found["judged"]["absent"]
    assert "criteria" not in found["judged"] and not is_evaluated(model.config, "test")
    assert "Absent: " in (results_folder(model.config, "test") / "report.html").read_text()
