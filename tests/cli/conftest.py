"""Runs that tests of the commands share, and the environment that their commands run in."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import compiling
import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--config=configs/demo.py", "--config.data.names=('demo:train=40,val=8,test=8',)", "--config.data.val_fraction=0",
    "--config.llm.scratch={'hidden': 16, 'layers': 1, 'heads': 2, 'kv_heads': 1, 'mlp': 32, 'max_len': 256}",
    "--config.encoder.config.width=4", "--config.optim.lr=0.02", "--config.train.steps=40",
    "--config.train.batch_size=4", "--noconfig.eval.at_end", "--noconfig.log.progress",
)  # fmt: skip


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a command of its own: one CPU device, nothing of the user's cache.

    Programs are compiled as all tests compile them; those of `test_train.py` as a user's are.
    """
    cache = str(tmp_path_factory.mktemp("cache"))
    own = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "ELM_JAX_CACHE": cache, "XLA_FLAGS": compiling.FLAGS}
    return {**os.environ, **own}


@pytest.fixture(scope="session")
def command(command_environment: dict[str, str]) -> Command:
    """command("chat", *arguments, text=...): `python -m elm_jax.chat`, with its stdin."""

    def run(name: str, *arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*warm.python(), "-m", f"elm_jax.{name}", *arguments], input=text, capture_output=True, encoding="utf-8",
            errors="surrogateescape", cwd=ROOT, env=command_environment | environment, timeout=600,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The folder of a run of a very small model (40 steps on the demo, 20 s): it answers, but not well.

    Read only: what a test leaves in it the next one finds.
    """
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = command("train", *TINY, f"--config.workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder
