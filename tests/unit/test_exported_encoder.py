"""An ELM that begins with an exported encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from flax import nnx
from safetensors.numpy import save_file

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import to_dict
from elm_jax.errors import UserError
from elm_jax.folders import write_json, write_run_config
from elm_jax.run.weights import Weights, first_arrays
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.weights.encoders import load_encoder, to_published

SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
SIZES |= {"decoder_num_heads": 1, "patch_size": 50}
DATA = {"sampling_rate": 50, "segment_len": 500, "normalize": "instance_minmax", "leads": ["I", "II"]}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    state = nnx.to_flat_state(nnx.state(load_encoder("st_mem", seq_len=500, num_leads=2, **SIZES).module))
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    save_file(to_published("st_mem", arrays), folder / "encoder.safetensors")
    sizes = {**SIZES, "num_leads": 2, "seq_len": 500}
    encoder = {"name": "st_mem", "tokens": 10, "config": sizes}
    write_json(folder / "elm.json", {"objective": "st_mem", "encoder": encoder, "signal": DATA})
    return folder


def begun(folder: Path, checkpoint: Path | None, **changes: Any) -> Assembly:
    usual = {"encoder__name": "st_mem", "encoder__config": SIZES, "encoder__tokens": 2, "data__leads": ["I", "II"]}
    return assemble(runs.config(folder, **{**usual, **changes}, encoder__checkpoint=checkpoint))


def test_its_folder_will_do_and_other_data_are_told(exported: Path, tmp_path: Path, caplog: Any) -> None:
    Weights(begun(tmp_path, exported))
    assert not caplog.messages
    Weights(begun(tmp_path, exported, data__normalize="lead_zscore", data__sampling_rate=100, data__leads=["I", "V1"]))
    (told,) = caplog.messages
    assert "trained with data.leads=['I', 'II'], here ['I', 'V1']; data.sampling_rate=50, here 100; " in told
    assert "data.normalize=minmax, here lead_zscore (as elm.json beside it says)" in told


def test_another_size_is_refused_with_the_right_one(exported: Path, tmp_path: Path) -> None:
    other = {**SIZES, "depth": 2, "patch_size": 25}
    there = "depth=1, patch_size=50"
    with pytest.raises(UserError, match=rf"found no .*; elm.json beside it has encoder.config with {there}"):
        Weights(begun(tmp_path, exported / "encoder.safetensors", encoder__config=other))


def test_a_run_of_an_encoder_alone_is_to_be_exported_first(tmp_path: Path) -> None:
    alone = {"objective": "st_mem", "encoder__name": "st_mem", "update": "encoder"}
    (tmp_path / "alone").mkdir()
    write_run_config(tmp_path / "alone", to_dict(runs.config(tmp_path / "alone", **alone, encoder__config=SIZES)))
    export_it = f"export it first: python -m elm_jax.export --checkpoint {tmp_path}/alone --out D, then --config.enc"
    with pytest.raises(UserError, match=rf"encoder.checkpoint: found .*, a run; .*{export_it}"):
        Weights(begun(tmp_path, tmp_path / "alone"))
    model = begun(tmp_path, None, init_from=str(tmp_path / "alone"))
    shardings = array_shardings(model.structure, make_mesh(model.config.mesh, jax.devices()[:1]))
    with pytest.raises(UserError, match=rf"init_from: found .*alone \(objective=st_mem\).*{export_it}"):
        first_arrays(model, tmp_path, shardings, set())
