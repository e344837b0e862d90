"""ECGs held against text: towers, reports, and training through the real loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import towers
from flax import nnx
from runs import logged, saved_arrays
from safetensors.numpy import load_file

from elm_jax.assemble import assemble
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config
from elm_jax.data.batch import ArraySpec, BatchShape, empty_batch
from elm_jax.data.samples import REPORT, report_of
from elm_jax.data.sources import Record
from elm_jax.errors import UserError
from elm_jax.evaluation.encoders import open_encoder
from elm_jax.exchange.export import export
from elm_jax.keys import MeshConfig, SslConfig
from elm_jax.models.encoders.text_tower import BERT, CLIP_TEXT, SIGLIP_TEXT, TextConfig, TextFamily, TextTower
from elm_jax.models.functional import structure_of
from elm_jax.models.hints import placed
from elm_jax.objectives import objective_of
from elm_jax.objectives.contrastive import info_nce
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import MeshPlacement, array_shardings, batch_sharding, make_mesh
from elm_jax.text.reports import padded_ids
from elm_jax.training import loop
from elm_jax.weights.encoders import to_published
from elm_jax.weights.text_tower import read_text_tower


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run has one device: what is compiled for eight takes long."""
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "contrastive")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.bert_folder(tmp_path_factory.mktemp("towers") / "bert")


def config(folder: Path, bert: Path, **changes: Any) -> Config:
    usual = {
        "objective": "merl", "encoder__name": "merl", "update": "encoder", "train__steps": 6,
        "encoder__config": {**runs.TINY["encoder.config"], "proj_hidden": 16, "proj_out": 16}, "data__max_len": 16,
        "train__save_every": 3, "train__eval_every": 3, "optim__schedule": "constant", "optim__warmup_ratio": 0.0,
        "optim__lr": 1e-2, "data__names": ["demo:train=24,val=4,test=4"], "ssl__text": str(bert),
    }  # fmt: skip
    return runs.config(folder, **{**usual, **changes})


CASES: list[tuple[str, TextFamily, dict[str, Any]]] = [
    ("BertModel", BERT, {"pad_token_id": 0}),
    ("RobertaModel", BERT, {"pad_token_id": 1, "type_vocab_size": 1}),
    ("CLIPTextModelWithProjection", CLIP_TEXT, {"projection_dim": 24, "eos_token_id": 49, "pad_token_id": 0}),
    ("CLIPTextModelWithProjection", CLIP_TEXT, {"projection_dim": 24, "eos_token_id": 2, "pad_token_id": 0}),
    ("SiglipTextModel", SIGLIP_TEXT, {"projection_size": 24, "pad_token_id": 0}),
]


@pytest.mark.slow  # imports PyTorch
@pytest.mark.parametrize(("name", "family", "changes"), CASES)
def test_a_tower_computes_what_transformers_does(name: str, family: TextFamily, changes: dict[str, Any]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    theirs = model_class(model_class.config_class(**{**towers.SIZES, "vocab_size": 50, **changes})).eval()
    told = theirs.config.to_dict()
    pad = changes["pad_token_id"]
    ids = np.random.default_rng(0).integers(3, 49, (3, 12))
    ids[1, 7:], ids[2, 3:] = pad, pad
    if "eos_token_id" in changes:
        ids[[0, 1, 2], [11, 6, 2]] = 49
    fields = family.fields_of(told, "config.json")
    tensors = towers.tensors_of(family, fields)
    short = "Siglip" in name  # a model of text alone has no prefix
    state = {key.removeprefix("text_model.") if short else key: torch.tensor(x) for key, x in tensors.items()}
    lacking = theirs.load_state_dict(state, strict=False)
    assert not [key for key in lacking.missing_keys if not key.endswith(("_ids",))] and not lacking.unexpected_keys
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor((ids != pad) * 1))
    wanted = out.text_embeds if "CLIP" in name else out.pooler_output
    for frozen in (0, 1, -1):
        sizes = TextConfig.from_fields({**fields, "frozen": frozen})
        structure = structure_of(lambda sizes=sizes: TextTower(sizes, rngs=nnx.Rngs(0)))
        rules = {ours: (family.rule(ours), leaf.shape) for ours, leaf in structure.leaves.items()}
        arrays = {n: jnp.asarray(rule.arrange([tensors[x] for x in rule.names(s)])) for n, (rule, s) in rules.items()}
        with jax.default_matmul_precision("highest"):
            found = structure.bind(arrays)(jnp.asarray(ids))
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5, rtol=1e-4)
        held = {name.split(".")[0] for name, leaf in structure.leaves.items() if leaf.statistic}
        assert held == {0: set(), 1: {"words", "positions", "layers", *(("types", "norm") if family is BERT else ())},
                        -1: {name.split(".")[0] for name in structure.leaves}}[frozen]  # fmt: skip


def test_a_report_is_cut_at_its_end() -> None:
    tokenizer = towers.letters()
    assert padded_ids(tokenizer, "ab", 6).tolist() == tokenizer.encode("ab") + [0, 0]
    assert padded_ids(tokenizer, "abcdef", 4).tolist() == [*tokenizer.encode("ab")[:3], 3]


def test_what_was_written_of_an_ecg() -> None:
    def record(text: Any, report: str = "", ecgs: int = 1) -> Record:
        return Record(("a.npy",) * ecgs, text, "", "1", "x:1", 0, report=report)

    turns = [{"role": "user", "content": "Rate?"}, {"role": "assistant", "content": "72"}]
    assert report_of(record("sinus rhythm")) == "sinus rhythm"
    assert report_of(record([*turns, *turns])) == "72 72"
    assert report_of(record(turns, "sinus rhythm")) == "sinus rhythm"
    for bad, found in ((record([turns[0]]), "no words"), (record("x", ecgs=2), "2 ECGs")):
        with pytest.raises(UserError, match=found):
            report_of(bad)


@pytest.mark.slow  # trains twice
def test_ecg_and_report_find_each_other(bert: Path, tmp_path: Path, here: None) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert loop.train(config(whole, bert))
    assert loop.train(config(stopped, bert, train__steps=3))
    assert loop.train(config(stopped, bert))
    assert logged(stopped) == logged(whole)
    lines = [line for line in runs.lines(whole) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(np.isclose(line["loss"], line["cma"] + line["uma"]) for line in lines)
    first, last = saved_arrays(whole, 6), saved_arrays(stopped, 6)
    for array, value in first.items():
        np.testing.assert_array_equal(value, last[array], err_msg=array)
    told = an_elm_begins_with_it(config(whole, bert), tmp_path, encoder__name="merl")
    for name, value in load_file(bert / "model.safetensors").items():  # frozen, as its folder has it
        np.testing.assert_array_equal(told[f"lm.{name}"], value)


OF_ECGS = {"encoder__name": "siglip_ecg", "encoder__config": {"patch_size": 25}}
OF_IMAGES = {"encoder__name": "clip", "encoder__config": {}, "data__representation": "stacked_signal"}


@pytest.mark.slow  # trains
@pytest.mark.parametrize(("name", "model", "changes"), [("siglip", "siglip2", OF_ECGS), ("clip", "clip", OF_IMAGES)])
def test_a_published_pair_is_trained_on(name: str, model: str, changes: Any, tmp_path: Path, here: None) -> None:
    folder = towers.pair_folder(tmp_path / "published", model)
    changes = {**changes, "objective": name, "encoder__checkpoint": str(folder), "optim__lr": 1e-3,
               "data__val_fraction": 0, "train__eval_every": None, "train__save_every": 6}  # fmt: skip
    begun = config(tmp_path / "run", folder, **changes)
    theirs, parts = load_file(folder / "model.safetensors"), assemble(begun)
    here_too = Weights(parts).place(array_shardings(parts.structure, make_mesh(begun.mesh, jax.devices()[:1])))
    own = {n.removeprefix("encoder."): np.asarray(x) for n, x in here_too.items()}
    mine = to_published(f"{begun.encoder.name}.pretraining", own)
    of_ecgs = {key for key in mine if ".embeddings.p" in key and "vision_model" in key} if name == "siglip" else set()
    for key in mine.keys() - of_ecgs:
        np.testing.assert_array_equal(mine[key], theirs[key.removeprefix("vision_encoder.")], err_msg=key)
    assert loop.train(begun)
    lines = [line for line in runs.lines(tmp_path / "run") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    told = an_elm_begins_with_it(begun, tmp_path, **{**changes, "objective": "sft", "encoder__checkpoint": None})
    assert told.keys() == mine.keys()
    moved = [key for key in mine if not np.array_equal(told[key], mine[key])]
    assert any("text_model" in key for key in moved) and any("logit_scale" in key for key in moved)


@pytest.mark.slow  # trains
def test_a_report_is_written_from_its_ecg(bert: Path, tmp_path: Path, here: None) -> None:
    sizes = {"width": 32, "layers": 1, "heads": 2, "embed_dim": 16, "decoder_layers": 1, "decoder_heads": 2}
    changes = {"encoder__name": "ecg_coca", "encoder__config": sizes, "data__normalize": "none"}
    begun = config(tmp_path / "run", bert, objective="coca", **changes)
    assert loop.train(begun)
    lines = [line for line in runs.lines(tmp_path / "run") if "loss" in line]
    assert all(np.isclose(line["loss"], line["contrastive"] + 2 * line["caption"], rtol=1e-5) for line in lines)
    assert lines[-1]["caption"] < lines[0]["caption"] and "val_caption" in lines[-1]
    told = an_elm_begins_with_it(begun, tmp_path, **changes)
    for name, value in load_file(bert / "model.safetensors").items():
        if "pooler" not in name:
            np.testing.assert_array_equal(told[f"text.transformer.{name}"], value)


def an_elm_begins_with_it(trained: Config, folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """The tensors of a run's export; an ELM that names it has the encoder of the run's last step."""
    export(trained, folder / "out", "latest")
    file = folder / "out" / "encoder.safetensors"
    sizes = {"encoder__config": dict(trained.encoder.config)}
    if trained.encoder.checkpoint:
        told = json.loads((Path(trained.encoder.checkpoint) / "config.json").read_text())
        sizes = {"encoder__config": {**told, **trained.encoder.config}}
    changes |= {**sizes, "encoder__checkpoint": str(file), "update": "connector"}
    again = runs.config(folder / "begun", **changes)
    parts = assemble(again)
    arrays = Weights(parts).place(array_shardings(parts.structure, make_mesh(again.mesh, jax.devices()[:1])))
    saved = saved_arrays(Path(trained.workdir), 6)
    learnt = {name.partition("['")[2].removesuffix("']"): x for name, x in saved.items() if "optimizer" not in name}
    mine = [name for name in arrays if name.startswith("encoder.")]
    assert len(mine) > 10
    for array in mine:
        np.testing.assert_array_equal(np.asarray(arrays[array]), learnt[array], err_msg=array)
    judged = open_encoder(str(folder / "out"), ConfigFlags.parse([]), "latest")  # with its tower, as the probe has it
    assert judged.assembly.tokenizer is not None and judged.assembly.objective.samples.phase == REPORT
    return load_file(file)


class Linear:
    """Stands for an encoder: its features are products with one matrix."""

    def __init__(self, kernel: jax.Array) -> None:
        self.kernel = kernel
        self.log_scale, self.bias = (nnx.Param(jnp.full(1, x)) for x in (2.0, -3.0))

    def narrow_map(self, signals: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        return signals @ self.kernel

    def att_pool(self, features: jax.Array) -> jax.Array:
        return features[:, 0]

    def views(self, features: jax.Array, key: Any) -> tuple[jax.Array, jax.Array]:
        return features.mean(1), features[:, 1]

    def ecgs(self, signals: jax.Array) -> jax.Array:
        return signals.mean(1) @ self.kernel

    def texts(self, ids: jax.Array) -> jax.Array:
        return jnp.sin(ids.astype(jnp.float32)) @ self.kernel


@pytest.mark.slow  # compiles for three meshes
@pytest.mark.parametrize(("name", "encoder"), [("merl", "merl"), ("siglip", "siglip_ecg"), ("clip", "clip")])
def test_negatives_are_those_of_all_devices(name: str, encoder: str, bert: Path, tmp_path: Path, here: None) -> None:
    """Loss and gradient of eight rows, one on each device or two on each of four, are those of one device's; an empty
    row changes nothing."""
    rng = np.random.default_rng(0)
    shape = BatchShape(tokens=16, signals=1, targets=1)
    batch = empty_batch(shape, {"ecg": ArraySpec((3, 16))}, 8)
    batch.signals["ecg"][:] = rng.standard_normal(batch.signals["ecg"].shape)
    batch.tokens[:] = rng.integers(0, 50, batch.tokens.shape)
    batch.signal_weights[:7] = 1
    kernel = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    objective = objective_of(config(tmp_path, bert, objective=name, encoder__name=encoder))

    def loss(kernel: jax.Array, batch: Any, mesh: Any) -> jax.Array:
        with placed(None if mesh is None else MeshPlacement(mesh)):
            found = objective.loss(cast(Any, SimpleNamespace(encoder=Linear(kernel))), batch, None, ())
        return found["loss"] / objective.counts(batch)["loss"]

    value, gradient = jax.value_and_grad(loss)(kernel, jax.tree.map(jnp.asarray, batch), None)
    few = jax.tree.map(lambda x: jnp.asarray(x[:7]), batch)
    np.testing.assert_allclose(loss(kernel, few, None), value, rtol=1e-6)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices())
        place = batch_sharding(mesh, micro_batches=False)
        step = jax.jit(lambda k, b, m=mesh: jax.value_and_grad(loss)(k, b, m), in_shardings=(None, place))
        found = step(kernel, jax.device_put(batch, place))
        np.testing.assert_allclose(found[0], value, rtol=1e-6)
        np.testing.assert_allclose(found[1], gradient, rtol=1e-5, atol=1e-6)


def test_an_empty_row_of_zeros_leaves_the_gradient_finite() -> None:
    pairs = jnp.asarray([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]])
    there = jnp.asarray([True, True, False])
    gradient = jax.grad(lambda x: jnp.stack(info_nce(x, x[:, ::-1], there, 10.0)).sum())(pairs)
    assert np.isfinite(gradient).all() and not gradient[2].any() and gradient[:2].any()


def test_what_cannot_be_held_against_text(bert: Path, tmp_path: Path, here: None) -> None:
    for changes, error in (
        ({"optim__accum_steps": 2}, "optim.accum_steps: found 2; expected 1 with objective=merl"),
        ({"encoder__name": "st_mem"}, "encoder.name: found st_mem; expected merl with objective=merl"),
    ):
        with pytest.raises(UserError, match=error):
            objective_of(config(tmp_path, bert, **changes))
    other = tmp_path / "gpt"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for changes, error in (
        ({"ssl__text": None}, "ssl.text: found nothing"),
        ({"ssl__text": str(tmp_path / "nowhere")}, "ssl.text: found .*which is no folder"),
        ({"ssl__text": str(other)}, "a model of type 'gpt2'; expected one of type bert or roberta"),
        ({"data__max_len": 80}, "data.max_len: found 80; expected at most the tower's context, 40"),
    ):
        with pytest.raises(UserError, match=error):
            assemble(config(tmp_path, bert, **changes))


def test_a_tower_has_its_tokenizers_padding_and_rows_for_its_ids(tmp_path: Path) -> None:
    folder = towers.pair_folder(tmp_path / "siglip2", "siglip2")

    def read(**changes: int) -> dict[str, Any]:
        told = json.loads((folder / "config.json").read_text())
        told["text_config"] |= changes
        (folder / "config.json").write_text(json.dumps(told))
        return read_text_tower("siglip2.pretraining", SslConfig(text=str(folder)), 16)[1]

    assert read(pad_token_id=7)["pad_token_id"] == 0
    with pytest.raises(UserError, match="a tokenizer of ids up to .* and padding 0; expected .*ids below 60"):
        read(vocab_size=60)
