"""The command `export`: what it leaves, what it says, what it refuses, and the upload."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export.made_runs import Golden, encoder_settings, export_command, llm_folder, make_run, settings, tokenizer_in
from huggingface_hub.errors import LocalTokenNotFoundError
from parity import e2e

from elm_jax.exchange import hub
from elm_jax.exchange.card import _licence
from elm_jax.folders import read_run_config, write_json, write_run_config
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.safetensors import Safetensors

SCORES = {
    "n": 12, "step": 3, "metrics": {"exact_match": {"value": 0.75, "ci95": [0.5, 0.9]}},
    "controls": {"zeros": {"exact_match": {"value": 0.25, "ci95": [0.1, 0.4]}}},
    "signal_dependence": {"value": 0.5, "ci95": [0.25, 0.75], "p": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a LLaVA with an evaluation, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    llm = llm_folder(golden("llm_qwen2_tied"), folder / "llm", dtype="bfloat16")
    (llm / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    (llm / "LICENSE").write_text("terms")
    make_run(folder / "run", settings("mlp_llava", llm, encoder__tokens=2, **encoder_settings(golden)))
    (folder / "run" / "eval" / "demo-test").mkdir(parents=True)
    write_json(folder / "run" / "eval" / "demo-test" / "metrics.json", SCORES)
    return folder / "run"


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_leaves_what_it_says(made: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("torch")
    assert export_command("--checkpoint", made, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    llm = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja", "LICENSE"}  # fmt: skip
    top = {"README.md", "elm.json", "encoder.safetensors", "connector.safetensors", "elm.pt", "encoder.pt"}
    assert files_in(tmp_path / "out") == top | {f"llm/{name}" for name in llm}
    assert files_in(tmp_path) == {f"out/{name}" for name in files_in(tmp_path / "out")}  # nothing beside it
    for name in ("model.safetensors", "encoder.safetensors", "connector.safetensors", "elm.pt", "encoder.pt"):
        assert name in said
    assert set(Safetensors(tmp_path / "out" / "connector.safetensors")) == {
        f"projection.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")
    }


def test_a_template_that_cannot_say_what_training_says_is_left_out_and_that_is_said(
    golden: Golden, tmp_path: Path, capsys
) -> None:
    llm = llm_folder(golden("llm_qwen2_tied"), tmp_path / "llm")
    tokenizer = tokenizer_in(llm)
    tokenizer.chat_template = "{{ messages[0].content }}"  # it came with one, which asks otherwise
    tokenizer.save_pretrained(llm)
    make_run(tmp_path / "run", settings("patch_elf", llm, encoder__tokens=5, phase="pretrain"))
    assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "out") == 0
    reason = "a chat template, for phase pretrain has no conversations"
    assert f"left out: {reason}" in capsys.readouterr().out
    assert f"no {reason[2:]}" in (tmp_path / "out" / "README.md").read_text()
    assert tokenizer_in(tmp_path / "out" / "llm").chat_template is None


def test_without_pytorch_the_rest_is_written_and_that_is_said(made: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert export_command("--checkpoint", made, "--out", tmp_path / "out") == 0
    assert "left out: elm.pt, for PyTorch is not installed" in capsys.readouterr().out
    assert {"llm/model.safetensors", "encoder.safetensors", "connector.safetensors"} < files_in(tmp_path / "out")
    assert not any(name.endswith(".pt") for name in files_in(tmp_path / "out"))


def test_the_card_has_data_scores_beside_their_controls_and_the_licence(made: Path, tmp_path: Path) -> None:
    assert export_command("--checkpoint", made, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "base_model" not in front  # of the hub it has none: it began from a folder
    assert "license: apache-2.0\n" in front and "pipeline_tag: text-generation\n" in front
    assert "demo:train=64,val=8,test=8" in card and f"12 leads, {e2e.SAMPLES} samples at 250 Hz" in card
    assert "| exact_match | 0.750 (0.500 to 0.900) | 0.250 |" in card
    assert "right more often by 0.500 (0.250 to 0.750), p = 0.01." in card
    assert "its licence (apache-2.0) holds for this one too" in card
    facts = json.loads((tmp_path / "out" / "elm.json").read_text())
    assert facts["no_chat_template"] is None and facts["explicit_thinking"] is False
    assert facts["encoder"]["name"] == "st_mem" and facts["signal"]["tokens_per_ecg"] == 2


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_licence_is_that_of_the_card_beside_the_weights_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "README.md").write_text("---\nauthor: M\u00fcller\nlicense: mit\n---\n", encoding=encoding)
    weights: Any = SimpleNamespace(assembly=SimpleNamespace(llm_folder=tmp_path))
    assert _licence(weights, "Qwen/Qwen2.5") == "mit"


def test_every_parameter_is_in_the_dtype_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    assert export_command("--checkpoint", made, "--out", tmp_path / "out", "--dtype", "float16") == 0
    files = [open_checkpoint(tmp_path / "out" / "llm")]
    files += [dict(Safetensors(tmp_path / "out" / f"{part}.safetensors")) for part in ("encoder", "connector")]
    other = {name for tensors in files for name, tensor in tensors.items() if tensor.dtype != np.float16}
    assert other == {"encoder.pos_embedding"}  # a constant, no parameter
    assert json.loads((tmp_path / "out" / "llm" / "config.json").read_text())["dtype"] == "float16"


def test_the_base_weights_of_a_trained_llm_are_not_needed(golden: Golden, tmp_path: Path) -> None:
    llm = llm_folder(golden("llm_llama_tied"), tmp_path / "llm")
    make_run(tmp_path / "run", settings("patch_elf", llm, encoder__tokens=5, update=("connector", "llm")))
    before = dict(Safetensors(llm / "model.safetensors"))
    before = {name: tensor.copy() for name, tensor in before.items()}
    (llm / "model.safetensors").unlink()
    assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "out") == 0
    after = open_checkpoint(tmp_path / "out" / "llm")
    assert {n: x.tobytes() for n, x in before.items()} == {n: x.tobytes() for n, x in after.items()}


def test_an_earlier_export_is_replaced_and_nothing_else_is(made: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert export_command("--checkpoint", made, "--out", out) == 0
    (out / "elm.pt").write_text("old")
    assert export_command("--checkpoint", made, "--out", out, "--dtype", "float32") == 0
    assert not (out / "elm.pt").is_file() or (out / "elm.pt").read_bytes() != b"old"
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("precious")
    assert export_command("--checkpoint", made, "--out", tmp_path / "work") == 2
    assert "which holds something else" in capsys.readouterr().err
    assert files_in(tmp_path / "work") == {"thesis.tex"}
    (tmp_path / "work" / "elm.json").write_text("{}")  # as an export has it
    (out / ".git").mkdir()
    for folder in (tmp_path / "work", out):
        assert export_command("--checkpoint", made, "--out", folder) == 2
        assert "which holds something else" in capsys.readouterr().err
    assert (tmp_path / "work" / "thesis.tex").is_file()


def test_no_export_replaces_what_its_run_reads(made: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(made, tmp_path / "out" / "llm")
    (tmp_path / "out" / "elm.json").write_text("{}")
    assert export_command("--checkpoint", run, "--out", tmp_path / "out") == 2
    assert "in which lies" in capsys.readouterr().err and (run / "config.json").is_file()


def test_other_weights_than_the_runs_are_refused(made: Path, tmp_path: Path, capsys) -> None:
    """The LLM of the run was frozen, and its folder has been changed since."""
    run = shutil.copytree(made, tmp_path / "run")
    tree = read_run_config(run)
    llm = shutil.copytree(tree["llm"]["name"], tmp_path / "llm")
    write_run_config(run, tree | {"llm": tree["llm"] | {"name": str(llm)}})
    path = llm / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert export_command("--checkpoint", run, "--out", tmp_path / "out") == 2
    assert "a checkpoint trained with other llm weights" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", "run"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_shard_size", "many"], "--max_shard_size: found 'many'"),
        (["--push_to_hub", "mine"], "--push_to_hub: found 'mine'; expected owner/name"),
        (["--dtype", "int8"], "--dtype"),
        (["--step", "7"], "--step: found '7'"),
        (["--to", "here"], "--to"),
    ],
)
def test_a_mistake_is_one_line(made: Path, tmp_path: Path, capsys, flags: list[str], says: str) -> None:
    assert export_command("--checkpoint", made, "--out", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


class Hub:
    """A stand-in for the hub's client; `refuses`: what it raises."""

    calls: list[tuple[str, Any]] = []
    refuses: Exception | None = None

    def create_repo(self, repo: str, **options: Any) -> str:
        if self.refuses:
            raise self.refuses
        self.calls.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.calls.append((repo_id, files_in(Path(folder_path))))


@pytest.mark.parametrize("public", [False, True])
def test_the_folder_is_uploaded(made: Path, tmp_path: Path, capsys, monkeypatch, public: bool) -> None:
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(hub, "HfApi", Hub)
    flags = ["--push_to_hub", "me/elm", *(["--public"] if public else [])]
    assert export_command("--checkpoint", made, "--out", tmp_path / "out", *flags) == 0
    assert Hub.calls == [("me/elm", {"private": not public, "exist_ok": True}), ("me/elm", files_in(tmp_path / "out"))]
    assert "uploaded to https://hub/me/elm" in capsys.readouterr().out


def test_what_the_hub_refuses_is_an_error_and_the_folder_stays(made: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Hub, "refuses", LocalTokenNotFoundError("who are you?"))
    monkeypatch.setattr(hub, "HfApi", Hub)
    assert export_command("--checkpoint", made, "--out", tmp_path / "out", "--push_to_hub", "me/elm") == 2
    error = capsys.readouterr().err
    assert "which the hub refused (LocalTokenNotFoundError: who are you?" in error and "hf auth login" in error
    assert (tmp_path / "out" / "README.md").is_file()
