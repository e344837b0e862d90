"""What importing the package brings, and what it does not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import elm_jax
from elm_jax.data.demo import demo_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["elm_jax", "elm_jax.config", "elm_jax.cli", "elm_jax.compat"])
def test_importing_it_imports_no_jax(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TRAINS = {"tiny_run", "trained", "unbroken", "run_folder"}  # fixtures that train a model: seconds


def test_no_quick_test_trains_a_model_first(request: pytest.FixtureRequest) -> None:
    found = [item for item in request.session.items if TRAINS & {*getattr(item, "fixturenames", ())}]
    assert not [item.nodeid for item in found if not item.get_closest_marker("slow")], "mark them slow"


def test_dir_lists_the_public_names_without_loading_them() -> None:
    assert set(elm_jax.__all__) <= set(dir(elm_jax))


@pytest.mark.parametrize("name", elm_jax.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(elm_jax, name) is not None


def test_the_lines_of_python_in_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny LLM and a recording at the paths that they name."""
    import wfdb

    # The first are those of tests/export/test_loaded.py.
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (record,), (model,) = re.findall(r'"(records500/\S+)"', code), re.findall(r'"(path/to/\S+)"', code)
    (tmp_path / record).parent.mkdir(parents=True)
    leads = ["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    seconds = np.random.default_rng(0).standard_normal((5000, 12))
    wfdb.wrsamp(
        Path(record).name, 500, ["mV"] * 12, leads, p_signal=seconds, fmt=["16"] * 12,
        write_dir=str((tmp_path / record).parent),
    )  # fmt: skip
    write_llm(tmp_path / model)
    names: dict = {}
    exec(code, names)
    assert names["signal"].shape == (12, 2500) and names["ids"].shape == (1, 32)
    assert capsys.readouterr().out == names["tokenizer"].decode(names["ids"][0]) + "\n"


def write_llm(folder: Path) -> None:
    """A random Qwen2 of two layers as Hugging Face has one, with the demo's tokenizer."""
    from flax import nnx

    from elm_jax.models.decoder import Decoder
    from elm_jax.models.families import rules_of, scratch_config, to_hf
    from elm_jax.models.names import export
    from elm_jax.weights.load import parameters
    from elm_jax.weights.safetensors import save_safetensors

    tokenizer = demo_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "mlp": 16, "max_len": 64}
    llm = Decoder(scratch_config(sizes, len(tokenizer)), nnx.Rngs(0))
    arrays = {name: np.asarray(variable[...]) for name, variable in parameters(nnx.state(llm)).items()}
    (folder / "config.json").write_text(json.dumps(to_hf(llm.config)))
    save_safetensors(folder / "model.safetensors", dict(export(rules_of(llm.config), arrays)))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_lllm'"):
        elm_jax.load_lllm  # noqa: B018
