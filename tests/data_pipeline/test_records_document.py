"""docs/records.md: its examples are records, and become what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from texts import chat_tokenizer

from elm_jax.config import DataConfig, resolve
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.sources import load_records, patient_ids
from elm_jax.data.specs import signal_spec
from elm_jax.data.table_files import COLUMNS
from elm_jax.objectives.preference import chosen_and_rejected

DOCUMENT = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+ ?\w*)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
ECG = "<signal>" * 2


def blocks(kind: str) -> list[str]:
    found = [body for name, body in BLOCKS if name == kind]
    assert found, f"no block {kind}"
    return found


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `data` with the recordings that the examples name, in the current folder."""
    (tmp_path / "data" / "ecg").mkdir(parents=True)
    for name in "12":
        signal = np.random.default_rng(int(name)).normal(size=(12, 2500)).astype(np.float32)
        np.save(tmp_path / "data" / "ecg" / f"{name}.npy", signal)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "data"


def dataset(root: Path, name: str, phase: str = "sft") -> Dataset:
    data = DataConfig(names=(name,), root=str(root), val_fraction=0.0, system_prompt="You read ECGs.")
    text = text_spec(data, "qwen2", 2, phase, ())
    return Dataset(load_records(data, "train", 0), chat_tokenizer(), text, signal_spec(data, 0))


def rendered(root: Path, lines: str, phase: str = "sft") -> list[str]:
    """The prompts of records; their recordings are read too."""
    (root / "example.jsonl").write_text(lines)
    made = dataset(root, "example.jsonl", phase)
    assert made.length_index("system", 0.0).length.all() and made.missing(0.0) is None
    signals = [shown["ecg"] for i in range(len(made)) for shown in made.signals(i)]
    assert all(isinstance(signal, np.ndarray) and signal.shape == (12, 2500) for signal in signals)
    return [made.render(i).prompt for i in range(len(made))]


def test_the_forms_of_a_conversation_say_the_same(root: Path) -> None:
    prompts = [prompt for block in blocks("jsonl forms") for prompt in rendered(root, block)]
    assert len(prompts) == 4 and len(set(prompts)) == 1
    assert f"{ECG}\nIs the rhythm regular?" in prompts[0] and "yes" in prompts[0]


def test_a_plain_text_is_learnt_in_pretraining(root: Path) -> None:
    (block,) = blocks("jsonl pretrain")
    (prompt,) = rendered(root, block, "pretrain")
    assert ECG in prompt and "Sinus rhythm. Normal ECG." in prompt


def test_pairs_say_the_same(root: Path) -> None:
    (block,) = blocks("jsonl pairs")
    (root / "pairs.jsonl").write_text(block)
    made = dataset(root, "pairs.jsonl")
    found = [[made.render(i, text=s.text).prompt for s in chosen_and_rejected(made.records[i])] for i in range(2)]
    assert found[0] == found[1] and "yes" in found[0][0] and "no" in found[0][1]


def test_several_ecgs_stand_where_it_says(root: Path) -> None:
    (block,) = blocks("jsonl several")
    marked, unmarked = rendered(root, block)
    assert re.search(rf"First {ECG}\n?\s*then {ECG}\n?\s*Is it worse\?", marked)
    assert re.search(rf"{ECG}\n{ECG}\nIs it worse\?", unmarked)


def test_patients_are_those_of_the_table() -> None:
    table = DOCUMENT[DOCUMENT.index("| `patient_id` | patients |\n") :].split("\n\n")[0].splitlines()[2:]
    cells = [row.split("|")[1:3] for row in table]
    rows = {spelt: tuple(filter(None, who.strip().split(", "))) for spelt, who in cells}
    assert len(rows) >= 4
    for spellings, patients in rows.items():
        for spelt in re.findall(r"`(.*?)`", spellings):
            assert patient_ids(json.loads(spelt)) == patients, spelt


def test_the_program_writes_what_the_command_reads(root: Path) -> None:
    (program,) = blocks("python")
    exec(compile(program, "docs/records.md", "exec"), {})
    made = dataset(root, "mine.parquet")
    assert "What is the rate?" in made.render(0).prompt and made.records[0].patient == "17"
    (command,) = blocks("bash")
    assert re.findall(r"--config\.([\w.]+)=(\S+)", command) == [("data.root", "data"), ("data.names", "mine.parquet")]


def test_it_names_every_field_and_keys_that_there_are() -> None:
    table = DOCUMENT[: DOCUMENT.index("## text")]
    assert not [name for name in COLUMNS if f"`{name}`" not in table]
    config = resolve({})
    for section, name in re.findall(r"`(data|train)\.(\w+)", DOCUMENT):
        assert hasattr(getattr(config, section), name), f"{section}.{name}"
