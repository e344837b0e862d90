"""ECG-Reasoning-Benchmark: samples become conversations, steps are asked after the true ones, answers are scored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_model import RATE, SECONDS, Asked, fake_config

from elm_jax import cli, prepare
from elm_jax.data.prepare.conversations import prepare_conversations
from elm_jax.evaluation import evaluator
from elm_jax.scoring.reasoning import FINAL, SCORES, sample_sums, step_right

CRITERIA = [f"presence of finding {letter}" for letter in "abcde"]
RANGES = ["[200ms - 210ms]", "[120ms - 130ms]", "Above 400ms"]
LEADS = "lead II, lead V1"


def asked(question: str, options: list[str], answer: Any, kind: str = "") -> dict[str, Any]:
    return {"question": question, "options": options, "answer": answer, "question_type": kind}


def loop(number: int, decision: str, grounded: bool = True) -> dict[str, Any]:
    yes_no, leads = ["Yes", "No"], [f"lead {name}" for name in ("I", "II", "V1", "V2")]
    grounding = [
        asked(f"Loop {number}: select all possible leads.", leads, ["lead II", "lead V1"], "lead_grounding"),
        asked(f"Loop {number}: how long is it?", RANGES, ["[200ms - 210ms]"], "measurement_grounding"),
    ]
    return {
        "criterion_selection": asked(f"Loop {number}: which criterion?", CRITERIA, CRITERIA[number]),
        "finding_identification": asked(f"Loop {number}: is it there?", yes_no, "Yes"),
        "ecg_grounding": grounding if grounded else [],
        "diagnostic_decision": asked(f"Loop {number}: decide.", [*yes_no, "Further findings are needed"], decision),
    }  # fmt: skip


def sample(number: int, source: str = "ptbxl", label: bool = True, diagnosis: str = "first_degree_av_block") -> Any:
    said = "Yes" if label else "No"
    about = {"id": number, "data_source": source, "ecg_id": str(number), "target_dx": diagnosis, "dx_label": label}
    about |= {"subject_id": "10000032"} if source != "ptbxl" else {}
    first = asked(f"Sample {number}: does this ECG show it?", ["Yes", "No"], said, "initial_diagnostic_question")
    loops = [loop(0, "Further findings are needed", grounded=False), loop(1, said)]
    return {"metadata": about, "data": {"initial_diagnostic_question": first, "reasoning": loops}}


def records(root: Path) -> Path:
    """Prepared recordings of both sources."""
    stems = {"ptb_xl": [f"records500_00000_{n:05d}_hr_0" for n in (1, 2)],
             "mimic_iv": ["files_p1000_p10000032_s40689238_40689238_0"]}  # fmt: skip
    for dataset, names in stems.items():
        folder = root / dataset / "preprocessed_2500"
        folder.mkdir(parents=True)
        for name in names:
            np.save(folder / f"{name}.npy", np.random.default_rng(0).normal(size=(12, SECONDS * RATE)))
    return root


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder with recordings and the benchmark's table of three samples about them."""
    raw = records(tmp_path / "O") / "raw"
    raw.mkdir()
    (raw / "ptbxl.jsonl").write_text("".join(json.dumps(sample(n)) + "\n" for n in (1, 2, 3)))
    (raw / "mimic_iv_ecg.jsonl").write_text(json.dumps(sample(40689238, "mimic_iv_ecg", False, "ischemia")) + "\n")
    argv = ["ecg_reasoning_benchmark", f"--raw={raw}", f"--out={tmp_path / 'O'}"]
    assert cli.guard(prepare.main, argv) == 0
    return tmp_path / "O"


@pytest.mark.parametrize(
    ("step", "answer", "truth", "right"),
    [
        ("finding_identification", "**Yes**, it is.", "Yes", True),
        ("finding_identification", "It is: no.", "No", True),
        ("finding_identification", "Normal", "No", False),
        ("finding_identification", "", "No", False),
        ("criterion_selection", "- Finding A.", CRITERIA[0], True),
        ("criterion_selection", "a", CRITERIA[0], False),
        ("criterion_selection", f"The correct criterion is the {CRITERIA[0]}", CRITERIA[0], True),
        ("criterion_selection", "progressive prolongation of PR", "prolongation of PR", False),
        ("lead_grounding", "Leads V1, and II", LEADS, True),
        ("lead_grounding", "II / V1", LEADS, True),
        ("lead_grounding", "lead II\nlead V1", LEADS, True),
        ("lead_grounding", "lead II", LEADS, False),
        ("lead_grounding", "lead II, lead V1, lead V2", LEADS, False),
        ("wave_grounding", "[0.2s - 0.4s]", "[0.2s - 0.4s]", True),
        ("wave_grounding", "0.2s - 0.4s", "[0.2s - 0.4s]", False),
        ("measurement_grounding", "It is 200 ms - 210 ms", RANGES[0], True),
        ("measurement_grounding", "[-0.2mV - -0.1mV]", "[-0.2mV - -0.1mV]", True),
        ("measurement_grounding", RANGES[1], RANGES[0], False),
        ("measurement_grounding", "above 400ms.", RANGES[2], True),
        ("diagnostic_decision", "Further findings are needed.", "Further findings are needed", True),
        (FINAL, "Yes", "Further findings are needed", False),
        (FINAL, "No, it does not", "No", True),
    ],
)
def test_an_answer_is_right_by_the_benchmarks_rules(step: str, answer: str, truth: str, right: bool) -> None:
    assert step_right(step, answer, truth) == right


def test_depth_counts_the_right_steps_in_a_row_and_completion_needs_all() -> None:
    names = ("criterion_selection", "finding_identification", "lead_grounding", "wave_grounding", "diagnostic_decision")
    for rights, depth in (("01111", 0), ("10111", 1), ("11011", 2), ("11101", 2.5), ("11110", 3), ("11111", 4)):
        steps = [("initial_diagnostic_question", 0.0), *((n, float(r)) for n, r in zip(names, rights, strict=True))]
        steps += [("criterion_selection", 1.0), ("finding_identification", 1.0), (FINAL, 1.0)]
        sums = sample_sums(steps)
        assert sums["depth"] == (depth, 1), "the loop without grounding has none"
        assert sums["completion"] == (float(rights == "11111"), 1) and sums["given_reasoning"] == (1, 1)
        assert sums["criterion_selection"] == (1 + int(rights[0]), 2) and sums["diagnostic_decision"][1] == 2


def test_samples_become_conversations_with_options_and_what_does_not_join_is_listed(prepared: Path) -> None:
    rows = pq.read_table(prepared / "ecg_reasoning_benchmark.parquet").to_pylist()
    assert [(row["name"], row["attribute"], row["split"]) for row in rows] == [
        ("mimic_iv_ecg", "ischemia", "test"), *[("ptbxl", "first_degree_av_block", "test")] * 2
    ]  # fmt: skip
    assert "s40689238" in rows[0]["ecg_path"] and rows[0]["patient_id"] == "10000032"
    turns = json.loads(rows[1]["text"])
    assert turns[0]["value"].splitlines()[1:4] == ["One of the following options is right:", "- Yes", "- No"]
    several = next(turn["value"] for turn in turns if "select all" in turn["value"])
    assert "One or more of the following options are right:" in several
    assert [turn["step"] for turn in turns[1::2]] == [
        "initial_diagnostic_question", "criterion_selection", "finding_identification", "diagnostic_decision",
        "criterion_selection", "finding_identification", "lead_grounding", "measurement_grounding", "final_decision",
    ]  # fmt: skip
    assert turns[13]["value"] == "lead II, lead V1"
    report = json.loads((prepared / "ecg_reasoning_benchmark_report.json").read_text())
    assert report["without_recording"] == {"ptbxl.jsonl, item 3": "PTB-XL 00003 is not prepared"}


def test_damaged_and_hostile_samples_are_listed_with_one_line_each(tmp_path: Path) -> None:
    changes = {
        "metadata.data_source": ("metadata", "data_source", "../../etc"),
        "metadata.ecg_id": ("metadata", "ecg_id", "../1"),
        "metadata.dx_label": ("metadata", "dx_label", False),
        "metadata.target_dx": ("metadata", "target_dx", None),
        "data.reasoning": ("data", "reasoning", []),
        "data.initial_diagnostic_question.options": ("initial", "options", "Yes"),
        "data.reasoning[0].criterion_selection": ("loop", "criterion_selection", None),
        "data.reasoning[0].ecg_grounding[0]": ("loop", "ecg_grounding", ["x\ny"]),
        "data.reasoning[0].diagnostic_decision.answer": ("decision", "answer", "Perhaps"),
    }  # fmt: skip
    lines = []
    for part, key, value in changes.values():
        one = copy.deepcopy(sample(1))
        loops = one["data"]["reasoning"]
        parts = {**one, "initial": one["data"]["initial_diagnostic_question"], "loop": loops[0],
                 "decision": loops[0]["diagnostic_decision"]}  # fmt: skip
        parts[part][key] = value
        lines.append(one)
    lines += [{"metadata": 1, "data": 2}, sample(1)]
    (tmp_path / "ptbxl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = prepare_conversations(
        tmp_path / "ptbxl.jsonl", records(tmp_path / "O"), tmp_path / "t.parquet", progress=False, split="official"
    )
    found = list(report["malformed"].values())
    assert report["conversations"] == 1 and [text.partition(":")[0] for text in found] == [*changes, "metadata"]
    assert all("\n" not in text and "expected" in text for text in found)


def test_a_file_that_is_damaged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = records(tmp_path / "O")
    for content in ("{", "[" * 9000, json.dumps(sample(9))):
        (tmp_path / "ptbxl.jsonl").write_text(content)
        argv = ["ecg_reasoning_benchmark", f"--raw={tmp_path / 'ptbxl.jsonl'}", f"--out={out}"]
        assert cli.guard(prepare.main, argv) == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1 and "ptbxl.jsonl" in error and "Traceback" not in error


def test_each_step_is_asked_after_the_true_ones_and_scores_stand_by_diagnosis(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "draw_examples", lambda *_: None)
    config = fake_config(
        data__names=["ecg_reasoning_benchmark.parquet"], data__root=str(prepared), workdir=str(prepared / "run"),
        eval__controls=["zeros"], eval__batch_size=4, log__progress=False,
    )  # fmt: skip
    model = Asked(config, 4096)
    monkeypatch.setattr(evaluator, "TrainedModel", lambda *_: model)

    def truth(prompt: Any) -> str:
        """What the last question is answered with; wrong in one place of the second sample."""
        text = prompt.rendered.prompt
        last = text[max(text.rfind("Sample "), text.rfind("Loop ")) :]
        if last.startswith("Loop 1: decide") and "Sample 2:" in text:
            return "I cannot say"
        if stop and len(model.prompts) == stop[0]:
            raise KeyboardInterrupt
        label = "No" if "Sample 40689238" in text else "Yes"
        known = {"Sample": label, "Loop 1: select": "lead II and lead V1", "Loop 1: how": "200ms - 210ms"}
        known |= {f"Loop {n}: which": CRITERIA[n] for n in (0, 1)} | {f"Loop {n}: is": "Yes" for n in (0, 1)}
        known["Loop 0: decide"] = "further findings are needed"
        return next((said for start, said in known.items() if last.startswith(start)), label)

    stop = [20]
    model.reply = truth
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(config)
    stop.clear()
    asked_before = len(model.prompts)
    out = evaluator.evaluate(config)
    assert len(model.prompts) <= 2 * 27 + asked_before, "what was answered before a stop is kept but for the open chunk"
    results = json.loads((out / "metrics.json").read_text())["reasoning_benchmark"]
    found = results["all"]
    assert list(found) == [name for name in SCORES if name != "wave_grounding"] and results["incomplete"] == 0
    assert found["completion"] | {"ci95": None} == {"value": pytest.approx(2 / 3), "ci95": None, "n": 3}
    assert found["depth"]["value"] == pytest.approx((4 + 4 + 3) / 3) and found["depth"]["n"] == 3
    assert found["given_reasoning"]["value"] == pytest.approx(2 / 3)
    assert found["diagnostic_decision"] | {"ci95": None} == {"value": pytest.approx(5 / 6), "ci95": None, "n": 6}
    assert found["initial_diagnostic_question"]["value"] == 1
    assert results["by_diagnosis"]["ischemia"]["completion"]["value"] == 1
    assert results["by_diagnosis"]["first_degree_av_block"]["completion"] == {
        "value": 0.5, "ci95": [0.0, 1.0], "n": 2
    }  # fmt: skip
    assert results["controls"]["zeros"]["completion"]["n"] == 3
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 27
    last = next(line for line in lines if line["answer"] == "I cannot say")
    assert last["name"] == FINAL and last["attribute"] == "first_degree_av_block"
    assert "lead II, lead V1" in last["prompt"], "the true answers are the history"
    page = (out / "report.html").read_text()
    assert "ECG-Reasoning-Benchmark" in page and "first_degree_av_block" in page.replace("<wbr>", "")
