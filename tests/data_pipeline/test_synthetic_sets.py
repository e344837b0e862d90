"""Synthetic sets: what is asked is what is answered, letters and answers are even, and patients keep their splits."""

import json
from collections import Counter
from pathlib import Path

import goldens
import numpy as np
import pyarrow.parquet as pq
import pytest

from elm_jax.config import DataConfig
from elm_jax.data.prepare.card import make_card
from elm_jax.data.prepare.check import check_tables
from elm_jax.data.prepare.comprehension import energy_peaks, smoothed_energy
from elm_jax.data.prepare.output import NpyFiles, write_table
from elm_jax.data.prepare.synthetic import QUESTIONS, Wanted, _told, prepare_synthetic
from elm_jax.data.sources import load_records
from elm_jax.ecg.recording import LEADS, read_ecg, to_segment
from elm_jax.ecg.synthetic import draw_rhythm, synthesize
from elm_jax.errors import UserError
from elm_jax.prepare import main

EXPECTED = goldens.config("prep_synthetic", "expected.json")


def rows(path: Path) -> list[dict]:
    told = pq.read_table(path).to_pylist()
    return [row | dict(zip(("asked", "answer"), (turn["value"] for turn in json.loads(row["text"])), strict=True))
            for row in told]  # fmt: skip


def write(out: Path, dataset: str, name: str, signal: np.ndarray, rate: float = 250.0) -> str:
    folder = out / dataset / f"preprocessed_{signal.shape[1]}"
    said = {"report": "", "ecg_path": name, "original_sf": rate, "target_sf": rate, "segment_len": signal.shape[1]}
    store = NpyFiles(folder)
    store.leave(store.pack(name, signal[None], said, out, None))
    return (folder / f"{name}_0.npy").relative_to(out).as_posix()


def make(records: Path, out: Path, generated: int = 0, length: int = 2500, workers: int = 1, **wanted) -> dict:
    return prepare_synthetic(records, generated, out, Wanted(**wanted), length, workers, progress=False)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, golden):
    """The golden's, of which it has lead II."""
    out = tmp_path_factory.mktemp("golden")
    with np.load(golden("prep_synthetic") / "data.npz") as arrays:
        for name in EXPECTED["detector"]:
            signal = np.zeros((12, 2500))
            signal[LEADS.index("II")] = arrays[f"ecg_lead_II/{name}"] / 1000
            write(out, "mimic_iv", name, signal)
    return out


def test_the_references_detector_by_name(golden):
    with np.load(golden("prep_synthetic") / "data.npz") as arrays:
        for name, told in EXPECTED["detector"].items():
            lead = arrays[f"ecg_lead_II/{name}"] / 1000
            assert energy_peaks(lead, 250).tolist() == told["ref_peaks"]
            expected = arrays[f"smoothed_energy/{name}"]
            np.testing.assert_allclose(smoothed_energy(lead, 250), expected, rtol=0, atol=1e-12)


def test_the_references_sets_by_name(recordings, tmp_path):
    names = sorted(f"{name}_0.npy" for name in EXPECTED["detector"])
    for one in EXPECTED["input_type_sets"]:
        asked = one["records"][0]["text"][0]["value"].partition("\n")[0]
        make(recordings, tmp_path / "t.parquet", kinds=("signal_type",), signals=tuple(one["input_type"]),
             recordings=one["per_len"], published=True, wording={"signal_type": [asked]})  # fmt: skip
        theirs = [Path(record["ecg_path"]).name for record in one["records"]]
        order = list(dict.fromkeys(name for name in theirs if name.endswith(".npy")))  # of their folder; ours by name
        theirs = [names[order.index(name)] if name in order else name for name in theirs]
        ours = rows(tmp_path / "t.parquet")
        assert [Path(row["ecg_path"]).name for row in ours] == theirs
        assert [row["name"] for row in ours] == [record["name"] for record in one["records"]]
        assert [json.loads(row["text"]) for row in ours] == [record["text"] for record in one["records"]]


def test_the_references_numbers_by_name(recordings, tmp_path):
    for one in EXPECTED["numeric_sets"]:
        asked = {record["name"]: [record["text"][0]["value"]] for record in one["records"]}
        wanted = {"kinds": tuple(one["ecg_numeric"]), "per_answer": one["n_per_answer"], "published": True}
        if not one["records"]:
            with pytest.raises(UserError, match="--per-answer: found 50"):
                make(recordings, tmp_path / "t.parquet", **wanted)
            continue
        make(recordings, tmp_path / "t.parquet", **wanted, wording=asked)
        ours = rows(tmp_path / "t.parquet")
        told = [(Path(row["ecg_path"]).name, row["name"], json.loads(row["text"])) for row in ours]
        assert told == [(Path(r["ecg_path"]).name, r["name"], r["text"]) for r in one["records"]]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Sixty generated recordings and their table."""
    out = tmp_path_factory.mktemp("generated")
    report = make(out, out / "synthetic.parquet", generated=60, seed=3, val=0.2, test=0.2)
    return out, report, rows(out / "synthetic.parquet")


def test_answers_are_what_was_generated(generated):
    _, report, found = generated
    assert report["recordings"] == 60 and report["kinds"]["heart_rate_bpm_int"] == 60
    for row in found:
        if row["name"] == "signal_type":
            continue
        rhythm = draw_rhythm((3, int(row["ecg_path"].split("_")[-2])), 10)
        inside = rhythm.r_peaks[(rhythm.r_peaks >= 0) & (rhythm.r_peaks < 10)]
        rate = 60 * (len(inside) - 1) / (inside[-1] - inside[0])
        if row["name"] == "r_peak_count":
            assert row["answer"] == str(len(inside))
        elif row["name"] == "heart_rate_bpm_int":
            assert row["answer"] == str(rhythm.heart_rate) and abs(float(row["answer"]) - rate) <= 0.5
        else:
            assert abs(float(row["answer"]) - rate) <= 0.005
        assert row["asked"] == QUESTIONS[row["name"]]
    assert 40 < report["kinds"]["r_peak_count"] < 60  # not where it cannot be said whether a beat is in the window


def test_letters_say_nothing_of_the_signal_and_kinds_are_even_in_each_split(generated):
    _, _, found = generated
    types = [row for row in found if row["name"] == "signal_type"]
    seen: Counter = Counter()
    for row in types:
        letters = dict(line.split(") ") for line in row["asked"].splitlines()[1:])
        signal = row["ecg_path"] if row["ecg_path"] in ("noise", "flatline") else "ecg"
        assert letters[row["answer"]] == signal
        seen[row["split"], signal, row["answer"]] += 1
    for split in ("train", "val", "test"):
        each = {signal: [seen[split, signal, letter] for letter in "ABC"] for signal in ("ecg", "noise", "flatline")}
        assert len({sum(counts) for counts in each.values()}) == 1 and sum(each["ecg"]) > 0
        assert all(max(counts) - min(counts) <= 2 for counts in each.values())


def test_splits_hold_and_another_table_has_the_same_ones(generated, tmp_path):
    out, _, found = generated
    where: dict = {}
    for row in found:
        assert where.setdefault(row["patient_id"], row["split"]) == row["split"]
    report = check_tables([out / "synthetic.parquet"], out, progress=False)
    assert not report["patients_in_several_splits"] and not report["copies_in_several_splits"]
    assert not report["unreadable"]
    data = DataConfig(names=("synthetic.parquet",), root=str(out))
    assert len(load_records(data, "test", 0)) == sum(row["split"] == "test" for row in found) > 0
    assert set(make_card(out).sources) == {"synthetic"}  # noise and flatline are no datasets
    make(out, tmp_path / "more.parquet", recordings=10, kinds=("r_peak_count",), seed=3, val=0.2, test=0.2)
    assert all(where[row["patient_id"]] == row["split"] for row in rows(tmp_path / "more.parquet"))


def test_the_same_bytes_on_any_number_of_workers_and_files_that_are_there_are_kept(generated, tmp_path):
    out, _, _ = generated
    make(tmp_path, tmp_path / "synthetic.parquet", generated=60, workers=2, seed=3, val=0.2, test=0.2)
    for path in [out / "synthetic.parquet", *out.glob("synthetic/*/*.npy")]:
        assert path.read_bytes() == (tmp_path / path.relative_to(out)).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    make(tmp_path, tmp_path / "again.parquet", generated=60, workers=1, seed=3, val=0.2, test=0.2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == before


def test_what_is_no_ecg_is_not_asked_about_and_patients_keep_the_splits_of_their_table(tmp_path):
    made = []
    for i in range(8):
        path = write(tmp_path, "ptb_xl", f"r{i}", synthesize((9, i), 250.0, 2500).astype(np.float64))
        made.append({"ecg_path": path, "text": "x", "name": "", "patient_id": str(i // 2), "split": "test"})
    write(tmp_path, "ptb_xl", "flat", np.zeros((12, 2500)))
    write(tmp_path, "ptb_xl", "noise", np.random.default_rng(0).normal(size=(12, 2500)))
    write_table(tmp_path / "ptb_xl_records.parquet", made)
    report = make(tmp_path, tmp_path / "set.parquet")
    assert report["recordings"] == 8 and report["rows"]["train"] == report["rows"]["val"] == 0
    assert {Path(path).name for path in report["left_out"]} == {"flat_0.npy", "noise_0.npy"}
    for row in rows(tmp_path / "set.parquet"):
        if row["name"] == "heart_rate_bpm_float":
            number = int(Path(row["ecg_path"]).name[1])
            assert abs(float(row["answer"]) - draw_rhythm((9, number), 10).heart_rate) < 1.5
            assert row["patient_id"] == str(number // 2)
    with pytest.raises(UserError, match=r"8 recordings that can be asked about \(not about .*; expected 9"):
        make(tmp_path, tmp_path / "set.parquet", recordings=9)


def test_a_slow_heart_beats_once_in_a_short_window_and_has_no_rate_there(tmp_path):
    slow = next(key for key in ((9, i) for i in range(99)) if draw_rhythm(key, 10).heart_rate < 45)
    signal, peaks = synthesize(slow, 250.0, 2500).astype(np.float64), draw_rhythm(slow, 10).r_peaks
    peak = peaks[(peaks > 1) & (peaks < 8)][0]
    for length in (500, 2500):  # the same beat, in a long window alone
        begin = round(250 * (peak - 0.7))
        window = np.zeros((12, length))
        window[:, :300] = signal[:, begin : begin + 300]
        write(tmp_path, "folder", "one", window)
    make(tmp_path, tmp_path / "set.parquet", length=500)
    found = {row["name"]: row["answer"] for row in rows(tmp_path / "set.parquet")}
    assert found["r_peak_count"] == "1" and not {"heart_rate_bpm_int", "heart_rate_bpm_float"} & set(found)
    with pytest.raises(UserError, match="no heartbeats"):
        make(tmp_path, tmp_path / "set.parquet")
    assert _told(np.array([-0.06, 2.04]), 2.0) == {}


def test_counts_of_real_recordings_are_those_that_were_looked_at(shared, tmp_path):
    told = {name: one["trusted"] for name, one in EXPECTED["detector"].items() if isinstance(one.get("trusted"), dict)}
    files = {file.stem: file.with_suffix("") for file in (shared / "real" / "ecg").rglob("*.hea")}
    there = sorted(told.keys() & files.keys())
    for name in there:
        write(tmp_path, "folder", name, to_segment(read_ecg(files[name]), 250.0, 2500).astype(np.float64))
    make(tmp_path, tmp_path / "set.parquet", kinds=("r_peak_count", "heart_rate_bpm_float"))
    found = rows(tmp_path / "set.parquet")
    for row in found:
        one = told[Path(row["ecg_path"]).name.removesuffix("_0.npy")]
        if row["name"] == "r_peak_count":
            assert int(row["answer"]) == one["count"]
        else:
            assert abs(float(row["answer"]) - one["hr_mean_rr"]) < 0.7
    assert len(there) >= 16 and sum(row["name"] == "heart_rate_bpm_float" for row in found) == len(there)


def test_answers_are_even_where_it_is_asked_for_one_suffices_and_wordings_take_turns(generated, tmp_path):
    out, report, _ = generated
    wording = tmp_path / "w.json"
    wording.write_text(json.dumps({"r_peak_count": ["How many beats?", "Count the beats."]}))
    command = ["synthetic", "--records", str(out), "--out", str(tmp_path), "--questions", "r_peak_count"]
    main([*command, "--per-answer", "3", "--wording", str(wording)])
    found = rows(tmp_path / "synthetic.parquet")
    counts = Counter(row["answer"] for row in found)
    assert set(counts.values()) == {3} and {row["asked"] for row in found} == {"How many beats?", "Count the beats."}
    main([*command, "--per-answer", "1"])
    assert len(rows(tmp_path / "synthetic.parquet")) > len(counts)


def test_noise_and_flat_lines_need_no_recording(tmp_path):
    make(tmp_path, tmp_path / "set.parquet", kinds=("signal_type",), signals=("noise", "flatline"), recordings=30)
    found = rows(tmp_path / "set.parquet")
    assert Counter(row["ecg_path"] for row in found) == {"noise": 30, "flatline": 30}
    assert len({row["patient_id"] for row in found}) == 60 and not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--questions", "r_peak"], "did you mean 'r_peak_count'"),
        (["--signals", "ecg,noise,ecg"], "--signals: found 'ecg,noise,ecg'"),
        (["--recordings", "0"], "--recordings: found 0; expected 1 to"),
        (["--seed", "-1"], "--seed: found -1"),
        (["--generated", "5", "--segment-len", "500"], "--segment-len: found 500; expected 1250 or more"),
        (["--generated", "5", "--recordings", "2"], "one of them"),
        (["--questions", "signal_type", "--signals", "noise"], "how many of each kind of signal"),
        (["--wording", "W"], "W: found 'peaks'"),
        ([], "no segments of 2500 samples"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path, monkeypatch, flags, found):
    monkeypatch.chdir(tmp_path)
    Path("W").write_text('{"peaks": "How many?"}')
    with pytest.raises(UserError, match=found):
        main(["synthetic", "--out", "out", *flags])
