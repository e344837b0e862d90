"""Retrieval: an index of recordings, what is found in it for an ECG, what is written of that, and what it brings."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import Asked, FakeModel, fake_config
from texts import chat_tokenizer

from elm_jax import index as command
from elm_jax.config import DataConfig, resolve
from elm_jax.data.dataset import Dataset
from elm_jax.data.represent import SignalSpec
from elm_jax.data.retrieving import Sought
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.features import NAMES
from elm_jax.errors import UserError
from elm_jax.evaluation import evaluator
from elm_jax.evaluation.evaluator import evaluate
from elm_jax.evaluation.retrieved import retrieved_for
from elm_jax.folders import file_checksum, seal, write_json
from elm_jax.inference.session import Session
from elm_jax.retrieval import build, lookup
from elm_jax.retrieval.build import build_index
from elm_jax.retrieval.index import INDEX, MOST_TEXT, SCALE, Index, bytes_of, opened, study_of
from elm_jax.retrieval.lookup import Retriever, retriever_of
from elm_jax.retrieval.nearest import Exact, Faiss, Vectors, nearest
from elm_jax.text.render import render
from elm_jax.text.retrieved import Retrieved, block, own_numbers
from elm_jax.text.turns import Words, with_words
from elm_jax.weights.safetensors import Safetensors, save_safetensors

RATE, LENGTH, PEOPLE = 50, 500, 8  # each with two studies
LEADS = tuple(range(12))
NOBODY = [np.zeros(0, np.int64)]
VERSIONS = {"0.0.2": "rag_0_0_2", "0.0.3": "rag_0_0_3", "0.0.4": "rag_0_0_4", "92bff32": "rag_92bff32"}


def write_table(folder: Path, name: str = "records.jsonl", **columns: Any) -> None:
    """Two ECGs of each of PEOPLE, each with a report that names it; the second is in the test split."""
    rows = [
        {"ecg_path": f"demo:train:{i}", "report": f"report of recording {i}", "patient_id": str(i // 2),
         "text": ["kind", "What is written of it?", f"report of recording {i}"], "name": "x",
         "split": "test" if i % 2 else "train", **columns}
        for i in range(2 * PEOPLE)
    ]  # fmt: skip
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_of(folder: Path, **keys: Any) -> DataConfig:
    told = {"names": ("records.jsonl",), "root": str(folder), "sampling_rate": RATE, "segment_len": LENGTH}
    return DataConfig(**{**told, **keys})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and an index of all its recordings."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_table(folder)
    build_index(data_of(folder), folder / "index", ("train", "test"), signals=True, progress=False)
    return folder


def config_of(folder: Path, **keys: Any) -> Any:
    told = {"data__names": ["records.jsonl"], "data__root": str(folder), "retrieval__index": str(folder / "index")}
    told |= {"data__sampling_rate": RATE, "data__segment_len": LENGTH, "workdir": str(folder / "run")}
    return fake_config(**{**told, **keys})


def dataset_of(config: Any, split: Any = "train", family: str = "qwen2") -> Dataset:
    model = FakeModel(config, family)
    signal = replace(model.assembly.signal, retrieval=retriever_of(config, family))
    return Dataset(load_records(config.data, split, 0), model.assembly.tokenizer, model.assembly.text, signal)


def prompt_of(dataset: Dataset, index: int) -> str:
    return dataset.prompts(index)[0][0].prompt


# -- the index ------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_an_index_is_the_same_from_any_number_of_workers_and_after_a_stop(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files_of(made / "index")
    build_index(data_of(made), tmp_path / "two", ("train", "test"), signals=True, workers=2, progress=False)
    assert files_of(tmp_path / "two") == whole
    # One part after another, stopped in the second.
    monkeypatch.setattr(build, "_PART", 4)
    monkeypatch.setattr(build, "_LEAST_PART", 4)
    build_index(data_of(made), tmp_path / "parts", ("train", "test"), signals=True, progress=False)
    parts = files_of(tmp_path / "parts")
    asked, read = [], SignalSpec.load_raw

    def load_raw(spec: SignalSpec, path: str, key: int) -> np.ndarray:
        asked.append(path)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return read(spec, path, key)

    monkeypatch.setattr(SignalSpec, "load_raw", load_raw)
    with pytest.raises(KeyboardInterrupt):
        build_index(data_of(made), tmp_path / "again", ("train", "test"), signals=True, progress=False)
    assert not (tmp_path / "again" / INDEX).exists()
    build_index(data_of(made), tmp_path / "again", ("train", "test"), signals=True, progress=False)
    assert files_of(tmp_path / "again") == parts
    assert len(asked) == 6 + 12, "of the first part nothing is read again"
    a, b = Index(made / "index"), Index(tmp_path / "parts")
    for name, x in a.scale.items():
        np.testing.assert_allclose(x, b.scale[name], rtol=1e-9, atol=1e-12)
    assert [a.entry(i).path for i in range(len(a))] == [b.entry(i).path for i in range(len(b))]


def test_the_command_says_what_it_leaves(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"ecg_path": "demo:train:1", "text": "sinus rhythm"}, {"ecg_path": "none.npy", "text": "absent"}]
    rows += [{"ecg_path": "demo:train:2", "text": ["x", "Which?", "yes"]}]
    rows += [{"ecg_path": "demo:train:1", "text": "twice"}]
    rows += [{"ecg_path": "noise", "text": "noise"}, {"ecg_path": ["demo:train:3", "demo:train:4"], "text": "two"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["t.jsonl", "--root", str(tmp_path), "--sampling-rate", "50", "--segment-len", "500", "--workers", "1"]
    command.main([*flags, "--out", str(tmp_path / "i")])
    out, error = capsys.readouterr()
    assert out.splitlines()[:3] == ["entries: 2", "reports: 1", "left_out: 1"]
    assert "none.npy" in error
    found = Index(tmp_path / "i")
    assert [found.entry(i).report for i in range(2)] == ["sinus rhythm", ""]
    with pytest.raises(UserError, match="--out.*segment_len 500") as caught:
        command.main([*flags, "--segment-len", "400", "--out", str(tmp_path / "i")])
    assert "give another folder" in str(caught.value)
    with pytest.raises(UserError, match="other files"):
        command.main([*flags, "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"--segment-len.*feature_windows.*224"):
        short = [*flags, "--segment-len", "223", "--compat", "feature_windows"]
        command.main([*short, "--out", str(tmp_path / "j")])
    with pytest.raises(UserError, match="--splits.*'tset'"):
        command.main([*flags, "--out", str(tmp_path / "j"), "--splits", "tset"])


def test_a_report_that_could_not_be_read_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"ecg_path": f"demo:train:{i}", "text": "\u00e9" * (MOST_TEXT // 2 + i)} for i in range(2)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = build_index(data_of(tmp_path), tmp_path / "index", progress=False)
    assert (said["entries"], said["left_out"]) == (1, 1) and "a report of 1048578 bytes" in capsys.readouterr().err
    assert len(Index(tmp_path / "index").entry(0).report) == MOST_TEXT // 2


def test_a_part_without_entries_is_passed_over_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["none.npy", "absent.npy", "demo:train:0", "demo:train:1"]
    rows = [{"ecg_path": path, "text": "a report"} for path in paths]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(build, "_PART", 2)
    monkeypatch.setattr(build, "_LEAST_PART", 2)

    def built() -> dict[str, Any]:
        return build_index(data_of(tmp_path), tmp_path / "index", progress=False)

    said = built()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "ecg_features", Mock(side_effect=KeyboardInterrupt))
        built()
    assert built() == said and (said["entries"], said["left_out"]) == (2, 2)


def test_an_index_that_was_stopped_while_it_was_built_anew_is_none(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copytree(made / "index", folder)
    write_table(tmp_path, report="other")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "file_checksum", Mock(side_effect=KeyboardInterrupt))
        build_index(data_of(tmp_path), folder, ("train", "test"), signals=True, progress=False)
    with pytest.raises(UserError):
        Index(folder)
    # Or of which only a part has come: the parts' sizes, and the scale, are those of another index.
    for name in ("part-00000.parquet", SCALE):
        shutil.copytree(made / "index", folder, dirs_exist_ok=True)
        build_index(data_of(tmp_path), tmp_path / "other", progress=False, signals=True)
        shutil.copy(tmp_path / "other" / name, folder)
        with pytest.raises(UserError, match=name):
            Index(folder)


@pytest.mark.parametrize(
    ("path", "study"),
    [
        ("ptb_xl/preprocessed_2500/records500_00000_00017_hr_3.npy", "ptb_xl 00017"),
        ("records100/00000/00017_lr", "ptb_xl 00017"),
        ("files/p1000/p10000032/s40689238/40689238", "mimic 40689238"),
        ("mimic/files_p1000_p10000032_s40689238_40689238_0.npy", "mimic 40689238"),
        ("a/preprocessed_2500/b_name_2.npy", "b_name"),
        ("ecgs/ecg_0001.npy", "ecgs/ecg_0001"),
        ("./ecgs/ecg_0002.hea", "ecgs/ecg_0002"),
        ("demo:train:3", "demo:train:3"),
    ],
)
def test_segments_and_copies_are_of_one_study(path: str, study: str) -> None:
    assert study_of(path) == study


def test_a_folder_that_is_no_index_or_a_damaged_one_is_told_in_a_line(made: Path, tmp_path: Path) -> None:
    def damaged(damage: Callable[[Path], Any]) -> str:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made / "index", folder)
        damage(folder)
        opened.cache_clear()
        nearest.cache_clear()
        with pytest.raises(UserError) as caught:
            found = Index(folder)
            Exact(Vectors(found, "combined", "z_scored", LEADS))
            found.owned([1])
            found.entry(3)
        return str(caught.value)

    vectors, texts, scale = "part-00000.safetensors", "part-00000.parquet", "scale.safetensors"
    small = {"features": np.zeros((3, 4), np.float32)}
    sizes = json.loads((made / "index" / INDEX).read_text())
    sizes = {key: value for key, value in sizes.items() if key not in ("checksum", "version")}
    (part,) = sizes["parts"]
    huge = {**sizes, "parts": [{**part, "entries": 10**9}]}
    away = {**sizes, "parts": [{**part, "name": "../../etc"}]}

    def believed(folder: Path, **arrays: np.ndarray) -> None:
        """Other arrays in the part, of which index.json says the size."""
        save_safetensors(folder / vectors, dict(Safetensors(made / "index" / vectors)) | arrays)
        write_json(folder / INDEX, seal({**sizes, "parts": [{**part, "bytes": bytes_of(folder, 0)}]}))

    nan, large = np.full((16, 288), np.nan, np.float32), np.full((16, 12 * LENGTH), 1e30, np.float32)
    assert "no folder" in damaged(shutil.rmtree)
    assert "without index.json" in damaged(lambda folder: (folder / INDEX).unlink())
    assert "other content" in damaged(lambda folder: (folder / INDEX).write_text('{"format": 1}'))
    assert "JSON" in damaged(lambda folder: (folder / INDEX).write_bytes(pickle.dumps(1)))
    assert "../../etc" in damaged(lambda folder: write_json(folder / INDEX, seal(away)))
    assert "(16, 288)" in damaged(lambda folder: write_json(folder / INDEX, seal(huge)))  # before anything is reserved
    assert vectors in damaged(lambda folder: (folder / vectors).write_bytes(pickle.dumps([1] * 99)))
    assert "bytes" in damaged(lambda folder: save_safetensors(folder / vectors, small))
    assert "(3, 4)" in damaged(lambda folder: believed(folder, **small))
    assert "damaged, an index with features or signals that are not finite" in damaged(
        lambda folder: believed(folder, features=nan)
    )
    assert "too large" in damaged(lambda folder: believed(folder, signals=large))
    assert "in their order" in damaged(lambda folder: believed(folder, owned=np.full(32, 16, np.int32)))
    assert scale in damaged(lambda folder: save_safetensors(folder / scale, small))
    assert texts in damaged(lambda folder: (folder / texts).write_bytes(b"PAR1"))
    assert vectors in damaged(lambda folder: (folder / vectors).unlink())


# -- search ---------------------------------------------------------------------------------------------------


def golden_index(folder: Path, out: Path) -> tuple[Index, dict[str, Any], dict[str, np.ndarray]]:
    """An index of the golden's entries, in its order, with its features."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = json.loads((folder / "expected.json").read_text())
    with np.load(folder / "data.npz") as arrays:
        given = {name: arrays[name] for name in arrays.files}
    features = given["features"].astype(np.float32)
    signals = (given["entries"] / np.float32(1000)).astype(np.float32).reshape(len(features), -1)
    owners = {"owners": np.zeros(0, np.uint64), "owned": np.zeros(0, np.int32)}
    out.mkdir()
    save_safetensors(out / "part-00000.safetensors", {"features": features, "signals": signals, **owners})
    scale = {
        f"{name}_{what}": getattr(x.astype(np.float64), of)(0)
        for name, x in (("features", features), ("signals", signals))
        for what, of in (("mean", "mean"), ("deviation", "std"))
    }
    save_safetensors(out / "scale.safetensors", scale)
    columns = {"ecg_path": said["order"], "study": said["order"], "report": said["reports"]}
    pq.write_table(pa.table({**columns, "patient_id": [""] * len(features)}), out / "part-00000.parquet")
    facts = {
        "format": 1,
        "names": list(NAMES),
        "segment_len": 1250,
        "sampling_rate": 250,
        "scale": file_checksum(out / SCALE),
    }
    facts["compat"] = ["feature_windows"]
    parts = [{"name": "part-00000", "entries": len(features), "bytes": bytes_of(out, 0)}]
    write_json(out / INDEX, seal({**facts, "signals": True, "reports": len(features), "parts": parts}))
    return Index(out), said, given


def test_the_reference_s_neighbours_come_out_exactly(golden: Callable[[str], Path], tmp_path: Path) -> None:
    index, said, given = golden_index(golden("rag_index"), tmp_path / "index")
    searches = {mode: Exact(Vectors(index, mode, "raw", LEADS)) for mode in ("signal", "feature", "combined")}
    for name, by_mode in said["queries"].items():
        signal = (given[f"query/{name}"] / np.float32(1000)).astype(np.float32).reshape(-1)
        features = given[f"query_features/{name}"].astype(np.float32)
        for mode, search in searches.items():
            query = {"signal": signal, "feature": features, "combined": np.concatenate([features, signal])}[mode]
            exact = by_mode[mode]["exact_sqdist_first12"]
            for k in (1, 5, 10):
                ((rows, distances),) = search(query[None], k, NOBODY)
                told = by_mode[mode][f"k{k}"]
                assert rows.tolist() == told["ids"], (name, mode, k)
                np.testing.assert_allclose(distances, exact[:k], rtol=1e-5, atol=1e-6)
                retriever = Retriever(
                    str(tmp_path / "index"), k, mode, "raw", "report", "system", "exact", LEADS, 250,
                    ("rag_protocol", "feature_windows"),
                )  # fmt: skip
                assert [row for row, _ in retriever.by_protocol(rows, distances)] == told["ids_after_filter"]
    everything = said["k63_of_60"]
    retriever = replace(retriever, k=63)
    found = index.rows("features", np.arange(60))
    rows, distances = retriever.padded(np.arange(60), np.zeros(60, np.float32))
    assert rows.tolist()[-3:] == everything["tail_ids"][-3:] and len(found) == 60
    assert distances[-1] == np.float32(everything["tail_dist"][-1])


def large_index(out: Path, entries: int, seed: int = 0) -> Index:
    """An index of made features with a few large columns and many alike, in parts of different sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((40, 288)) * np.geomspace(1000, 0.01, 288)
    features = (rng.standard_normal((entries, 40)) ** 3 @ mixed + 5).astype(np.float32)
    ends, parts = np.sort(rng.choice(np.arange(1, entries), 3, replace=False)), []
    out.mkdir()
    for number, part in enumerate(np.split(features, ends)):
        owned = {"owners": np.arange(len(part), dtype=np.uint64), "owned": np.arange(len(part), dtype=np.int32)}
        save_safetensors(out / f"part-{number:05d}.safetensors", {"features": part, **owned})
        parts.append({"name": f"part-{number:05d}", "entries": len(part), "bytes": bytes_of(out, number)})
    columns = features.astype(np.float64)
    scale = {"features_mean": columns.mean(0), "features_deviation": columns.std(0)}
    save_safetensors(out / "scale.safetensors", scale)
    facts = {"format": 1, "names": list(NAMES), "segment_len": 500, "sampling_rate": 50, "compat": []}
    facts["scale"] = file_checksum(out / SCALE)
    write_json(out / INDEX, seal({**facts, "signals": False, "reports": 0, "parts": parts}))
    return Index(out)


@pytest.mark.parametrize("scaling", ["z_scored", "raw"])
def test_bounded_search_finds_what_comparing_with_all_finds(tmp_path: Path, scaling: str) -> None:
    index = large_index(tmp_path / "index", 5000)
    vectors = Vectors(index, "feature", scaling, LEADS)
    everything = np.concatenate([block for _, block in vectors.blocks()]).astype(np.float64)
    raw = index.rows("features", np.arange(0, 5000, 700)) * np.float32(1.01) + np.float32(0.1)
    queries = vectors.scaled(raw).astype(np.float64)
    excluded = [np.arange(i, 5000, 11 + i) for i in range(len(queries))]
    for k in (1, 7, 1500):  # the last is more than candidates that are looked at first
        for query, out, (rows, distances) in zip(queries, excluded, Exact(vectors)(raw, k, excluded), strict=True):
            exact = ((everything - query) ** 2).sum(1)
            exact[out] = np.inf
            order = np.argsort(exact, kind="stable")[:k]
            np.testing.assert_allclose(distances, exact[order], rtol=1e-4)
            assert (rows == order).mean() > 0.99 and not np.isin(rows, out).any()
    with pytest.raises(UserError, match="without signals"):
        Vectors(index, "combined", scaling, LEADS)


def test_the_leads_of_a_run_are_compared_alone(made: Path) -> None:
    index = Index(made / "index")
    some = Vectors(index, "combined", "raw", (1, 6))
    assert some.rows(np.arange(3)).shape == (3, 2 * (24 + LENGTH))
    everything = index.rows("features", np.array([2])).reshape(12, 24)[[1, 6]].reshape(-1)
    np.testing.assert_array_equal(some.rows(np.array([2]))[0, :48], everything)


def test_faiss_finds_the_same(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed (pip install 'elm-jax[retrieval]')")
    index = Index(made / "index")
    for mode in ("feature", "signal", "combined"):
        vectors = Vectors(index, mode, "z_scored", LEADS)
        arrays = {"feature": ["features"], "signal": ["signals"], "combined": ["features", "signals"]}[mode]
        queries = np.hstack([index.rows(name, np.arange(4)) for name in arrays]) * np.float32(1.01)
        excluded = [np.array([i, i + 1]) for i in range(4)]
        for (a, d), (b, e) in zip(
            Exact(vectors)(queries, 5, excluded), Faiss(vectors)(queries, 5, excluded), strict=True
        ):
            assert a.tolist() == b.tolist()
            np.testing.assert_allclose(d, e, rtol=1e-3)
    many = large_index(tmp_path / "index", 2000)
    vectors = Vectors(many, "feature", "raw", LEADS)
    copies = Faiss(vectors)(many.rows("features", np.arange(2000)), 1, NOBODY * 2000)
    assert all(distances[0] == 0 for _, distances in copies), "of so many queries FAISS's own distances lose digits"


def test_without_faiss_what_to_install_is_said(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"retrieval.search.*faiss.*elm-jax\[retrieval\]"):
        retriever_of(config_of(made, retrieval__search="faiss"), "qwen2")


# -- what is written, and where -------------------------------------------------------------------------------


def test_the_reference_s_texts_come_out_exactly(golden: Callable[[str], Path]) -> None:
    folder = golden("rag_prompt")
    said = json.loads((folder / "expected.json").read_text())
    blocks = {**said["blocks"], "0.0.3": said["blocks"]["0.0.4"]}
    with np.load(folder / "features.npz") as arrays:
        for version, by_set in blocks.items():
            for name, texts in by_set.items():
                given = [Retrieved(one["report"], arrays[one["feature_key"]]) for one in said["results"][name]]
                sizes = [np.abs(one.features) for one in given]
                given = [
                    one for one, x in zip(given, sizes, strict=True) if (x < 1e-3).mean() <= 0.5 and x.sum() >= 0.5
                ]
                for content, text in texts.items():
                    assert block(given, content, ["I"], (VERSIONS[version],)) == text, (version, name, content)


def test_the_reference_s_prompts_come_out_exactly(golden: Callable[[str], Path]) -> None:
    """With the text of the block where each version has it; the words are those of a model without special tokens."""
    folder = golden("rag_prompt")
    said = json.loads((folder / "expected.json").read_text())
    rows, checked = said["placement"], 0
    with np.load(folder / "features.npz") as arrays:
        found = [Retrieved(one["report"], arrays[one["feature_key"]]) for one in said["results"]["k3"]]
    for row in rows:
        if "qwen" not in row["model"] or not row["rag"] or row["placeholder_found_at"] < 0:
            continue
        version, content, place = (row[key] for key in ("version", "retrieved_information", "rag_prompt_mode"))
        if version != "92bff32":
            content, place = "combined", "user_query" if version == "0.0.3" else "system_prompt"
        text = block(found, content, ["I"], (VERSIONS[version],))
        if version == "92bff32" and place == "user_query" and content == "combined":
            numbers = row["prompt"].partition("[")[2].partition("]")[0]  # of an ECG that the golden has not
            text = own_numbers(np.array(numbers.split(), np.float64)) + text
        words = Words(system=text) if place == "system_prompt" else Words(f"{text}\n")
        turns = with_words(said["conversation"], [words], said["system_prompt"])
        prompt = row["prompt"]
        prompt = rows[int(prompt.rpartition(" ")[2])]["prompt"] if prompt.startswith("same as row") else prompt
        ours = render(turns, chat_tokenizer(), "qwen2", said["system_prompt"]).prompt
        assert ours.rstrip() == prompt.rstrip(), row
        checked += 1
    assert checked > 15


def test_ours_names_each_recording_and_dashes_hide_it() -> None:
    found = [Retrieved("Sinus\nrhythm.", np.arange(48.0)), Retrieved("", np.ones(48))]
    reports = block(found, "report", ["I", "II"])
    assert reports.splitlines()[1:] == ["1. report: Sinus rhythm.", "2. report: none"]
    assert block([], "combined", ["I"]) == ""
    both = block(found, "combined", ["I", "II"])
    assert "1. report: Sinus rhythm.; lead II: mean 24, std 25" in both
    assert "lead I: mean 0, std 1," in block(found, "feature", ["I", "V1"])
    hidden = block(found, "combined", ["I", "II"], dashes=True)
    assert "Sinus" not in hidden and "24" not in hidden and len(hidden) == len(both)
    assert block(found, "combined", ["I"], ("rag_0_0_4",), dashes=True).count(": ---\n") > 20


def test_words_of_the_system_stand_behind_its_prompt() -> None:
    asked = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert with_words(asked, [Words(system="A"), Words(system="B")], "Be brief.")[0].text == "Be brief.\nAB"
    own = [{"role": "system", "content": "Own."}, *asked]
    assert with_words(own, [Words(system="A")], "Be brief.")[0].text == "Own.\nA"
    assert with_words(asked, [Words(system="A")], None)[0].text == "A"
    assert with_words(asked, [Words("mine\n", "A")], "")[1].text == "mine\nWhy?"
    assert len(with_words(asked, [Words()], "Be brief.")) == 2


# -- in a run -------------------------------------------------------------------------------------------------


def found_in(prompt: str) -> list[int]:
    """The recordings whose reports a prompt has."""
    return [int(text.split()[0]) for text in prompt.split("report of recording ")[1:]]


@pytest.mark.parametrize("place", ["system", "question"])
def test_neither_the_study_nor_the_patient_is_retrieved_and_k_are(made: Path, place: str) -> None:
    for mode in ("feature", "signal", "combined"):
        dataset = dataset_of(config_of(made, retrieval__k=5, retrieval__place=place, retrieval__mode=mode))
        for i in range(len(dataset)):
            prompt = prompt_of(dataset, i)
            mine, rows = int(dataset.records[i].patient), found_in(prompt)
            assert len(rows) == 5 and mine not in {row // 2 for row in rows}
            system, _, asked = prompt.partition("<|im_start|>user")
            assert ("report of" in system, "report of" in asked) == (place == "system", place == "question")
            assert "Be brief." in system
    whole = dataset_of(config_of(made, retrieval__k=1000))
    assert len(found_in(prompt_of(whole, 0))) == 2 * PEOPLE - 2
    theirs = dataset_of(config_of(made, retrieval__k=2, compat=["rag_protocol", "rag_0_0_4"]))
    assert all(found_in(prompt_of(theirs, i))[0] == 2 * i for i in range(4)), "the reference finds the ECG itself"


def test_the_patient_of_a_record_that_does_not_say_is_whom_the_index_knows(made: Path, tmp_path: Path) -> None:
    write_table(tmp_path, patient_id="")
    shutil.copytree(made / "index", tmp_path / "index")
    dataset = dataset_of(config_of(tmp_path, retrieval__k=5, data__val_fraction=0.0))
    assert all(own not in {row // 2 for row in found_in(prompt_of(dataset, own))} for own in range(len(dataset)))
    # Nor is the patient of the record where it is another's ECG for which others are retrieved.
    sought = dataset.signal.sought("demo:train:4", 0, frozenset({dataset.records[1].patient}))
    found = replace(cast(Retriever, dataset.signal.retrieval), k=16).entries(sought)
    assert {str(i) for i in range(PEOPLE)} - {one for entry, _ in found for one in entry.patients} == {"1", "2"}
    # The reference finds them, and the evaluation says whose they are.
    theirs = dataset_of(config_of(tmp_path, retrieval__k=16, compat=["rag_protocol"], data__val_fraction=0.0))
    found = retrieved_for([(theirs, range(len(theirs)))])
    assert found["own_study"] == found["same_patient"] == found["ecgs"] == PEOPLE


def test_a_copy_under_another_name_is_not_retrieved(made: Path, tmp_path: Path) -> None:
    signal = signal_spec(data_of(made), 0).load_raw("demo:train:4", 0)
    content: Any = {"ecg": signal, "report": ""}
    np.save(tmp_path / "copy.npy", content, allow_pickle=True)
    retriever = retriever_of(config_of(made), "qwen2")
    assert retriever is not None
    spec = replace(signal_spec(data_of(tmp_path), 0), retrieval=retriever, bare_rate=RATE)
    (row, distance), *_ = retriever.found(spec.sought("copy.npy", 0))
    assert opened(retriever.folder).entry(row).path != "demo:train:4" and distance > 0.1


def test_retrieved_text_is_part_of_the_prompt_of_its_ecg_where_prompts_share(made: Path, tmp_path: Path) -> None:
    rows = [
        {"ecg_path": f"demo:train:{i}", "text": ["x", f"Question {n}?", "yes"], "patient_id": str(i)}
        for i in (0, 2, 4) for n in range(2)
    ]  # fmt: skip
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(made / "index", tmp_path / "index")
    for place, share in (("system", "system"), ("system", "ecg"), ("question", "ecg")):
        dataset = dataset_of(config_of(tmp_path, retrieval__place=place, data__val_fraction=0.0))
        index = dataset.length_index(share, 0.0)
        keys = index.key.reshape(3, 2)
        assert (keys[:, 0] == keys[:, 1]).all() and len(set(keys[:, 0].tolist())) == 3, (place, share)
        assert (index.prefix > 0).all()
    # What is shared is equal: the tokens up to the prefix are those of both questions.
    a, b = (dataset.render(i).ids for i in (0, 1))
    assert (a[: index.prefix[0]] == b[: index.prefix[0]]).all() and index.prefix[0] < len(a)


def test_ecgs_are_looked_up_once_and_that_is_kept(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(made, retrieval__k=2)
    dataset, live = dataset_of(config), dataset_of(config)
    plain = [prompt_of(live, i) for i in range(len(live))]
    asked: list[int] = []
    search = Exact.__call__

    def counted(self: Exact, queries: np.ndarray, k: int, excluded: Sequence[np.ndarray]) -> Any:
        asked.append(len(queries))
        return search(self, queries, k, excluded)

    monkeypatch.setattr(Exact, "__call__", counted)
    dataset.length_index("system", 0.0, tmp_path)
    assert asked == [len(dataset)]
    sent = pickle.loads(pickle.dumps(dataset))
    assert [prompt_of(sent, i) for i in range(len(live))] == plain and asked == [len(dataset)]
    again = dataset_of(config)
    again.length_index("system", 0.0, tmp_path)
    assert [prompt_of(again, i) for i in range(len(live))] == plain and asked == [len(dataset)]
    other = dataset_of(config_of(made, retrieval__k=3))
    assert other.fingerprint != dataset.fingerprint
    other.length_index("system", 0.0, tmp_path)
    assert len(asked) == 2


def test_look_ups_outlive_a_stop_and_what_could_not_be_read_is_tried_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_BLOCK", 3)
    dataset = dataset_of(config_of(made, retrieval__k=2))
    retriever, asked = dataset.signal.retrieval, list[str]()
    assert isinstance(retriever, Retriever)
    broken, away, stops = "demo:train:4", True, True

    def sought(one: Sought) -> Sought:
        def signal() -> np.ndarray:
            asked.append(one.path)
            if one.path == broken and away:
                raise UserError(one.path, "unreadable", "", "")
            if len(asked) == 5 and stops:
                raise KeyboardInterrupt
            return one.signal()

        return one._replace(signal=signal)

    everything = [sought(one) for _, one in dataset.sought(range(len(dataset)))]
    with pytest.raises(KeyboardInterrupt):
        retriever.looked_up(everything, tmp_path, False)
    stops = False
    first, _ = asked[:3], asked.clear()
    found = pickle.loads(pickle.dumps(retriever.looked_up(everything, tmp_path, False)))
    assert sorted([*asked, *(set(first) - {broken})]) == sorted(one.path for one in everything)
    by_path = {one.path: one for one in everything}
    with pytest.raises(UserError, match="unreadable"):
        found.words(by_path[broken])
    away = False
    with pytest.raises(UserError, match="was not looked up"):  # in the process of a helper
        found.words(by_path[broken])
    asked.clear()
    whole = retriever.looked_up(everything, tmp_path, False)
    assert asked == [broken]
    sent = pickle.loads(pickle.dumps(whole))
    assert [sent.words(one) for one in everything] == [retriever.words(one) for one in everything]


def test_in_a_chat_the_study_is_not_retrieved(made: Path) -> None:
    config = config_of(made, retrieval__k=3)
    model = FakeModel(config, context=512)
    model.assembly.signal = replace(model.assembly.signal, retrieval=retriever_of(config, "qwen2"))
    session = Session(model, None)  # pyright: ignore[reportArgumentType]
    session.add_ecg("demo:train:6")
    session.say("What is it?")
    rows = found_in(model.prompts[-1].rendered.prompt)
    assert len(rows) == 3 and 6 not in rows
    assert model.prompts[-1].rendered.prompt.index("report of") < model.prompts[-1].rendered.prompt.index("user")


@pytest.mark.parametrize(
    ("keys", "where", "said"),
    [
        ({"retrieval__index": "nowhere"}, "retrieval.index", "no folder"),
        ({"data__sampling_rate": 100}, "retrieval.index", "data.sampling_rate 50"),
        ({"data__segment_len": 400}, "retrieval.index", "data.segment_len 500"),
        ({"compat": ["feature_windows"]}, "retrieval.index", "feature_windows"),
        ({"compat": ["lead_order"]}, "retrieval.index", "compat lead_order 0"),
        ({"compat": ["spline_resampling"]}, "retrieval.index", "compat spline_resampling 0"),
        ({"compat": ["response_by_ids"]}, "retrieval.place", "response_by_ids"),
        (
            {"compat": ["rag_92bff32"], "retrieval__place": "question", "retrieval__content": "feature"},
            "retrieval.content", "loses the ECG",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_an_index_is_told(made: Path, keys: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        retriever_of(config_of(made, **{"retrieval__index": str(made / "index"), **keys}), "qwen2")
    assert caught.value.where == where and said in str(caught.value)


def test_a_family_without_a_system_prompt_is_told_but_not_the_reference_s(made: Path) -> None:
    with pytest.raises(UserError, match=r"retrieval.place.*gemma2.*question"):
        retriever_of(config_of(made), "gemma2")
    assert retriever_of(config_of(made, compat=["rag_0_0_4"]), "gemma2") is not None


def test_an_index_without_reports_or_signals_is_told(made: Path, tmp_path: Path) -> None:
    write_table(tmp_path, report="")
    build_index(data_of(tmp_path), tmp_path / "index", progress=False)
    with pytest.raises(UserError, match=r"without reports.*retrieval.content=feature"):
        retriever_of(config_of(tmp_path), "qwen2")
    with pytest.raises(UserError, match=r"without signals.*--signals"):
        retriever_of(config_of(tmp_path, retrieval__content="feature", retrieval__mode="signal"), "qwen2")


def test_the_view_is_there_with_the_index(made: Path) -> None:
    assert list(config_of(made).views) == ["ecg", "retrieved"]
    assert list(resolve({}).views) == ["ecg"]


# -- its worth ------------------------------------------------------------------------------------------------


def asked(made: Path, monkeypatch: pytest.MonkeyPatch, workdir: Path, **keys: Any) -> dict[str, Any]:
    """What an evaluation finds of a model that answers with the first report in its prompt."""
    config = replace(config_of(made, **keys), workdir=str(workdir))

    class Reader(Asked):
        def __init__(self, config: Any, which: str = "best") -> None:
            super().__init__(config, 512)
            self.assembly.signal = replace(self.assembly.signal, retrieval=retriever_of(config, "qwen2"))
            self.reply = lambda prompt: next(
                (f"report of recording {i}" for i in found_in(prompt.rendered.prompt)), "nothing was retrieved"
            )

    monkeypatch.setattr(evaluator, "TrainedModel", Reader)
    monkeypatch.setattr(evaluator, "fingerprint", lambda arrays: "weights")
    return json.loads((evaluate(config) / "metrics.json").read_text())


def test_a_planted_self_retrieval_is_found_out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = asked(made, monkeypatch, tmp_path / "planted", compat=["rag_protocol"])
    assert planted["metrics"]["exact_match"]["value"] == 1
    assert planted["retrieval"]["own_study"] == planted["retrieval"]["ecgs"] == PEOPLE
    brings = planted["retrieval"]["brings"]["exact_match"]
    assert brings == {"retrieved_shuffled": 1, "retrieved_noise": 1}, "all of the score"
    for name in ("zeros", "noise", "text_only", "shuffled"):  # the ECG is swapped before others are retrieved
        assert planted["controls"][name]["exact_match"]["value"] <= 1 / PEOPLE, name
    assert set(planted["signal_dependence"]["by_control"]) == {"zeros", "noise", "text_only", "shuffled"}
    folder = next((tmp_path / "planted" / "eval").iterdir())
    page = (folder / "report.html").read_text()
    assert f"{PEOPLE} were given a report of their own study" in page and "What was retrieved" in page
    honest = asked(made, monkeypatch, tmp_path / "honest", eval__controls=[])
    assert honest["metrics"]["exact_match"]["value"] == 0
    assert honest["retrieval"]["own_study"] == honest["retrieval"]["same_patient"] == 0
    assert {one["whose"] for one in honest["retrieval"]["shown"]} == {"another"}
    folder = next((tmp_path / "honest" / "eval").iterdir())
    assert "looks the answer up" not in (folder / "report.html").read_text()
