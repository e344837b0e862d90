"""Imported runs of the goldens' models, and the command that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from import_weights import checkpoints
from parity import e2e

from elm_jax import cli
from elm_jax.cli import ConfigFlags
from elm_jax.import_weights import main
from elm_jax.inference.model import TrainedModel
from elm_jax.run.config import config_of_run
from elm_jax.symbols.coder import EcgByte

Golden = Callable[[str], Path]
Model = Callable[[str], tuple[Path, list[str]]]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("import_weights")


@pytest.fixture(scope="session")
def model(golden: Golden, workplace: Path) -> Iterator[Model]:
    """model("conv_elf_llama"): its checkpoint, and the flags that say what this does not."""
    pytest.importorskip("torch")

    def make(name: str) -> tuple[Path, list[str]]:
        file, plain = workplace / f"{name}.pt", name.removesuffix("_lora")
        if not file.is_file():
            checkpoints.save(file, checkpoints.state_dict(name, golden))
        kind, llm = e2e.split_name(f"e2e_{plain}")
        inputs = np.load(golden(f"e2e_{plain}") / "inputs.npz")
        tokens = inputs["batch0/signal_id_indices"].shape[1] if "batch0/signal_id_indices" in inputs else 1
        flags = checkpoints.flags_of(name, checkpoints.llm_folder(llm, golden, workplace), tokens)
        if kind == "ecg_byte":
            EcgByte([]).save(workplace / "bpe.json")
            flags.append(f"--config.data.ecg_tokenizer={workplace / 'bpe.json'}")
        return file, flags

    yield make


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """refused(path, *flags): the one line that the command refuses it with; nothing may be left then."""

    def run(path: Path, *flags: str) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        out = tmp_path / "not_there"
        assert cli.guard(main, [str(path), "--out", str(out), *flags]) == 2
        assert sorted(tmp_path.rglob("*")) == before, "a refused import leaves something"
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1
        return said.err

    return run


def imported(path: Path, out: Path, *flags: str) -> Path:
    """The run folder of an import that must succeed."""
    assert cli.guard(main, [str(path), "--out", str(out), *flags]) == 0
    return out


def loaded(run: Path) -> TrainedModel:
    """As evaluate and chat load it, on one device."""
    flags = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    one = jax.local_devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        return TrainedModel(config_of_run(str(run), ConfigFlags.parse(flags)))
