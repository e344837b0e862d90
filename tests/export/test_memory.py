"""Exporting a large model needs no more of the host's memory than the export is large, and 1 GB.

Of Qwen2.5-0.5B's sizes: JAX and PyTorch take 0.6 GB, and the model a second time (1 GB) would not fit beside it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from export.made_runs import settings, word_tokenizer

from elm_jax.assemble import assemble
from elm_jax.config import resolve
from elm_jax.models.families import family_of, from_hf, to_hf
from elm_jax.models.functional import Leaf
from elm_jax.run import folder as run
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.training.state import split_names
from elm_jax.weights.shards import ShardWriter

GB = 10**9
QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
# The high-water mark of this program alone: what getrusage says begins with that of the process that started it.
COMMAND = """
import sys
from elm_jax import cli, export
status = cli.guard(export.main)
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")))
sys.exit(status)
"""


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with room; what is in it goes when the test is done."""
    if shutil.disk_usage(tmp_path).free < 8 * GB:
        pytest.skip("not 8 GB of disk")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def values(shape: tuple[int, ...]) -> np.ndarray:
    tile = np.random.default_rng(0).standard_normal(4099).astype(ml_dtypes.bfloat16)
    return np.resize(tile, shape)


def write_llm(folder: Path) -> Path:
    """A Hugging Face folder of the sizes of Qwen2.5-0.5B, in bfloat16 and shards."""
    folder.mkdir()
    config = from_hf(QWEN, "here")
    (folder / "config.json").write_text(json.dumps({**to_hf(config), "torch_dtype": "bfloat16"}))
    word_tokenizer(1000).save_pretrained(folder)
    leaves = llm_leaves(folder)
    rules = [rule for rule in family_of("qwen2").rules if rule.ours in leaves]
    dtype = np.dtype(ml_dtypes.bfloat16)
    writer = ShardWriter(folder / "model", rules, {n: (dtype, x.shape) for n, x in leaves.items()}, limit=GB // 3)
    for name, leaf in leaves.items():
        writer.write(name, values(leaf.shape))
    writer.close()
    return folder


def llm_leaves(folder: Path) -> dict[str, Leaf]:
    tree = settings("base_elf", folder)
    leaves = assemble(resolve({**tree, "workdir": str(folder / "none")})).structure.leaves
    return {n.removeprefix("llm."): leaf for n, leaf in leaves.items() if n.startswith("llm.")}


def write_run(folder: Path, llm: Path, update: tuple[str, ...]) -> None:
    """A run whose trained arrays are made up, in bfloat16."""
    tree = settings("base_elf", llm, update=update, llm__compute_dtype="bfloat16", llm__param_dtype="bfloat16")
    config = resolve({**tree, "workdir": str(folder)})
    assembly = assemble(config)
    run.open_folder(config)
    run.keep_tokenizer(folder, assembly.tokenizer)
    trained, _, _ = split_names(assembly.structure, config.update)
    arrays = {n: values(assembly.structure.leaves[n].shape) for n in trained}
    checkpoints = Checkpoints(folder)
    history = {"best_step": None, "best_val_loss": None, "val_losses": [], "bad": []}
    checkpoints.save(1, {"trained": arrays}, {"frozen": {}, "frozen_ids": {}, "data": "", "history": history})
    checkpoints.wait()
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("update", [("connector",), ("connector", "llm")], ids=["frozen", "trained"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_exporting_half_a_billion_parameters_stays_within_the_exported_bytes_and_1_gb(
    room: Path, update: tuple[str, ...]
) -> None:
    llm = write_llm(room / "llm")
    write_run(room / "run", llm, update)
    command = [sys.executable, "-c", COMMAND, "--checkpoint", str(room / "run"), "--out", str(room / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = 1024 * int(done.stdout.splitlines()[-1])
    model = sum(file.stat().st_size for file in (room / "out" / "llm").glob("*.safetensors"))
    print(f"\n{update}: {model / GB:.2f} GB of weights, {peak / GB:.2f} GB of memory at most")
    assert model > 0.95 * GB
    assert peak < model + GB  # elm.pt, as large again, is not counted
