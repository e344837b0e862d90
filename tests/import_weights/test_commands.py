"""An imported checkpoint as a user has it: by command line into a run, and from this into training, scores and chat."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import compiling
import numpy as np
import pytest
import warm
from import_weights import checkpoints
from import_weights.conftest import Model
from parity import e2e

from elm_jax.data.demo import demo_tokenizer
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.weights.safetensors import Safetensors

Golden = Callable[[str], Path]
Command = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
# Ten seconds at 25 Hz are as many samples as the goldens' encoder reads.
DATA = ["--config.data.names=('demo:train=16,val=4,test=4',)", f"--config.data.segment_len={e2e.SAMPLES}",
        "--config.data.sampling_rate=25", "--config.data.max_len=256", "--config.data.val_fraction=0"]  # fmt: skip


@pytest.fixture(scope="module")
def run_command(workplace: Path) -> Command:
    """run_command("chat", *arguments, text=...): `python -m elm_jax.chat` on one device, which must succeed."""
    own = {"ELM_JAX_CACHE": str(workplace / "cache"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": compiling.FLAGS}
    environment = {**os.environ, **own}

    def run(name: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*warm.python(), "-m", f"elm_jax.{name}", *arguments], input=text, capture_output=True, text=True,
            cwd=ROOT, env=environment, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="module")
def run_folder(model: Model, run_command: Command, workplace: Path, golden: Golden) -> Path:
    """An imported run of linear_llava with ST-MEM, whose language model has the demo's tokenizer."""
    llm = checkpoints.llm_folder("llama", golden, workplace / "demo")
    demo_tokenizer(workplace / "cache").save_pretrained(llm)
    file, out = model("linear_llava_llama")[0], workplace / "imported"
    flags = ["--config.encoder.tokens=4", f"--config.llm.name={llm}", *DATA]
    done = run_command("import_weights", str(file), "--out", str(out), *flags)
    assert "encoder.name = st_mem, by encoder.encoder.sep_embedding" in done.stdout
    assert "left out: optimizer_state_dict: the state of an optimizer" in done.stdout
    (told,) = done.stderr.splitlines()
    assert "'plain' is taken" in told  # the demo's tokenizer is of no family's form
    return out


def settings(run: Path) -> list[str]:
    """The flags by which a config file becomes that of an imported run."""
    config = json.loads((run / "config.json").read_text())
    sizes = [f"--config.encoder.config.{key}={value}" for key, value in config["encoder"]["config"].items()]
    return ["--config=configs/llava_st_mem.py", "--config.elm=linear_llava", "--config.encoder.tokens=4", *sizes, *DATA,
            f"--config.llm.name={config['llm']['name']}", "--config.llm.compute_dtype=float32",
            f"--config.init_from={run}", "--config.train.batch_size=4",
            "--config.train.steps=3", "--config.train.log_every=1", "--noconfig.log.progress"]  # fmt: skip


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_talks(run_folder: Path, run_command: Command) -> None:
    few = ["--config.eval.max_new_tokens=8", "--config.eval.batch_size=4", "--config.eval.limit=4"]
    run_command("evaluate", "--checkpoint", str(run_folder), *few)
    (metrics,) = (run_folder / "eval").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["n"] == 4
    said = run_command("chat", "--checkpoint", str(run_folder), "--ecg", "demo:test:1", few[0], text="What is it?\n")
    assert "ecg 1:" in said.stdout and "assistant: " in said.stdout and "step 0" in said.stderr


@pytest.mark.slow
@pytest.mark.parametrize("update", ["connector", "encoder,connector,llm"])
def test_a_run_starts_from_an_imported_one(run_folder: Path, run_command: Command, update: str) -> None:
    """What is frozen stays as it was imported; what is trained moves from there, and its loss is finite."""
    work = run_folder.parent / update.replace(",", "_")
    flags = [*settings(run_folder), f"--config.workdir={work}", f"--config.update={update}"]
    run_command("train", *flags)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()
    frozen = Checkpoints(work, read_only=True).meta(3)["frozen"]
    assert set(frozen) == ({"encoder", "llm"} if update == "connector" else set())
    run_command("chat", "--checkpoint", str(work), "--config.eval.max_new_tokens=4", text="/ecg demo:test:0\nWell?\n")


@pytest.mark.slow
def test_a_run_starts_from_an_imported_encoder(run_folder: Path, run_command: Command, golden: Golden) -> None:
    """The LLM is then that of its folder, and the connector a new one: both must be named."""
    out, work = run_folder.parent / "encoder", run_folder.parent / "from_encoder"
    flags = [flag for flag in settings(run_folder) if "init_from" not in flag]
    file = golden(e2e.ENCODER_FOLDER) / "model.safetensors"
    run_command("import_weights", str(file), "--out", str(out), *flags)
    named = ["--config.init_missing_ok=llm,connector", f"--config.init_from={out}", f"--config.workdir={work}"]
    run_command("train", *flags, *named, "--config.update=connector", "--config.train.steps=1")
    assert set(Checkpoints(work, read_only=True).meta(1)["frozen"]) == {"encoder", "llm"}


@pytest.mark.slow
def test_the_guide_does_what_it_says(run_command: Command, tmp_path: Path) -> None:
    """The commands of docs/import.md under "Try it", with a smaller model."""
    pytest.importorskip("torch")
    small = ["--config.data.names=('demo:train=16,val=4,test=4',)", "--config.train.steps=2",
             "--config.llm.scratch={'hidden': 16, 'layers': 1, 'heads': 2, 'kv_heads': 1, 'mlp': 32, 'max_len': 256}",
             "--config.encoder.config.width=4", "--noconfig.eval.at_end", "--config.train.batch_size=4"]  # fmt: skip
    few = ["--config.eval.max_new_tokens=4"]
    lines = (ROOT / "docs" / "import.md").read_text().partition("## Try it")[2].strip().splitlines()
    for line in lines:
        text, _, command = line.strip().rpartition(" | ")
        words = [word.replace("runs/", f"{tmp_path}/").replace("exported", f"{tmp_path}/exported") for word in
                 shlex.split(command)]  # fmt: skip
        assert words[:2] == ["python", "-m"]
        name = words[2].removeprefix("elm_jax.")
        more = {"train": small, "import_weights": small, "export": []}.get(name, few)
        run_command(name, *words[3:], *more, text=text.removeprefix("echo ").strip('"') + "\n")
    assert len(lines) == 5 and (tmp_path / "imported" / "eval").is_dir()


@pytest.mark.slow
def test_an_export_comes_back_as_it_was(run_folder: Path, run_command: Command) -> None:
    """elm.pt of an imported run, imported again: the same bytes."""
    pytest.importorskip("torch")
    out, again = run_folder.parent / "exported", run_folder.parent / "again"
    run_command("export", "--checkpoint", str(run_folder), "--out", str(out))
    config = json.loads((run_folder / "config.json").read_text())
    flags = ["--config.encoder.tokens=4", f"--config.llm.name={config['llm']['name']}", *DATA]
    run_command("import_weights", str(out / "elm.pt"), "--out", str(again), *flags)
    before, after = (Safetensors(run / "inherited" / "arrays.safetensors") for run in (run_folder, again))
    assert before.keys() == after.keys()
    tokens = json.loads((again / "import_report.json").read_text())["vocabulary"]["in_file"]
    for name, array in before.items():
        rows = tokens if name == "llm.embedding.table" else None  # the others are spare, and are not exported
        np.testing.assert_array_equal(array[:rows], after[name][:rows], err_msg=name)
