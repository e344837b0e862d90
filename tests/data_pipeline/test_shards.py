"""Shards: what is packed comes back, from any number of processes, found by its name; what is damaged is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow.parquet as pq
import pytest
import runs
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import write_records

from elm_jax.config import DataConfig
from elm_jax.data.prepare import DATASETS, output
from elm_jax.data.prepare.output import segment_counts
from elm_jax.data.prepare.runner import prepare_dataset
from elm_jax.data.specs import signal_spec
from elm_jax.ecg import shards
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.errors import UserError
from elm_jax.symbols.corpus import find_recordings
from elm_jax.training.loop import train

LENGTH, COUNT, GAIN = 200, 6, 819.2
FOLDER = f"folder/preprocessed_{LENGTH}"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two windows, of 819.2 steps a mV: what float32 does not hold; the last is not to be read."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        wfdb.wrsamp(
            f"r{number}", fs=500, units=["mV"] * 12, sig_name=list(LEADS), fmt=["16"] * 12, adc_gain=[GAIN] * 12,
            baseline=[7] * 12, d_signal=rng.normal(scale=300, size=(2 * LENGTH, 12)).astype(np.int64),
            write_dir=str(folder),
        )  # fmt: skip
    (folder / f"r{COUNT}.hea").write_text("no header\n")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is full with two recordings."""
    monkeypatch.setattr(output, "SHARD", 15_000)


def prepare(raw: Path, out: Path, form: str = "shards", workers: int = 1, rate: float = 500) -> dict[str, object]:
    folder = DATASETS["folder"]
    return prepare_dataset(
        "folder", folder, raw, out, rate, LENGTH if rate == 500 else 100, progress=False, workers=workers, form=form
    )


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def both(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same recordings in files and in shards."""
    out = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "SHARD", 15_000)
        prepare(raw, out / "npy", "npy")
        report = prepare(raw, out / "shards")
    assert (report["shards"], report["segments"], report["largest_error_mv"]) == (3, 12, 0)
    return out / "npy", out / "shards"


# ---- what comes back


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 300), st.floats(-9, 9), st.sampled_from([200.0, 819.2, 1e6, None]))
def test_no_number_differs_by_more_than_half_a_step(seed: int, samples: int, size: float, known: float | None) -> None:
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(3, samples)) * 10.0**size + rng.normal(size=(3, 1))
    signal[2] = signal[2, 0]
    gains = None if known is None else [known] * 3
    record, error = shards.pack(signal, gains, {"npy_path": "a/b.npy", "leads": ["a", "b", "c"], "report": "ä"})
    found = shards.unpack("x", record)
    spread, most = np.ptp(signal, axis=1), np.abs(signal).max(1)
    ranged = np.maximum(spread / 65_000, most * 2.0**-21) / 2 + 1e-12 * most
    at_most = ranged if known is None else np.maximum(0.5 / known * (1 + 1e-6), ranged)
    off = np.abs(found["ecg"] - signal).max(1)
    assert (off <= at_most).all() and error == off.max()
    assert (found["report"], found["segment_len"], found["leads"]) == ("ä", samples, ["a", "b", "c"])
    narrow = shards.unpack("x", record, np.float32)["ecg"]
    assert narrow.dtype == np.float32
    np.testing.assert_array_equal(narrow, found["ecg"].astype(np.float32))


def test_what_is_on_the_steps_of_its_source_comes_back_as_it_is(both: tuple[Path, Path], raw: Path) -> None:
    npy, packed = both
    for number in range(COUNT):
        for window in range(2):
            name = f"{FOLDER}/r{number}_{window}.npy"
            whole, same = read_ecg(npy / name, dtype=np.float64), read_ecg(packed / name, dtype=np.float64)
            np.testing.assert_array_equal(whole.signal, same.signal)
            assert (whole.sampling_rate, whole.report, whole.leads) == (same.sampling_rate, same.report, same.leads)
            a, b = (signal_spec(DataConfig(root=str(root), segment_len=100), 0) for root in both)
            np.testing.assert_array_equal(a.load(name, 0), b.load(name, 0))
    integers = np.stack(wfdb.rdrecord(str(raw / "r3"), physical=False, smooth_frames=False).e_d_signal) - 7
    again = read_ecg(packed / f"{FOLDER}/r3_1.npy", dtype=np.float64).signal * GAIN
    np.testing.assert_array_equal(np.rint(again), integers[:, LENGTH:])
    np.testing.assert_allclose(again, np.rint(again), atol=1e-9)


def test_what_is_resampled_is_right_to_half_a_step(raw: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path / "npy", "npy", rate=250)
    report = prepare(raw, tmp_path / "shards", rate=250)
    name = "folder/preprocessed_100/r1_0.npy"
    a, b = (read_ecg(tmp_path / form / name, dtype=np.float64).signal for form in ("npy", "shards"))
    assert 0 < np.abs(a - b).max() <= report["largest_error_mv"] <= 0.5 / GAIN * (1 + 1e-9)


def test_a_signal_that_is_no_ecg_is_refused() -> None:
    with pytest.raises(UserError, match="1e\\+31 mV"):
        shards.pack(np.full((12, 9), 1e31), None, {})


@pytest.mark.parametrize("form", ["shards", "npy"])
def test_a_recording_that_cannot_be_kept_is_listed_and_the_others_are_made(tmp_path: Path, form: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, signal in {"a": np.ones((12, LENGTH)), "b": np.full((12, LENGTH), 1e31), "\udcff": np.ones(9)}.items():
        np.save(raw / f"{name}.npy", signal)
    for _ in range(2):
        report: Any = prepare(raw, tmp_path / "out", form, rate=500)
        assert report["records"] == 2 - (form == "shards") and list(report["missing"]) == ["\udcff.npy"]
    if form == "shards":
        assert "values up to 1e+31 mV" in report["unreadable"]["b.npy"]
        assert json.loads((tmp_path / "out/folder_report.json").read_text()) == report


# ---- which files there are


def test_the_number_of_processes_changes_no_byte(both: tuple[Path, Path], raw: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path, workers=2)
    assert contents(tmp_path) == contents(both[1])


def test_tables_name_the_same_recordings_and_that_of_records_their_places(both: tuple[Path, Path]) -> None:
    npy, packed = (pq.read_table(out / "folder_records.parquet").to_pylist() for out in both)
    places = [(row.pop("shard"), row.pop("index")) for row in packed]
    assert npy == packed
    assert places == [(f"part-{n // 4:05d}.array_record", n % 4) for n in range(12)]
    folder = both[1] / FOLDER
    files = [str(folder / shards.shard_name(number)) for number in range(3)]
    source = grain.sources.ArrayRecordDataSource(files)
    for number, row in enumerate(packed):
        assert shards.unpack("it", source[number])["npy_path"] == row["ecg_path"]
    assert segment_counts(folder) == segment_counts(both[0] / FOLDER) == {f"r{n}": 2 for n in range(COUNT)}


def test_what_is_done_is_not_done_again_and_a_torn_shard_is_made_anew(
    both: tuple[Path, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write_shard

    def stop(folder: Path, number: int, recordings: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(folder, number, recordings)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(raw, tmp_path)
    monkeypatch.setattr(shards, "write_shard", write)
    folder = tmp_path / FOLDER
    first, second = (folder / shards.shard_name(number) for number in range(2))
    os.truncate(second, 5000)
    before = first.stat()
    report = prepare(raw, tmp_path)
    assert report["already_there"] == 2 and first.stat() == before
    report = json.loads((tmp_path / "folder_report.json").read_text())
    assert contents(folder) == contents(both[1] / FOLDER)
    assert prepare(raw, tmp_path)["already_there"] == COUNT


def test_a_folder_keeps_its_format(both: tuple[Path, Path], raw: Path) -> None:
    for out, form in zip(both, ("shards", "npy"), strict=True):
        with pytest.raises(UserError, match=f"format {form}; give another --out"):
            prepare(raw, out, form)


def test_without_the_library_the_other_format_is_named(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "array_record.python.array_record_module", None)
    with pytest.raises(UserError, match="no package array-record .*--format npy"):
        prepare(raw, tmp_path)


def test_recordings_in_shards_are_found_as_files_are(both: tuple[Path, Path]) -> None:
    found = [[path.relative_to(out) for path in find_recordings([out])] for out in both]
    assert found[0] == found[1] and len(found[0]) == 12
    one = both[1] / FOLDER / "r1_1.npy"
    assert find_recordings([one]) == [one]
    with pytest.raises(UserError, match="r9_0.npy: found no such file, nor its name in shards.index"):
        read_ecg(both[1] / FOLDER / "r9_0.npy")
    spec = signal_spec(DataConfig(root=str(both[1])), 0)
    spec.look_for(f"{FOLDER}/r1_1.npy")
    assert spec.stamp(f"{FOLDER}/r1_1.npy")
    with pytest.raises(UserError, match="no such file, nor its name"):
        spec.look_for(f"{FOLDER}/r9_0.npy")


def test_a_shard_that_leads_outside_the_root_is_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "x"
    shutil.copytree(both[1] / FOLDER, folder)
    for name in (shards.shard_name(0), shards.INDEX):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        spec = signal_spec(DataConfig(root=str(tmp_path / "data"), segment_len=100), 0)
        with pytest.raises(UserError, match=f"{name}, which lies or leads outside data.root"):
            spec.load("x/r0_0.npy", 0)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    spec.load("x/r0_0.npy", 0)


@pytest.mark.slow
def test_a_run_is_bit_for_bit_that_on_files_of_the_same_values(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.prepare(monkeypatch, tmp_path / "cache")
    turns = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
    found = []
    for root in both:
        write_records(root, [turns] * 12, [f"{FOLDER}/r{n}_{k}.npy" for n in range(COUNT) for k in range(2)])
        train(runs.config(
            tmp_path / root.name, data__names=["records.jsonl"], data__root=str(root), data__val_fraction=0.0,
            data__sampling_rate=500, data__segment_len=LENGTH, mesh__data=8, train__steps=2,
        ))  # fmt: skip
        lines = runs.lines(tmp_path / root.name)
        found.append([{name: line.get(name) for name in runs.VALUES} for line in lines if "loss" in line])
    assert len(found[0]) == 2 and found[0] == found[1]


# ---- what is damaged


def test_damage_is_one_line_that_names_shard_and_record(both: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(both[1] / FOLDER, tmp_path, dirs_exist_ok=True)
    place = shards.find(str(tmp_path / "r3_1.npy"))
    assert place is not None
    start, end = shards.span(place.offset, place.size)
    whole = Path(place.shard).read_bytes()
    for at in range(start, end, 97):
        changed = bytearray(whole)
        changed[at] ^= 4
        Path(place.shard).write_bytes(changed)
        with pytest.raises(UserError) as error:
            read_ecg(tmp_path / "r3_1.npy")
        assert str(error.value).startswith(f"{place.shard}, record 3: found a damaged record")
        read_ecg(tmp_path / "r3_0.npy")
    Path(place.shard).write_bytes(whole[: end - 1])
    with pytest.raises(UserError, match=f"found {end - 1} bytes; expected at least {end}"):
        read_ecg(tmp_path / "r3_1.npy")


def test_a_record_of_another_name_is_not_taken(both: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(both[1] / FOLDER, tmp_path, dirs_exist_ok=True)
    first = next(shards.listed(tmp_path))
    with (tmp_path / shards.INDEX).open("wb") as file:
        shards.write_index(file, [("r2_0", *first.records[0], 0, 0)])
    with pytest.raises(UserError, match="record 0: found the record of .*r0_0.npy; expected that of r2_0"):
        read_ecg(tmp_path / "r2_0.npy")


def test_what_a_header_claims_is_held_against_what_is_there() -> None:
    record, _ = shards.pack(np.zeros((12, 50)), None, {"npy_path": "a.npy", "leads": LEADS})
    size = int.from_bytes(record[4:8], "little")
    header, packed = json.loads(record[16 : 16 + size]), record[16 + size :]
    lies: list[dict[str, object]] = [
        {"segment_len": 1 << 40}, {"segment_len": -5}, {"segment_len": 1e9}, {"segment_len": True},
        {"gain": [0.0] * 12}, {"gain": [1.0] * 11}, {"gain": ["1"] * 12}, {"baseline": [1 << 60] * 12},
        {"leads": []}, {"leads": "I"}, {"npy_path": None},
    ]  # fmt: skip
    for lie in lies:
        text = json.dumps({**header, **lie}).encode()
        start = record[:4] + len(text).to_bytes(4, "little") + record[8:16]
        with pytest.raises(UserError, match="^it: found a damaged record"):
            shards.unpack("it", start + text + packed)
    long = {"npy_path": "a.npy", "leads": ["I"], "segment_len": 1 << 24, "gain": [1.0], "baseline": [0]}
    planes = np.repeat(np.array([0, 128], np.uint8), 1 << 24).tobytes()
    bomb = shards.sealed(json.dumps(long).encode(), planes, shards.codec().compress(planes, asbytes=True))
    with pytest.raises(UserError, match="^it: found a damaged record .*1 leads of 16777216 samples"):
        shards.unpack("it", bomb)
    with pytest.raises(UserError, match="an ECG, which is not flat"):
        shards.pack(np.zeros((1, 1 << 24)), None, long)
    for cut in (0, 3, 15, 16, 40, len(record) - 1):
        with pytest.raises(UserError, match="^it: found a damaged record"):
            shards.unpack("it", record[:cut])


def test_an_index_that_is_none_is_named(both: tuple[Path, Path], tmp_path: Path) -> None:
    whole = (both[1] / FOLDER / shards.INDEX).read_bytes()
    for content in (b"", whole[:-1], whole + b"x", b"y" + whole[1:], whole[:16] + b"\xff" * 8 + whole[24:]):
        (tmp_path / shards.INDEX).write_bytes(content)
        with pytest.raises(UserError, match=f"^{tmp_path / shards.INDEX}: "):
            read_ecg(tmp_path / "r0_0.npy")
    (tmp_path / shards.INDEX).write_bytes(whole[:24] + b"\xff" * (len(whole) - 24))
    with pytest.raises(UserError, match="No such file"):
        read_ecg(tmp_path / "r0_0.npy")


def test_a_list_that_is_none_is_named(both: tuple[Path, Path], raw: Path, tmp_path: Path) -> None:
    shutil.copytree(both[1], tmp_path, dirs_exist_ok=True)
    for content in ("{", "{}", '{"bytes": 1, "recordings": 3}'):
        (tmp_path / FOLDER / "part-00001.json").write_text(content)
        shard = tmp_path / FOLDER / shards.shard_name(1)
        os.truncate(shard, 1)
        with pytest.raises(UserError, match="part-00001.json: .*remove it, and prepare again"):
            prepare(raw, tmp_path)
