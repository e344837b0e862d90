"""Recordings that records name lie in data.root, unless the user allows others; one that is not there is told early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wfdb
from texts import chat_tokenizer, write_records

from elm_jax.config import DataConfig
from elm_jax.data import dataset as dataset_module
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.represent import SignalSpec
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.errors import UserError
from elm_jax.inference.session import read_input

ANSWERED = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
LENGTH = 500


def spec(root: Path, **options: Any) -> SignalSpec:
    return signal_spec(DataConfig(root=str(root), segment_len=LENGTH, sampling_rate=50, **options), 0)


def loads(spec: SignalSpec, path: str) -> bool:
    signal = spec.load(path, 0)
    return isinstance(signal, np.ndarray) and signal.shape == (12, LENGTH)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data.root; a recording and a WFDB record lie in it, in a folder of it and beside it."""
    for folder in ("data", "data/in", "beside", "data-2"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", np.random.default_rng(0).normal(size=(12, LENGTH)).astype(np.float32))
        leads = ["I", "II", "III", "aVR", "aVL", "aVF", *(f"V{i}" for i in range(1, 7))]
        wfdb.wrsamp("r", 50, ["mV"] * 12, leads, np.ones((LENGTH, 12)) * np.arange(LENGTH)[:, None] / 50,
                    fmt=["16"] * 12, write_dir=str(tmp_path / folder))  # fmt: skip
    return tmp_path / "data"


def links(root: Path) -> dict[str, str]:
    """What is wrong -> a path in a record."""
    (root / "file.npy").symlink_to("../beside/x.npy")
    (root / "file2.npy").symlink_to("file.npy")
    (root / "folder").symlink_to("../beside")
    for name in ("header", "samples"):
        for ending in (".hea", ".dat"):
            text = (root / f"r{ending}").read_bytes()
            (root / f"{name}{ending}").write_bytes(text.replace(b"r ", b"header ", 1) if ending == ".hea" else text)
    (root / "header.hea").unlink()
    (root / "header.hea").symlink_to("../beside/r.hea")
    header = (root / "r.hea").read_text()
    (root / "samples.hea").write_text(header.replace("r.dat", "linked.dat").replace("r ", "samples ", 1))
    (root / "linked.dat").symlink_to("../beside/r.dat")
    return {
        "absolute": str(root.parent / "beside" / "x.npy"), "above": "../beside/x.npy",
        "through": "in/../../beside/x.npy",
        "link": "file.npy", "link to a link": "file2.npy", "linked folder": "folder/x.npy",
        "above a linked folder": "folder/../data-2/x.npy", "a name that begins alike": "../data-2/x.npy",
        "record above": "../beside/r", "record in a linked folder": "folder/r.hea", "header": "header",
        "samples": "samples", "missing": "../nothing.npy",
    }  # fmt: skip


@pytest.mark.parametrize("what", ["absolute", "above", "through", "link", "link to a link", "linked folder",
                                  "above a linked folder", "a name that begins alike", "record above",
                                  "record in a linked folder", "header", "samples", "missing"])  # fmt: skip
def test_what_lies_or_leads_outside_is_refused_unless_it_is_allowed(root: Path, what: str) -> None:
    path = links(root)[what]
    for ask in (lambda s: s.load(path, 0), lambda s: s.load_raw(path, 0), lambda s: s.look_for(path)):
        with pytest.raises(UserError, match="outside data.root; expected files in .*--config.data.outside_root=true"):
            ask(spec(root))
    assert spec(root).stamp(path) == [], "nothing is looked at"
    if what == "missing":
        with pytest.raises(UserError, match="no file"):
            spec(root, outside_root=True).look_for(path)
    elif what != "header":  # whose samples have another name
        assert loads(spec(root, outside_root=True), path)


def test_what_lies_inside_may_be_called_anything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "inner.npy").symlink_to("in/x.npy")
    (root.parent / "link").symlink_to(root)
    paths = ["x.npy", "in/x.npy", "in/../x.npy", str(root / "x.npy"), "inner.npy", "r", "r.hea", "in/r.dat",
             str(root / "in" / "r"), str(root.parent / "link" / "x.npy")]  # fmt: skip
    monkeypatch.chdir(root.parent)
    for given in (root, Path("data"), Path("link"), Path(".")):
        for path in paths if given != Path(".") else ["data/x.npy", "beside/x.npy"]:
            assert loads(spec(given), path)
            spec(given).look_for(path)


def test_other_formats_are_read_confined_and_stamped_as_the_first_two(root: Path) -> None:
    leads = ["I", "II", *(f"V{i}" for i in range(1, 7))]
    rows = "\n".join(",".join(map(str, row)) for row in np.random.default_rng(0).normal(size=(LENGTH, 8)).round(3))
    for folder in ("data", "beside"):
        (root.parent / folder / "t.csv").write_text(f"# fs: 50\n{','.join(leads)}\n{rows}\n")
    (root / "out.csv").symlink_to("../beside/t.csv")
    header = (root / "r.hea").read_text().replace("r.dat 16 ", "c.mat 16+24 ").replace("r ", "c ", 1)
    (root / "c.hea").write_text(header)
    (root.parent / "beside" / "c.mat").write_bytes(bytes(24) + (root / "r.dat").read_bytes())
    (root / "c.mat").symlink_to("../beside/c.mat")  # beside its header, as in the PhysioNet challenges
    for path in ("../beside/t.csv", "out.csv", "c.mat", "c", "c.hea"):
        for ask in (lambda s, path=path: s.load(path, 0), lambda s, path=path: s.look_for(path)):
            with pytest.raises(UserError, match="outside data.root"):
                ask(spec(root))
        assert spec(root).stamp(path) == [] and loads(spec(root, outside_root=True), path)
    before = spec(root).stamp("t.csv")
    (root / "t.csv").write_text((root / "t.csv").read_text() + "0" + ",0" * 7 + "\n")
    assert loads(spec(root), "t.csv") and len(before) == 1 and spec(root).stamp("t.csv") != before
    (root / "c.mat").unlink()
    (root / "c.mat").write_bytes(bytes(24) + (root / "r.dat").read_bytes())
    assert loads(spec(root), "c.mat") and len(spec(root).stamp("c.mat")) == 2
    told = read_input(str(root.parent / "beside" / "t.csv"), spec(root)).summary
    assert "III, aVR, aVL, aVF computed from I and II" in told and "no unit in the files: taken as mV" in told


def test_what_is_no_file_needs_no_place(root: Path) -> None:
    for path in ("noise", "flatline", "demo:test:3"):
        assert loads(spec(root), path)
        spec(root).look_for(path)


def test_what_the_user_names_in_a_chat_may_lie_anywhere(root: Path) -> None:
    assert read_input(str(root.parent / "beside" / "x.npy"), spec(root)).path.endswith("beside/x.npy")


# -- whether they are there -----------------------------------------------------------------------------------


def records(root: Path, paths: list[Any]) -> Dataset:
    write_records(root, [ANSWERED] * len(paths), paths)
    data = DataConfig(names=("records.jsonl",), root=str(root), val_fraction=0.0, segment_len=LENGTH, sampling_rate=50)
    return Dataset(load_records(data, "train", 0), chat_tokenizer(), text_spec(data, "qwen2", 4, "sft", ()), spec(root))


def test_recordings_that_are_not_there_are_told_unread(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SignalSpec, "load_raw", None)
    there = ["x.npy", "r", "noise", "demo:test:0", ["x.npy", "in/x.npy"]]
    assert records(root, there).missing(0.0) is None
    error = records(root, [*there, ["x.npy", "gone.npy"]]).missing(0.0)
    assert error is not None and error.where.endswith("gone.npy") and error.found == "no file"
    assert "check the path (and data.root)" in error.fix
    assert records(root, [*there, "gone.npy"]).missing(1 / 6) is None, "one of six may be bad"
    assert records(root, [*there[:4], "gone", "gone"]).missing(1 / 6) is not None
    error = records(root, ["../beside/x.npy"]).missing(0.0)
    assert error is not None and "outside data.root" in error.found


def test_of_many_records_as_many_are_looked_for_as_takes_a_moment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "LOOKED_FOR", 10)
    looked: list[str] = []
    look_for = SignalSpec.look_for
    monkeypatch.setattr(SignalSpec, "look_for", lambda self, path: looked.append(path) or look_for(self, path))
    made = records(root, [f"{i}.npy" for i in range(95)])
    assert made.missing(0.2) is None, "ten of 95 are known to be missing, and 19 may be"
    assert len(looked) == 10 and looked[0] == "0.npy" and looked[-1] == "90.npy"
    assert made.missing(0.05) is not None


def test_a_beginning_of_a_path_has_a_folder_in_its_place_and_the_longest_wins(root: Path) -> None:
    prefixes = {"../theirs/": str(root / "in"), "../theirs/b/": str(root.parent / "beside")}
    placed = spec(root, prefixes=prefixes)
    first, second = (np.load(folder / "x.npy") for folder in (root / "in", root.parent / "beside"))
    first[:], second[:] = np.arange(LENGTH), np.arange(LENGTH)[::-1]
    np.save(root / "in" / "x.npy", first)
    np.save(root.parent / "beside" / "x.npy", second)
    assert placed.load("../theirs/x.npy", 0)[0, 0] == 0 and placed.load("../theirs/b/x.npy", 0)[0, 0] > 0.9
    assert loads(placed, "../theirs/r") and loads(placed, "x.npy")
    for path in ("../theirs/../x.npy", "../theirs/b/../data/x.npy", "../beside/x.npy"):
        with pytest.raises(UserError, match="outside"):
            placed.load(path, 0)


@pytest.mark.parametrize(("path", "prefix", "folder"), [
    ("../elsewhere/in/x.npy", "../elsewhere/", ""), ("/lost/in/r", "/lost/", ""), ("a/b/r.hea", "a/b/", ""),
    ("there/deep/y.npy", "there/", "in"),
])  # fmt: skip
def test_a_recording_that_lies_elsewhere_by_another_name_is_told(
    root: Path, path: str, prefix: str, folder: str
) -> None:
    (root / "in" / "deep").mkdir()
    np.save(root / "in" / "deep" / "y.npy", np.load(root / "x.npy"))
    with pytest.raises(UserError) as error:
        spec(root).look_for(path)
    told = json.loads(str(error.value).partition("data.prefixes=")[2].strip("'"))
    assert told == {prefix: str(root / folder)}
    spec(root, prefixes=told).look_for(path)
    assert loads(spec(root, prefixes=told), path)
