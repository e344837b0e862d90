"""Encoders that learn alone, through the real loop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from runs import logged, saved_arrays

from elm_jax.assemble import assemble
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config
from elm_jax.data.ecg_ids import PADDED, EcgIds
from elm_jax.data.samples import REPORT, label_of
from elm_jax.data.sources import Record
from elm_jax.errors import UserError
from elm_jax.evaluation.encoders import open_encoder
from elm_jax.evaluation.redrawing import redraw_split
from elm_jax.exchange.export import export
from elm_jax.models.encoders.sequence import SequenceConfig
from elm_jax.objectives import objective_of
from elm_jax.objectives.self_supervised import LEVELS
from elm_jax.pictures.redrawn import draw_redrawn
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.symbols.coder import EcgByte
from elm_jax.training import loop
from elm_jax.weights.safetensors import Safetensors

MAE = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {"vit": {"encoder__config": VIT, "data__representation": "stacked_signal"}}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run has one device: what is compiled for eight takes long."""
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "self_supervised")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    yield


def config(folder: Path, name: str, **changes: Any) -> Config:
    usual = {
        "objective": name, "encoder__name": name, "encoder__config": MAE, "update": "encoder", "train__steps": 6,
        "train__save_every": 3, "train__eval_every": 3, "optim__schedule": "constant", "optim__warmup_ratio": 0.0,
        "optim__lr": 1e-2, "optim__ema": 0.5, "data__names": ["demo:train=24,val=4,test=4"],
    }  # fmt: skip
    return runs.config(folder, **{**usual, **OWN.get(name, {}), **changes})


MEASURES = ("mse", "mae", "psnr", "ssim")


def redrawn(config: Config, split: str) -> dict[str, Any]:
    """The metrics of what the run's encoder redraws, and a picture of each kind."""
    out = redraw_split(config, split, "latest")
    told = json.loads((out / "metrics.json").read_text())
    assert (told["asked_with"]["guidance"], told["asked_with"]["ema"]) == (config.eval.guidance, config.eval.ema)
    found = told["metrics"]
    kinds = {name.rpartition(".")[0] for name in found}
    assert {path.stem for path in out.glob("*.png")} == (kinds if config.data.representation == "signal" else set())
    return found


@pytest.mark.slow  # trains twice
@pytest.mark.parametrize("name", ["st_mem", "mlae", "vit"])
def test_what_is_hidden_is_rebuilt_ever_better(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert loop.train(config(whole, name))
    told = capsys.readouterr().err
    assert " recordings; a step has" in told and "supervised" not in told
    assert f"{whole}: done, step 6, val_loss " in told.splitlines()[-1] and told.endswith(" (best step 6)\n")
    assert loop.train(config(stopped, name, train__steps=3))
    assert loop.train(config(stopped, name))
    assert logged(stopped) == logged(whole)
    lines = [line for line in runs.lines(whole) if "loss" in line]
    if name != "vit":
        assert lines[-1]["val_psnr"] > lines[2]["val_psnr"] and 0 < lines[-1]["val_ssim"] <= 1
        assert {path.name for path in (whole / "plots").iterdir()} == {"loss.png", "rebuilt_3.png", "rebuilt_6.png"}
    assert lines[-1]["val_loss"] < lines[2]["val_loss"] < lines[0]["loss"]
    first, last = saved_arrays(whole, 6), saved_arrays(stopped, 6)
    assert any("decoder" in array for array in first)
    for array, value in first.items():
        np.testing.assert_array_equal(value, last[array], err_msg=array)
    assert not (whole / "tokenizer").exists()
    out = tmp_path / "out"
    export(config(whole, name, eval__ema=True), out, "latest")
    if name == "st_mem":
        found = redrawn(config(whole, name, eval__ema=True, eval__batch_size=3), "test")
        assert set(found) == {f"rebuilt.{measure}" for measure in MEASURES}
        assert all(low <= each["value"] <= high for each in found.values() for low, high in [each["ci95"]])
    assert {path.name for path in out.iterdir()} <= {"encoder.safetensors", "encoder.pt", "elm.json"}
    begun = runs.config(
        tmp_path / "begun",
        **{"encoder__config": MAE, **OWN.get(name, {})}, encoder__name=name, encoder__tokens=1 if name in OWN else 2,
        encoder__checkpoint=str(out / "encoder.safetensors"), update="connector,llm",
    )  # fmt: skip
    parts = assemble(begun)
    arrays = Weights(parts).place(array_shardings(parts.structure, make_mesh(begun.mesh, jax.devices()[:1])))
    learnt = {name.partition("['")[2].removesuffix("']"): x for name, x in first.items() if name.startswith("average")}
    mine = [name for name in arrays if name.startswith("encoder.") and name in learnt]
    assert len(mine) >= 10
    for array in mine:
        np.testing.assert_array_equal(np.asarray(arrays[array]), learnt[array], err_msg=array)


@pytest.mark.slow  # trains and exports
def test_the_next_id_is_predicted_ever_better_and_an_elm_starts_from_it(tmp_path: Path) -> None:
    letters = EcgByte([bytes([letter]) * 2 for letter in b"abcdefghijklmnopqrstuvwxyz"])
    letters.save(tmp_path / "ecg_byte.json")
    sizes = {"d_model": 16, "n_heads": 2, "dim_ff": 32, "num_layers": 1, "max_seq_len": 320, "lead_tokens": True}
    own = {
        "encoder__name": "next_token", "encoder__config": sizes, "data__representation": "symbolic",
        "data__ecg_tokenizer": str(tmp_path / "ecg_byte.json"), "data__leads": ["II", "V1"], "data__segment_len": 100,
        "data__sampling_rate": 10,
    }  # fmt: skip
    made = config(tmp_path / "run", "next_token", **own)
    assert loop.train(made)
    lines = [line for line in runs.lines(tmp_path / "run") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] and abs(lines[0]["loss"] - np.log(256 + 26 + 27)) < 0.5
    found = redrawn(replace(made, eval=replace(made.eval, limit=2)), "test")
    assert set(found) == {f"forecast.{name}" for name in ("accuracy", "mse", "mae", "mase", "pearson_r", "snr_db")}
    assert 0 <= found["forecast.accuracy"]["value"] <= 1
    export(made, tmp_path / "out", "latest")
    names = set(Safetensors(tmp_path / "out" / "encoder.safetensors"))
    assert {"token_emb.weight", "pos_emb.weight", "lm_head.weight", "layers.0.self_attn.in_proj_weight"} <= names
    (tmp_path / "ecg_byte.json").rename(tmp_path / "moved.json")
    for checkpoint in ("run", "out"):
        judged = open_encoder(str(tmp_path / checkpoint), ConfigFlags.parse([]), "latest").assembly
        assert judged.signal.ecg_byte is not None and judged.signal.ecg_byte.merges == letters.merges, "its own"
    (tmp_path / "moved.json").rename(tmp_path / "ecg_byte.json")
    begun = assemble(runs.config(
        tmp_path / "elm", **own, encoder__tokens=3, encoder__checkpoint=str(tmp_path / "out" / "encoder.safetensors")
    ))  # fmt: skip
    arrays = Weights(begun).place(array_shardings(begun.structure, make_mesh(begun.config.mesh, jax.devices()[:1])))
    (ids,) = begun.dataset("val").signals(0)[0].values()
    found = begun.structure.bind(arrays).encoder(ids[None])
    assert found.shape == (1, 3, 16) and np.isfinite(found).all()
    EcgByte([bytes([letter]) * 2 for letter in b"zyxwvutsrqponmlkjihgfedcba"]).save(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"data\.ecg_tokenizer: found .*other.json; expected the same ECG-Byte as .*"):
        assemble(replace(begun.config, data=replace(begun.config.data, ecg_tokenizer=str(tmp_path / "other.json"))))
    with pytest.raises(UserError, match=r"data\.ecg_tokenizer: found None; expected a symbolic tokenizer for encoder"):
        assemble(config(tmp_path, "next_token", **{**own, "data__ecg_tokenizer": None}))
    with pytest.raises(UserError, match=r"data\.representation: found signal; expected symbolic for encoder"):
        assemble(config(tmp_path, "next_token", **{**own, "data__representation": "signal"}))


DIT = {"d_model": 16, "n_heads": 2, "dim_ff": 32, "num_layers": 1, "num_steps": 4}


def labelled(folder: Path, labels: list[Any]) -> dict[str, Any]:
    """A dataset of noise whose records have these labels."""
    rows = [
        {"ecg_path": "noise", "text": [["user", "?"]], "label": label, "patient_id": str(n), "split": split}
        for n, label in enumerate(labels) for split in (["train", "val"][n % 2],)
    ]  # fmt: skip
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data__names": [str(folder / "data.jsonl")], "data__segment_len": 100, "data__max_bad_records": 0.5}


@pytest.mark.slow  # trains
def test_ecgs_of_labels_are_generated(tmp_path: Path) -> None:
    data = labelled(tmp_path / "data", [0, 0, 1, 1] * 4)
    made = config(tmp_path / "run", "dit", **data, encoder__config={**DIT, "condition": "label"})
    assert loop.train(made)
    lines = [line for line in runs.lines(tmp_path / "run") if "loss" in line]
    assert lines[-1]["val_loss"] < lines[2]["val_loss"] and abs(lines[0]["loss"] - 1.3) < 0.2  # of noise less noise
    assert (tmp_path / "run" / "plots" / "made_6.png").is_file()
    found = redrawn(made, "val")
    assert set(found) == {"made.fid", "made.mmd", *(f"rebuilt_{t}.{m}" for t in LEVELS for m in MEASURES)}
    assert found["rebuilt_0.9.mse"]["value"] < found["rebuilt_0.1.mse"]["value"]
    assert np.load(tmp_path / "run" / "eval" / "data-val" / "made.npy").shape == (8, 12, 100)
    labels = assemble(made).dataset("train")
    assert [int(labels.conversations(n, None, 1)[0].ids[0]) for n in range(2)] == [0, 1]
    bad = assemble(config(tmp_path / "bad", "dit", **labelled(tmp_path / "other", [0, 7] * 2 + [None]),
                          encoder__config={**DIT, "condition": "label"})).dataset("val")  # fmt: skip
    with pytest.raises(UserError, match=r"found the label '7'; expected a whole number from 0 to 1"):
        bad.check(0)
    with pytest.raises(UserError, match=r"data\.leads: found 1; expected all 12 with condition=lead"):
        assemble(config(tmp_path, "dit", data__leads=["II"], encoder__config={**DIT, "condition": "lead"}))


def test_ids_of_an_ecg_spell_it_again() -> None:
    coder = EcgByte([b"aa", b"ab"])
    signal = np.stack([np.linspace(0, 1, 12), np.linspace(1, 0, 12)]).astype(np.float32)
    for by_lead, more in ((False, 2), (True, 6)):
        ids = EcgIds(coder, 40, (1, 6), by_lead)
        made = ids.encode(signal, 1e-6)
        known = made[made != PADDED]
        assert made.shape == (40,) and known.max() < ids.vocab_size and (known[0], known[-1]) == (259, 260)
        np.testing.assert_allclose(ids.decode(made).reshape(2, 12), signal, atol=0.5 / 26 + 1e-6)
        apart = (signal[:1], signal[1:]) if by_lead else (signal,)
        assert len(known) == sum(len(coder.encode(part)) for part in apart) + more
        cut = EcgIds(coder, 10, (1, 6), by_lead).encode(signal, 1e-6)
        np.testing.assert_array_equal(cut, [*known[:9], known[-1]])
    assert (known[1], known[-2]) == (261 + 2, 262 + 12)


def test_the_published_sizes_are_the_default() -> None:
    sizes = SequenceConfig()
    assert (sizes.num_leads, sizes.seq_len, sizes.d_model, sizes.n_heads, sizes.dim_ff) == (12, 2500, 512, 8, 2048)
    assert (sizes.num_layers, sizes.num_decoder_layers) == (6, 4)


def test_a_config_pretrains_its_encoder() -> None:
    files = sorted((runs.ROOT / "elm_jax" / "configs" / "pretrain_encoder").glob("*.py"))
    names = [file.stem for file in files if file.stem != "_recipe"]
    assert len(names) >= 7
    for name in names:
        made = ConfigFlags.parse(["--config", f"configs/pretrain_encoder/{name}.py"]).load()
        assert objective_of(made).pretrains == made.encoder.name and made.objective == name
        assert made.optim.warmup_steps is not None and made.update == ("encoder",)


def test_an_objective_needs_its_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.name: found merl; expected st_mem with objective=st_mem"):
        objective_of(config(tmp_path, "st_mem", encoder__name="merl"))


def test_a_diffusion_needs_what_it_is_of(tmp_path: Path) -> None:
    def refused(expected: str, own: dict[str, Any], **changes: Any) -> None:
        with pytest.raises(UserError, match=expected):
            objective_of(config(tmp_path, "dit", encoder__config={**DIT, **own}, **changes))

    refused("condition: found text; expected label, lead or None with encoder.name=dit", {"condition": "text"})
    refused("condition: found label; expected text", {"condition": "label"}, encoder__name="dit_text")
    refused("data.normalize: found lead_zscore", {"loss_type": "ddpm"}, data__normalize="lead_zscore")
    of_text = config(tmp_path, "dit", encoder__config=DIT, encoder__name="dit_text")
    assert objective_of(of_text).samples.phase == REPORT


@pytest.mark.parametrize("label", [1, 1.0, "1", np.float64(1)])
def test_a_label_is_a_whole_number(label: Any) -> None:
    def record(label: Any) -> Record:
        return Record(("a.npy",), "", "", "1", "x:1", 0, label=label)

    assert label_of(record(label), 2) == 1
    for bad in (1.5, "1.5", 2.0, -1.0, float("nan"), float("inf"), "9" * 5000, True, None):
        with pytest.raises(UserError, match="expected a whole number from 0 to 1"):
            label_of(record(bad), 2)


@pytest.mark.slow  # trains twice
def test_validations_are_judged_by_a_probe(tmp_path: Path) -> None:
    """Whole or stopped, the same; `best` is where it told most."""
    asked = {"ssl__probe": "demo=demo:train=40,val=40,test=1", "train__eval_every": 2, "train__save_every": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert loop.train(config(whole, "mlae", **asked))
    assert loop.train(config(stopped, "mlae", train__steps=2, **asked))
    assert loop.train(config(stopped, "mlae", **asked))
    told = {line["step"]: line["val_probe"] for line in runs.lines(whole) if "val_probe" in line}
    assert told == {line["step"]: line["val_probe"] for line in runs.lines(stopped) if "val_probe" in line}
    assert list(told) == [2, 4, 6] and all(0 < value < 1 for value in told.values())
    assert Checkpoints(whole, read_only=True).find("best") == max(told, key=lambda step: told[step])


def test_a_probe_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    def refused(expected: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=expected):
            loop.train(config(tmp_path / "run", "mlae", **changes))

    refused("ssl.mask_ratio: found 0.75 of 3 patches, all.*at most 0.666667", encoder__config={**MAE, "patch_size": 4})
    refused("ssl.probe: found 'demi'.*did you mean 'demo'", ssl__probe="demi")
    refused("ssl.probe: found demo without validation records", ssl__probe="demo", data__val_fraction=0.0,
            data__names=[str(only_training(tmp_path))])  # fmt: skip
    refused("ssl.probe: found 3 recordings to learn from and 3 to judge by", ssl__probe=f"table={one_class(tmp_path)}")
    unlearnt = one_class(tmp_path, ("test",))
    refused("ssl.probe: found 0 recordings to learn from and 0 to judge by", ssl__probe=f"table={unlearnt}")
    ours = runs.config(tmp_path / "elm", ssl__probe="demo")
    with pytest.raises(UserError, match="ssl.probe.*None with objective=sft"):
        loop.train(ours)


def only_training(folder: Path) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(f'{{"ecg_path": "demo:train:{i}", "text": ""}}\n' for i in range(8)))
    return path


def one_class(folder: Path, splits: Sequence[str] = ("train", "val")) -> Path:
    path = folder / "labels.csv"
    rows = "".join(f"demo:{split}:{i},AF,{split}\n" for split, i in itertools.product(splits, range(3)))
    path.write_text(f"ecg_path,labels,split\n{rows}")
    return path


def test_what_is_not_finite_is_drawn_too(tmp_path: Path) -> None:
    made = np.ones((3, 2, 50), np.float32)
    made[0], made[1, :, ::2], made[2, 0, 7] = np.nan, np.inf, -np.inf
    for truth in (None, made):
        draw_redrawn(tmp_path / "made.png", truth, made, np.ones(made.shape, bool), 100.0)
        assert (tmp_path / "made.png").stat().st_size > 1000
        (tmp_path / "made.png").unlink()
