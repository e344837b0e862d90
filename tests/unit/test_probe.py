"""The command that judges encoders, in this process, on a small encoder as it is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
import towers
from flax import nnx
from safetensors.numpy import save_file

from elm_jax import probe as command
from elm_jax.assemble import assemble_encoder
from elm_jax.cli import ConfigFlags
from elm_jax.data.labels import read_labels
from elm_jax.errors import UserError
from elm_jax.evaluation import encoders
from elm_jax.folders import write_json
from elm_jax.runtime.mesh import make_mesh
from elm_jax.weights.encoders import load_encoder, to_published

SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 1, "decoder_embed_dim": 16, "decoder_depth": 1}
SIZES |= {"decoder_num_heads": 1, "patch_size": 50}
DATA = {"sampling_rate": 50, "segment_len": 500}
TASK = ("--task", "demo", "--labels", "demo:train=60,val=30,test=50", "--fractions", "10,100")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder: of an encoder with other weights than those that a config draws."""
    folder = tmp_path_factory.mktemp("exported")
    state = nnx.to_flat_state(nnx.state(load_encoder("st_mem", seq_len=500, **SIZES).module))
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) * 1.5 for path, leaf in state}
    save_file(to_published("st_mem", arrays), folder / "encoder.safetensors")
    encoder = {"name": "st_mem", "tokens": 50, "config": {**SIZES, "num_leads": 12, "seq_len": 500}}
    write_json(folder / "elm.json", {"elm": "mlp_llava", "encoder": encoder, "signal": DATA})
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One device, and a cache of these tests."""
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "probe")
    monkeypatch.setattr(encoders, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    yield


def results(folder: Path, name: str = "demo") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def test_an_encoder_is_judged_beside_a_random_one(exported: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--checkpoint", str(exported), *TASK, "--random", "--out", str(tmp_path), "--noconfig.log.progress"]
    command.main(arguments)
    printed, found = capsys.readouterr().out, results(tmp_path)
    assert printed == (tmp_path / "demo.md").read_text() + "\n"
    assert found["n"] == {"train": 60, "val": 30, "test": 50} and found["classes"] == ["irregular", "slow", "fast"]
    ours, control = found["encoders"]
    assert (ours["name"], control["name"]) == (str(exported / "encoder.safetensors"), "random")
    assert list(ours["methods"]) == ["linear, 10 %", "linear, 100 %", "20 neighbours"]
    whole = ours["methods"]["linear, 100 %"]
    assert whole["macro_auc"]["value"] > 0.6, "even one that has learnt nothing tells rates apart"
    assert whole["macro_auc"] != control["methods"]["linear, 100 %"]["macro_auc"]
    apart = found["difference"]["linear, 100 %"]["macro_auc"]
    each = [one["methods"]["linear, 100 %"]["macro_auc"]["value"] for one in (ours, control)]
    assert apart["value"] == pytest.approx(each[0] - each[1]) and apart["ci95"][0] <= apart["value"] <= apart["ci95"][1]
    command.main(arguments)
    assert results(tmp_path) == found, "the same from kept embeddings"


def test_a_class_that_few_recordings_show_is_left_out_and_named(exported: Path, tmp_path: Path) -> None:
    own = ["--checkpoint", str(exported), "--out", str(tmp_path), "--noconfig.log.progress"]
    command.main([*own, *TASK[:4], "--fractions", "2,7"])
    found, text = results(tmp_path), (tmp_path / "demo.md").read_text()
    (methods,) = (one["methods"] for one in found["encoders"])
    assert list(methods) == ["linear, 7 %", "20 neighbours"] and found["left_out"]["linear, 2 %"]["n"] == 1
    assert "linear, 2 %: 1 recording to learn from; of no class are some with it and some without: left out." in text
    less, kept = found["left_out"]["linear, 7 %"]["classes"], methods["linear, 7 %"]["labels"]
    assert less and kept and {*less, *kept} == set(found["classes"]) and f"all of them do: {', '.join(less)}." in text
    areas = [one["auc"] for one in kept.values()]
    assert methods["linear, 7 %"]["macro_auc"]["value"] == pytest.approx(np.mean(areas))
    assert list(methods["20 neighbours"]["labels"]) == found["classes"]


def test_a_table_is_judged_fold_by_fold_from_a_file_of_weights(exported: Path, tmp_path: Path) -> None:
    rows = "".join(f"demo:train:{i},{'odd' if i % 2 else ''}\n" for i in range(40))
    (tmp_path / "mine.csv").write_text(f"ecg_path,labels\n{rows}")
    sizes = [f"--config.encoder.config.{name}={value}" for name, value in SIZES.items()]
    command.main([
        "--config", "configs/llava_st_mem.py", *sizes,
        f"--config.encoder.checkpoint={exported / 'encoder.safetensors'}",
        "--config.data.sampling_rate=50", "--config.data.segment_len=500", f"--config.workdir={tmp_path / 'w'}",
        "--labels", str(tmp_path / "mine.csv"), "--folds", "4", "--fractions", "100", "--protocol", "merl",
    ])  # fmt: skip
    found = results(tmp_path / "w" / "probe", "mine")
    assert found["n"]["test"] == 40 and found["folds"] == 4 and found["classes"] == ["odd"]
    assert found["encoders"][0]["methods"]["linear, 100 %"]["n"] == 40


@pytest.mark.slow  # compiles a ResNet and a tower, twice
def test_an_encoder_that_was_held_against_reports_tells_classes_by_their_words(tmp_path: Path) -> None:
    bert = towers.bert_folder(tmp_path / "bert")
    usual = {
        "objective": "merl", "encoder__name": "merl", "update": "encoder", "data__max_len": 16, "ssl__text": str(bert),
        "encoder__config": {**runs.TINY["encoder.config"], "proj_hidden": 16, "proj_out": 16},
    }  # fmt: skip
    alone = assemble_encoder(runs.config(tmp_path / "run", **usual))
    drawn = alone.draw(dict.fromkeys(alone.structure.leaves)).items()
    tensors = to_published("merl.pretraining", {name.removeprefix("encoder."): x for name, x in drawn})
    save_file(tensors, tmp_path / "both.safetensors")
    flags = runs.flags(tmp_path / "run", **usual, encoder__checkpoint=str(tmp_path / "both.safetensors"))
    arguments = [*flags, *TASK, "--fractions", "100"]
    command.main(arguments)
    found = results(tmp_path / "run" / "probe")["encoders"][0]
    assert found["name"] == str(tmp_path / "both.safetensors")
    assert list(found["methods"]) == ["linear, 100 %", "20 neighbours", "zero-shot"]
    (tmp_path / "prompts.json").write_text(json.dumps({"slow": "regular", "fast": ["irregular", "120"]}))
    command.main([*arguments, "--prompts", str(tmp_path / "prompts.json")])
    other = results(tmp_path / "run" / "probe")["encoders"][0]["methods"]
    zero, named = found["methods"]["zero-shot"]["labels"], other["zero-shot"]["labels"]
    assert zero["irregular"] == named["irregular"] and zero["fast"] != named["fast"]
    assert found["methods"]["20 neighbours"] == other["20 neighbours"]
    (tmp_path / "prompts.json").write_text(json.dumps({"slow": 3}))
    with pytest.raises(UserError, match="prompts.json, slow: found 3"):
        command.main([*arguments, "--prompts", str(tmp_path / "prompts.json")])


def test_a_random_encoder_has_the_sizes_of_the_one_that_it_stands_beside(exported: Path) -> None:
    """Those of a checkpoint's config.json, too, which its config does not have."""
    like = encoders.open_encoder(str(exported), ConfigFlags.parse([]), "best")
    ((view, fields),) = like.assembly.encoders.items()
    larger = {view: {**fields, "embed_dim": 64, "text": {}}}
    control = encoders.random_encoder(replace(like, assembly=replace(like.assembly, encoders=larger)))
    assert control.assembly.encoders == {view: {**fields, "embed_dim": 64}}
    assert {x.shape[-1] for name, x in control.arrays.items() if name.endswith("norm1.scale")} == {64}


def test_embeddings_that_are_no_numbers_are_refused(exported: Path) -> None:
    encoder = encoders.open_encoder(str(exported), ConfigFlags.parse([]), "best")
    broken = replace(encoder, arrays={name: np.nan * x for name, x in encoder.arrays.items()})
    with pytest.raises(UserError, match=r"3 of 3 embeddings that are not finite, the first of demo:train:0"):
        encoders.embeddings(broken, read_labels("demo", "demo:train=1,val=1,test=1"), progress=False)


def test_what_cannot_be_judged_is_refused(exported: Path, tmp_path: Path) -> None:
    def refused(expected: str, *arguments: str) -> None:
        with pytest.raises(UserError, match=expected):
            command.main([*arguments, "--noconfig.log.progress"])

    def table(text: str) -> str:
        (tmp_path / "t.csv").write_text(f"ecg_path,labels,split\n{text}")
        return str(tmp_path / "t.csv")

    own = "--checkpoint", str(exported)
    refused("--checkpoint: found none", *TASK)
    refused("'demos'.*did you mean 'demo'", *own, "--task", "demos")
    refused("a table of recordings with labels", *own)
    one = "".join(f"demo:{split}:{i},AF,{split}\n" for split in ("train", "val", "test") for i in range(3))
    refused("no class that only some of them show", *own, "--labels", table(one))
    strange = "".join(f"x{split}{i}.npy,{'AF' * i},{split}\n" for split in ("train", "val", "test") for i in range(2))
    refused("xtrain0.npy.*max_bad_records", *own, "--labels", table(strange))
    refused("--fractions.*'0,10'", *own, *TASK[:4], "--fractions", "0,10")
    (tmp_path / "prompts.json").write_text('{"slow": "a slow heart", "fst": "a fast one"}')
    refused("--prompts: found fst.*did you mean 'fast'", *own, *TASK, "--prompts", str(tmp_path / "prompts.json"))
    refused("--folds.*at least 3", *own, *TASK, "--folds", "2")
    refused("--neighbours", *own, *TASK, "--neighbours", "0")
    refused("no run in", "--config", "configs/llava_st_mem.py", f"--config.workdir={tmp_path}", *TASK)
    elf = "--config", "configs/elf_base.py", f"--config.workdir={tmp_path}"
    refused("an elm of one view with an encoder", *elf, *TASK)
    vision = f"--config.encoder.checkpoint={exported}", "--config.data.representation=signal"
    refused("data.representation", "--config", "configs/llava_vit.py", *vision, f"--config.workdir={tmp_path}", *TASK)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("--checkpoint.*without config.json", "--checkpoint", str(empty), *TASK)
    write_json(empty / "elm.json", {"elm": "ecg_byte", "encoder": None, "signal": {}})
    refused("without an encoder", "--checkpoint", str(empty), *TASK)
