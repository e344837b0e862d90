"""A model with two towers, as GEM: views that are missing, dropped, swapped or left out; pages, and how they wear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from export.made_runs import export_command, make_run
from PIL import Image

from elm_jax import cli
from elm_jax.assemble import Assembly, assemble
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, to_dict
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.ecg import rasterize, wear
from elm_jax.ecg.names import LEADS
from elm_jax.errors import UserError
from elm_jax.evaluation.attention import attention
from elm_jax.evaluation.controls import Question, Source
from elm_jax.exchange.exported import open_exported
from elm_jax.export import main as export_main
from elm_jax.folders import read_json, write_json
from elm_jax.import_weights import main as import_main
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.inference.session import Session
from elm_jax.training.loop import train

COCA = {"patch_size": 50, "width": 16, "layers": 1, "heads": 2, "embed_dim": 8}
CLIP = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32,
        "patch_size": 16, "fit": "crop"}  # fmt: skip
GEM = {
    "elm": "gem", "encoder__name": "ecg_coca", "encoder__config": COCA, "encoder__tokens": 11,
    "encoders": {"image": {"name": "clip_patches", "config": CLIP, "tokens": 4}}, "update": ["connector", "llm"],
    "data__names": ["demo:train=16,val=4,test=4"], "data__normalize": "none", "data__drop_views": 0.5,
    "data__swap_views": 0.3, "data__augment_paper": True, "data__image_layout": "3x4", "data__share": "ecg",
    "llm__scratch": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp": 32, "max_len": 256},
    "llm__compute_dtype": "float32", "train__batch_size": 8, "train__steps": 4, "train__save_every": 2,
    "optim__schedule": "constant", "data__max_len": 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs.prepare(monkeypatch, tmp_path / "cache")


def config(workdir: Path, **changes: Any) -> Config:
    return runs.config(workdir, **{**GEM, **changes})


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Assembly]:
    yield assemble(config(tmp_path_factory.mktemp("gem")))


def test_a_view_is_dropped_or_comes_first_by_seed_epoch_and_recording(gem: Assembly) -> None:
    dataset = gem.dataset("train")
    shown = [list(view) for epoch in range(40) for view in dataset.signals(0, epoch)]
    assert shown == [list(view) for epoch in range(40) for view in dataset.signals(0, epoch)]
    counts = {tuple(each): shown.count(each) for each in shown}
    assert set(counts) == {("ecg",), ("image",), ("ecg", "image"), ("image", "ecg")}
    assert 10 <= counts["ecg",] + counts["image",] <= 30
    assert list(dataset.signals(0)[0]) == list(gem.dataset("test").signals(0, 3)[0]) == ["ecg", "image"]
    other = replace(dataset.signal, seed=1)
    assert shown != [list(other.show(dataset.records[0].ecg_paths[0], 0, epoch)) for epoch in range(40)]


def test_what_is_dropped_is_in_no_place_of_the_rows(gem: Assembly) -> None:
    """Questions about one ECG share what they begin with: the places that are left."""
    dataset, data = gem.dataset("train"), gem.config.data
    index = dataset.length_index(data.share, data.max_bad_records)
    assert index.shares_ecg.all()
    source = StepSource(dataset, Plan(index, rows=2, max_len=96, pack=True, seed=0), steps=2)
    seen = set()
    for step in range(2):
        batch = jax.tree.map(lambda x: x[0], source[step].batch)
        for row, planned in enumerate(source.plan.rows(step)):
            for number, group in enumerate(planned):
                mine = batch.group_ids[row] == number + 1
                slots = batch.signal_slot[row][mine] - 15 * number
                (shown,) = dataset.signals(group.samples[0], source.plan.epoch_of(step))
                seen.add(tuple(shown))
                own = {"ecg": range(11), "image": range(11, 15)}
                assert slots[slots >= 0].tolist() == [slot for view in shown for slot in own[view]]
                lengths = index.length[list(group.samples)] - group.prefix
                absent = 15 - (slots >= 0).sum()
                assert mine.sum() == group.prefix - absent + lengths.sum()
                assert batch.positions[row][mine][: group.prefix - absent].tolist() == [*range(group.prefix - absent)]
    assert len(seen) > 1


def test_what_a_record_lacks_is_drawn_or_left_out_or_said(gem: Assembly, tmp_path: Path) -> None:
    page = rasterize.draw(np.zeros((12, 500), np.float32), 50, LEADS, layout="3x4")
    Image.fromarray(page // 2).save(tmp_path / "own.png")
    Image.fromarray(page // 2).save(tmp_path / "other.jpg")
    signal = replace(gem.signal, root=str(tmp_path))

    def given(missing: str, **changes: Any) -> Any:
        shown, paper = replace(signal.shown, missing=missing, **changes), replace(signal.paper, folder=str(tmp_path))
        further = {view: replace(spec, shown=shown, paper=paper) for view, spec in signal.further.items()}
        return replace(signal, shown=shown, paper=paper, further=further)

    np.save(tmp_path / "own.npy", np.zeros((12, 500), np.float32))
    np.save(tmp_path / "bare.npy", np.zeros((12, 500), np.float32))
    drawn, own = signal.show("own.npy", 0), given("error").show("own.npy", 0)
    assert list(own) == ["ecg", "image"] and own["image"].mean() < 0.6 * drawn["image"].mean()
    assert list(given("mask").show("bare.npy", 0)) == list(given("mask").show("bare.npy", 0, 3)) == ["ecg"]
    np.testing.assert_array_equal(given("draw").show("bare.npy", 0)["image"], drawn["image"])
    assert list(given("mask").show("other.jpg", 0)) == ["image"]
    assert list(given("error", left_out=("image",)).show("own.npy", 0)) == ["ecg"]
    wrong = {"bare.npy": "no image of it", "other.jpg": "an image, of which there is no signal"}
    for path, told in wrong.items():
        with pytest.raises(UserError, match=told):
            given("error").show(path, 0)
    with pytest.raises(UserError, match="of which nothing is shown"):
        given("mask", left_out=("image",)).show("other.jpg", 0)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(UserError, match="a PNG or JPEG image"):
        given("mask").show("bad.png", 0)
    for condition in ("zeros", "noise"):  # a control changes what there is, and adds nothing
        control = replace(given("mask"), perturb=condition)
        assert [list(control.show(f, 0)) for f in ("other.jpg", "bare.npy")] == [["image"], ["ecg"]]
        assert list(control.show("own.npy", 0)) == ["ecg", "image"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__left_out": ["ecg", "image"]}, "data.left_out"),
        ({"encoder__name": "clip_patches", "encoder__config": CLIP}, "an encoder of signal for view ecg of elm=gem"),
        ({"encoders": {"image": {"name": "merl"}}}, "an encoder of rgb for view image of elm=gem"),
        ({"encoders": {"image": {"name": "clip_patches", "config": CLIP}}}, "encoder.tokens: found 1; expected 4"),
        ({"encoders": {"image": {"name": "clip_patches", "config": {**CLIP, "layer": -4}}}}, "a block: 1 to 2"),
        ({"data__leads": ["I", "II", "V1"]}, "a number of leads that divides into 4 columns"),
        ({"data__image_rhythm": ["V1"], "data__leads": ["I", "II", "III", "aVR"]}, "one of the leads I, II, III, aVR"),
    ],
)
def test_what_fits_no_such_model_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        assemble(config(tmp_path, **changes))
    assert told in str(error.value)


def test_leads_stand_where_the_layout_has_them() -> None:
    for layout, columns in rasterize.LAYOUTS.items():
        rows = 12 // columns
        for number in (0, 4, 11):
            signal = np.zeros((12, 500), np.float32)
            signal[number, ::10] = 1.5  # as dense as ink can be
            rhythm = ("V6",) if number == 11 else ()
            draw = [rasterize.draw(x, 50, LEADS, layout=layout, rhythm=rhythm) for x in (signal, 0 * signal)]
            assert draw[0].shape[:2] == rasterize.page_size(12, 10, layout=layout, rhythm=len(rhythm))
            changed = (draw[0] != draw[1]).any(-1)
            if rhythm:
                assert np.ptp(np.nonzero(changed[-150:])[1]) > 950  # whole, below
                continue
            down, across = np.nonzero(changed)
            column, row = divmod(number, rows)
            edges = np.linspace(0, 1000, columns + 1)[column : column + 2]
            assert edges[0] <= across.min() and across.max() <= edges[1]
            assert abs(down.mean() * rows / len(changed) - row - 0.5) < 0.5


def test_wear_changes_a_page_and_is_drawn_from_its_generator_alone() -> None:
    page = rasterize.draw(np.zeros((12, 500), np.float32), 50, LEADS, layout="3x4")
    before = page.copy()
    for change in wear.CHANGES:
        one, again, other = (change(page, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert one.shape == page.shape and one.dtype == np.uint8
        np.testing.assert_array_equal(one, again, err_msg=change.__name__)
        assert not np.array_equal(one, page) and not np.array_equal(one, other), change.__name__
    assert len({wear.worn(page, np.random.default_rng(seed)).tobytes() for seed in range(6)}) > 4
    np.testing.assert_array_equal(page, before)


def test_an_export_shows_what_the_run_does_and_no_more_than_that_is_read_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pages = {"data__image_rhythm": ["II"], "data__left_out": ["ecg"], "data__missing": "mask"}
    tree = {**to_dict(config(tmp_path / "run", **pages)), "update": ["connector", "llm"]}
    ours, out = assemble(make_run(tmp_path / "run", tree)), tmp_path / "out"
    assert export_command("--checkpoint", tmp_path / "run", "--out", out) == 0
    signal = open_exported(out, ConfigFlags()).assembly.signal
    jax.tree.map(np.testing.assert_array_equal, signal.show("demo:test:1", 0), ours.signal.show("demo:test:1", 0))
    assert signal.shown.missing == "mask" and "was trained with" not in caplog.text
    facts = read_json(out / "elm.json")
    assert facts["signal"]["image_layout"] == "3x4" and facts["signal"]["image_rhythm"] == ["II"]

    def opened(**changes: Any) -> Config:
        write_json(out / "elm.json", {**facts, "config": {**facts["config"], **changes}})
        return open_exported(out, ConfigFlags()).assembly.config

    free = {"root": "/", "outside_root": True, "images": "/", "prefixes": {"": "/"}}
    data = opened(data={**facts["config"]["data"], **free}, retrieval={"index": "/"}, init_from="/").data
    assert (data.root, data.outside_root, data.images, data.prefixes) == (".", False, None, {})
    for wrong in ({"encoders": 5}, {"encoders": {"image": 5}}, {"encoders": {"image": {"bogus": 1}}}, {"eval": []},
                  {"encoder": None}, {"encoders": {"picture": {}}}, {"data": "x"}, {"elm": ["gem"]}):  # fmt: skip
        with pytest.raises(UserError):
            opened(**wrong)


@pytest.mark.slow  # long: trains, answers, looks, exports and imports
def test_such_a_model_trains_goes_on_speaks_and_comes_back(tmp_path: Path) -> None:
    whole, parts = config(tmp_path / "whole"), config(tmp_path / "parts", train__steps=2)
    train(whole)
    train(parts)
    train(replace(parts, train=replace(parts.train, steps=4)))
    ours, again = (TrainedModel(c, "latest") for c in (whole, parts))
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name], err_msg=name)
    dataset, answers = ours.assembly.dataset("test"), {}
    for left_out in ((), ("ecg",), ("image",)):
        shown = replace(dataset.signal.shown, left_out=left_out)
        signal = replace(dataset.signal, shown=shown)
        told = Source(type(dataset)(dataset.records, dataset.tokenizer, dataset.text, signal), "real")
        (prompt,) = told.load([Question(0, 0, "")])[0].values()
        answers[left_out] = ours.option_probabilities(prompt, ["60", "70 bpm"])
        found = attention(ours, prompt, "60")
        places = 15 - {(): 0, ("ecg",): 11, ("image",): 4}[left_out]
        assert len(found.ecg_tokens[0]) == len(found.spans[0]) == places and 0 < found.ecg_share < 1
    assert len({str(each) for each in answers.values()}) == 3  # each view counts
    session = Session(ours)
    session.add_ecg("demo:test:1")
    assert isinstance(session.say("What is the heart rate?"), str)
    out, back = tmp_path / "out", tmp_path / "back"
    flags = ["--checkpoint", whole.workdir, "--step", "latest", "--out", str(out), "--llava"]
    assert cli.guard(export_main, flags) == 0
    said = ["--config.llm.chat=None", "--config.encoder.config.heads=2", "--config.data.image_layout=3x4"]
    said += ["--config.encoders.image.config.num_attention_heads=2", "--config.data.max_len=96"]
    assert cli.guard(import_main, [str(out / "llava"), "--out", str(back), *said]) == 0
    brought = TrainedModel(replace(whole, workdir=str(back)), "latest")
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, brought.arrays[name][: len(array)], err_msg=name)
    prompt = Prompt(prompt.rendered, [ours.assembly.signal.show("demo:test:2", 0)])
    assert ours.answers([prompt], whole.eval) == brought.answers([prompt], whole.eval)
