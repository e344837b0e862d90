"""PTB-XL's statements asked one by one: what is asked, and what the scores are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from fake_model import RATE, SECONDS, Asked, fake_config
from sklearn.metrics import f1_score, roc_auc_score
from texts import write_records

from elm_jax.data.prepare.ptb_xl import PtbXl, Statement, read_ptb_xl, read_statements
from elm_jax.errors import UserError
from elm_jax.evaluation import evaluator
from elm_jax.evaluation.answering import BadRecords
from elm_jax.evaluation.labels import ask_labels, label_scores
from elm_jax.evaluation.store import LABEL, AnswerFile

CODES = ("{'NORM': 100.0, 'SR': 0.0}", "{'IMI': 15.0, 'SR': 0.0}", "{'AFIB': 0.0}")
DATABASE = "ecg_id,scp_codes\n" + "".join(f'{i},"{codes}"\n' for i, codes in enumerate(CODES, 1))
STATEMENTS = (
    ",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass\n"
    "NORM,normal ECG,1.0,,,NORM,NORM\nIMI,inferior myocardial infarction,1.0,,,MI,IMI\n"
    "AFIB,atrial fibrillation,,,1.0,,\nSR,sinus rhythm,,,1.0,,\n"
)


@pytest.fixture
def ptb_xl(tmp_path):
    (tmp_path / "ptbxl_database.csv").write_text(DATABASE)
    (tmp_path / "scp_statements.csv").write_text(STATEMENTS)
    paths = [f"records500_00000_0000{i}_hr_0.npy" for i in (1, 2, 3)]
    for path in paths:
        np.save(tmp_path / path, np.random.default_rng(0).normal(size=(12, SECONDS * RATE)))
    write_records(tmp_path, [["x", "Report?", ["none"]]] * 3, paths, split="test")
    return tmp_path


class Knows(Asked):
    """Gives "yes" 0.8 where the statement asked about is sinus rhythm, else 0.1."""

    def option_probabilities(self, prompts: Any, options: Any) -> np.ndarray:
        assert options == ("yes", "no")
        self.prompts += prompts
        yes = np.array([0.4 if "sinus rhythm" in prompt.rendered.prompt else 0.05 for prompt in prompts])
        return np.stack([yes, 0.5 - yes], axis=1)


def asked(model: Knows, tables: PtbXl, file: AnswerFile, bad: float = 0.0, records: Any = range(3)) -> dict[str, Any]:
    dataset = model.dataset("test")
    return ask_labels(model, dataset, records, tables, file, BadRecords(dataset, bad))  # type: ignore[arg-type]


def test_every_statement_is_asked_of_every_recording_and_kept(ptb_xl):
    config = fake_config(data__names=["records.jsonl"], data__root=str(ptb_xl), eval__batch_size=3)
    model, tables = Knows(config, 512), read_ptb_xl(ptb_xl)
    path = ptb_xl / "labels.jsonl"
    found = asked(model, tables, AnswerFile(path, LABEL))
    assert len(model.prompts) == 3 * 4
    assert "Does this ECG show atrial fibrillation? Answer yes or no." in model.prompts[2].rendered.prompt
    assert found["rhythm"]["macro_f1"]["value"] == pytest.approx(np.mean([0, 0.8]))
    sinus = found["rhythm"]["labels"]["SR"]
    assert (sinus["f1"], sinus["auc"], sinus["n"]) == (pytest.approx(0.8), 0.5, 2)
    assert set(found) == {"diagnostic", "rhythm", "superclass", "subclass"}, "no form statement was true of any"
    again = asked(model, tables, AnswerFile(path, LABEL))
    assert again == found and len(model.prompts) == 12, "nothing is asked twice"
    asked(model, tables, AnswerFile(ptb_xl / "other.jsonl", LABEL), records=[1])
    assert len(model.prompts) == 12 + 4, "only of the recordings that are asked about"


def test_a_recording_that_cannot_be_read_is_left_out_within_the_limit(ptb_xl):
    config = fake_config(data__names=["records.jsonl"], data__root=str(ptb_xl), eval__batch_size=3)
    (ptb_xl / "records500_00000_00002_hr_0.npy").write_bytes(b"no array")
    model, tables, path = Knows(config, 512), read_ptb_xl(ptb_xl), ptb_xl / "labels.jsonl"
    found = asked(model, tables, AnswerFile(path, LABEL), bad=0.4)
    assert found["rhythm"]["n"] == 2 and len(model.prompts) == 2 * 4
    with pytest.raises(UserError, match="data.max_bad_records"):
        asked(model, tables, AnswerFile(path, LABEL), bad=0.1)


def test_the_recordings_of_all_folds_are_asked_about_once_and_those_left_out_are_counted(ptb_xl, monkeypatch):
    for name in ("write_report", "draw_examples"):
        monkeypatch.setattr(evaluator, name, lambda *_: None)
    rows = [json.loads(line) for line in (ptb_xl / "records.jsonl").read_text().splitlines()]
    folds = [(1, rows[0]), (2, rows[1]), (2, rows[0]), (3, rows[2])]
    lines = [json.dumps({**row, "split": f"fold{fold}_test"}) + "\n" for fold, row in folds]
    (ptb_xl / "folds.jsonl").write_text("".join(lines))

    class Fails(Knows):
        def option_probabilities(self, prompts: Any, options: Any) -> np.ndarray:
            if np.array_equal(prompts[0].signals[0]["ecg"], lost["ecg"]):
                raise UserError("eval.max_new_tokens", "too long a prompt", "a shorter one", "lower it")
            return super().option_probabilities(prompts, options)

    np.save(ptb_xl / rows[1]["ecg_path"], np.random.default_rng(1).normal(size=(12, SECONDS * RATE)))
    config = fake_config(
        data__names=["folds.jsonl"], data__root=str(ptb_xl), workdir=str(ptb_xl / "run"), eval__labels=str(ptb_xl),
        eval__folds=[1, 2], eval__controls=[], log__progress=False, data__max_bad_records=0.4,
    )  # fmt: skip
    model = Fails(config, 512)
    lost = model.dataset("test", 2).signals(0)[0]
    monkeypatch.setattr(evaluator, "TrainedModel", lambda *_: model)
    out = evaluator.evaluate(config)
    results = json.loads((out / "metrics.json").read_text())
    asked = [line["id"] for line in (json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines())]
    assert asked == ["00001"] and results["labels_bad"] == 1, "the second is of fold 2 alone, the third of no fold"
    assert results["bad"] == 0 and results["n"] == 3, "it is in all other scores"


def test_one_evaluation_scores_ptb_xls_statements_by_family_and_ecg_qa_by_type(ptb_xl, monkeypatch):
    for name in ("write_report", "draw_examples"):
        monkeypatch.setattr(evaluator, name, lambda *_: None)
    answers = {"single-verify": "yes", "single-choose": "A", "single-query": "yes"}
    asked = [[kind, "Which?", [answer]] for kind, answer in answers.items()]
    paths = [f"records500_00000_0000{i}_hr_0.npy" for i in (1, 2, 3)]
    write_records(ptb_xl, asked, paths, split="test")
    config = fake_config(
        data__names=["records.jsonl"], data__root=str(ptb_xl), workdir=str(ptb_xl / "run"), eval__labels=str(ptb_xl),
        eval__controls=[], log__progress=False,
    )  # fmt: skip
    monkeypatch.setattr(evaluator, "TrainedModel", lambda *_: Knows(config, 512))
    results = json.loads((evaluator.evaluate(config) / "metrics.json").read_text())
    assert results["labels"]["rhythm"]["macro_f1"]["value"] == pytest.approx(0.4)
    assert {kind: found["answer_set_match"]["value"] for kind, found in results["by"]["question_type"].items()} == {
        "single-verify": 1, "single-choose": 0, "single-query": 1
    }  # fmt: skip
    assert results["ecg_qa"]["average_of_single_types"] == pytest.approx(2 / 3)


def test_labels_that_cannot_be_asked_for_are_an_error_before_any_question(ptb_xl, monkeypatch):
    def refused(expected: str, **keys: Any) -> None:
        data = {"data__names": ["records.jsonl"], "data__root": str(ptb_xl), "workdir": str(ptb_xl)}
        model = Knows(fake_config(**data, **keys), 512)
        monkeypatch.setattr(evaluator, "TrainedModel", lambda *_: model)
        with pytest.raises(UserError, match=expected):
            evaluator.evaluate(model.config)
        assert not model.prompts

    refused("ptbxl_database|scp_statements", eval__labels=str(ptb_xl / "nowhere"))
    refused("objective 'pretrain'", eval__labels=str(ptb_xl), phase="pretrain")
    monkeypatch.setattr(evaluator.jax, "process_count", lambda: 2)
    refused("several processes", eval__labels=str(ptb_xl))


def test_a_folder_that_is_not_ptb_xls_is_an_error(tmp_path):
    with pytest.raises(UserError, match="scp_statements.csv"):
        read_statements(tmp_path)


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    true, p = rng.random((80, 3)) < 0.3, np.round(rng.random((80, 3)), 1)
    statements = [Statement(code, code, {"form": code}) for code in "ABC"]
    found = label_scores(p, true, statements, [str(i // 2) for i in range(80)])["form"]
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(true, p > 0.5, average="macro"))
    assert found["micro_f1"]["value"] == pytest.approx(f1_score(true, p > 0.5, average="micro"))
    assert found["macro_auc"]["value"] == pytest.approx(roc_auc_score(true, p, average="macro"))
    for name in ("macro_f1", "micro_f1", "macro_auc"):
        low, high = found[name]["ci95"]
        assert low < found[name]["value"] < high


def test_the_real_tables_have_the_families_that_the_paper_counts(shared):
    statements = read_statements(shared / "real/ecg/ptbxl")
    sizes = {family: len({s.families[family] for s in statements if family in s.families})
             for family in ("diagnostic", "form", "rhythm", "superclass", "subclass")}  # fmt: skip
    assert sizes == {"diagnostic": 44, "form": 19, "rhythm": 12, "superclass": 5, "subclass": 23}
    assert len(statements) == 71
