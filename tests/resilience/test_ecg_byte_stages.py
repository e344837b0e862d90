"""ECG-Byte from pretraining to fine-tuning to an answer: each symbol keeps its embedding and its meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs

from elm_jax import chat, cli, evaluate
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config
from elm_jax.inference.model import TrainedModel
from elm_jax.run.config import config_of_run
from elm_jax.run.folder import open_folder
from elm_jax.symbols.coder import EcgByte
from elm_jax.training.loop import Trainer, train

KEYS = {
    "elm": "ecg_byte", "update": "llm", "encoder__name": None, "encoder__config": "{}", "train__steps": 2,
    "data__representation": "symbolic", "data__min_ecg_tokens": 16, "data__max_len": 128, "data__leads": "II",
    "data__val_fraction": 0.0, "llm__scratch": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "max_len": 256},
}  # fmt: skip


@pytest.fixture
def coders(tmp_path: Path) -> tuple[Path, Path]:
    """Two ECG-Byte files of the same size."""
    files = tmp_path / "one.json", tmp_path / "other.json"
    for file, letter in zip(files, (b"m", b"n"), strict=True):
        EcgByte([letter * 2**n for n in range(1, 7)]).save(file)
    return files


def config(workdir: Path, coder: Path, **changes: object) -> Config:
    return runs.config(workdir, **{**KEYS, "data__ecg_tokenizer": str(coder), **changes})


@pytest.mark.slow
def test_symbols_keep_their_rows_and_their_meaning(
    tmp_path: Path, coders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = coders
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(config(first, one, phase="pretrain"))
    trained = TrainedModel(config(first, one, phase="pretrain"))
    sft = config(second, one, phase="sft", init_from=str(first))
    trainer = Trainer(sft, open_folder(sft))
    trainer._build()
    before, after = trained.assembly.signal.tokens, trainer.assembly.signal.tokens
    assert before is not None and after is not None
    table = "llm.embedding.table"
    np.testing.assert_array_equal(
        np.asarray(trainer.state.trained[table])[after.llm_ids], np.asarray(trained.arrays[table])[before.llm_ids]
    )
    trainer.run()

    for command in (evaluate, chat):
        capsys.readouterr()
        assert cli.guard(command.main, ["--checkpoint", str(second), f"--config.data.ecg_tokenizer={other}"]) == 2
        assert "data.ecg_tokenizer: found" in capsys.readouterr().err
    one.unlink()  # the run has its own
    assert TrainedModel(config_of_run(str(second), ConfigFlags())).assembly.signal.tokens is not None
