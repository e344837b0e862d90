"""What is measured in ECGs: beats, intervals, amplitudes, reasons; as table, JSON, picture and words."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elm_jax import cli
from elm_jax.data.demo import demo_rhythm, load_demo_ecg
from elm_jax.data.represent import SignalSpec
from elm_jax.ecg.beats.amplitudes import AMPLITUDES, axis_of, larger_r, lead_of
from elm_jax.ecg.beats.delineate import Waves
from elm_jax.ecg.beats.measurements import UNITS, Measurements, Value, measure
from elm_jax.ecg.beats.words import LANGUAGES, describe, written
from elm_jax.ecg.features import NAMES, ecg_features, z_scored
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.elms import ELMS
from elm_jax.errors import UserError
from elm_jax.measure import main

HAND = Path(__file__).parents[1] / "data" / "hand_measured.csv"
WITHIN = {"pr": 25, "qrs": 15, "qt": 25}  # ms
# A beat by its bounds, ms from the beginning of the QRS complex: P, Q, R, S, T; and sizes in mV for I and aVF.
BOUNDS = {"p": (-160, -56), "q": (0, 24), "r": (16, 64), "s": (56, 92), "t": (180, 380)}
SIZES = {"p": (0.10, 0.12), "q": (-0.1, -0.08), "r": (0.9, 0.6), "s": (-0.2, -0.15), "t": (0.25, 0.2)}
CHEST = {"p": 0.05, "q": 0.0, "r": 0.5, "s": -1.2, "t": 0.4}


def bump(time: np.ndarray, begin: float, end: float) -> np.ndarray:
    """Zero but between two moments, and smooth: the square of a sine."""
    return np.where((time > begin) & (time < end), np.sin(np.pi * (time - begin) / (end - begin)) ** 2, 0.0)


def ecg(beats: list[float], rate: float = 500, but: str = "", wide: tuple[int, ...] = ()) -> np.ndarray:
    """(12, L) in mV with beats that begin at these seconds, without the wave `but`; those of `wide` are turned over,
    twice as wide, and have no P wave."""
    time = np.arange(round(10 * rate)) / rate * 1000
    first, foot, chest = (np.zeros(len(time)) for _ in range(3))
    for number, at in enumerate(beats):
        since = (time - 1000 * at) / (2 if number in wide else 1)
        for wave, bounds in BOUNDS.items():
            if wave != but and not (number in wide and wave == "p"):
                shape = bump(since, *bounds) * (-1.5 if number in wide else 1)
                first, foot = first + SIZES[wave][0] * shape, foot + SIZES[wave][1] * shape
                chest = chest + CHEST[wave] * shape
    second = foot + first / 2
    limbs = [first, second, second - first, -(first + second) / 2, first - second / 2, foot]
    drawn = np.stack([*limbs, *(chest * size for size in (0.8, 1.0, 0.9, 0.8, 0.7, 0.6))])
    return drawn + np.random.default_rng(0).normal(0, 0.005, drawn.shape)


REGULAR = [0.4 + 0.8 * n for n in range(12)]


@pytest.mark.parametrize("rate", [250.0, 500.0, 1000.0, 360.0])
def test_intervals_and_amplitudes_are_those_of_the_drawn_beat(rate: float) -> None:
    found = measure(ecg(REGULAR, rate), rate)
    value = {name: number(found, name) for name in UNITS}
    assert abs(value["rate"] - 75) < 0.1 and found.rhythm.regularity == "regular" and len(found.beats) == 12
    for name, truth in {"p": 104, "pr": 160, "qrs": 92, "qt": 380}.items():
        assert abs(value[name] - truth) <= WITHIN.get(name, 25), (name, value[name])
    np.testing.assert_allclose(value["qtc_bazett"], value["qt"] / 0.8**0.5)
    np.testing.assert_allclose(value["qtc_fridericia"], value["qt"] / 0.8 ** (1 / 3))
    time = np.arange(-1000, 1000) / 2
    areas = [sum(SIZES[w][lead] * bump(time, *BOUNDS[w]).sum() for w in "qrs") for lead in (0, 1)]
    assert abs(value["axis"] - np.degrees(np.arctan2(2 / 3**0.5 * areas[1], areas[0]))) < 3
    first = found.leads["I"].amplitudes
    assert abs(first["r"] - 0.9) < 0.03 and abs(first["t"] - 0.25) < 0.02 and abs(first["p"] - 0.1) < 0.02
    assert first["q"] < -0.03 and first["s"] < -0.1 and abs(first["st60"]) < 0.02 > abs(first["st80"])
    assert set(found.leads["V3"].waves) == {"p", "qrs", "t"} and all(v.quality > 0.8 for v in found.values.values())
    expected = found.leads["V5"].amplitudes["r"] - found.leads["V1"].amplitudes["s"]
    assert value["sokolow_lyon"] == pytest.approx(expected)


def test_an_st_level_is_measured_from_the_level_before_the_complex() -> None:
    signal, time = ecg(REGULAR), np.arange(5000) / 500
    for at in REGULAR:
        since = 1000 * (time - at)
        signal[7:9] += 0.25 * ((since > 70) & (since < 330))
    signal += 0.3 * np.sin(2 * np.pi * 0.2 * time)  # drift
    found = measure(signal, 500)
    assert abs(found.leads["V2"].amplitudes["st60"] - 0.25) < 0.02 and abs(found.leads["V5"].amplitudes["st60"]) < 0.02
    assert found.leads["V2"].amplitudes["j"] > 0.2 and "ST elevation at J in V2 (0.2" in describe(found)
    one = measure(signal[[7, 10]], 500, ("V2", "V5"))
    assert "ST not judged (no two neighbouring leads)" in describe(one)


def shape(*sizes: float) -> np.ndarray:
    """An averaged beat (W,), its complex of waves of these sizes in turn from sample 200 to 260."""
    return np.pad(np.interp(np.arange(61), np.linspace(0, 60, len(sizes) + 2), [0, *sizes, 0]), (200, 340))


def test_of_two_r_waves_none_is_lost() -> None:
    complex_of = Waves((200, 260))
    for sizes, truth in {
        (0.06, -0.12, 1.5, -0.3): (0, 0.06, -0.3, 1.5),  # a small one, and behind the large one the deepest S
        (0.8, -0.1, 0.3, -0.6): (0, 0.8, -0.6, 0.3), (-0.2, 1.0, -0.4): (-0.2, 1.0, -0.4, 0), (-0.5,): (0, 0, -0.5, 0),
        (0.3, -0.6, 0.2): (0, 0.3, -0.6, 0.2),
    }.items():  # fmt: skip
        found = lead_of(shape(*sizes), 0.01, complex_of, 230, 500).amplitudes
        np.testing.assert_allclose([found[name] for name in ("q", "r", "s", "r2")], truth, atol=0.03)
    drawn = np.random.default_rng(0)
    for _ in range(300):
        beat = shape(*drawn.normal(0, 0.4, drawn.integers(1, 9)))
        found = lead_of(beat, 0.01, complex_of, 230, 500).amplitudes
        assert abs(larger_r(found) - max(0, beat[200:261].max())) <= 0.02
        assert abs(min(found["q"], found["s"]) - min(0, beat[200:261].min())) <= 0.02


def test_the_demo_s_rates_and_rhythms_are_found() -> None:
    for index in range(40):
        truth = demo_rhythm(f"demo:test:{index}")
        found = measure(load_demo_ecg(f"demo:test:{index}", 250, 2500), 250)
        # One that an end cuts may be missing, which counts where intervals differ.
        assert abs(number(found, "rate") - truth.heart_rate) <= (2 if truth.regular else 5), index
        assert (found.rhythm.regularity in ("regular", "varying")) == truth.regular, index


def test_early_beats_pauses_and_fibrillation_are_told() -> None:
    early = ecg([at - 0.3 * (n == 5) for n, at in enumerate(REGULAR)], wide=(5,))
    found = measure(early, 500).rhythm
    assert (found.ectopic, found.ectopic_early, found.early, found.regularity) == (1, 1, 0, "regular")
    found = measure(ecg([at - 0.25 * (n == 5) for n, at in enumerate(REGULAR)]), 500).rhythm
    assert (found.ectopic, found.early) == (0, 1)
    found = measure(ecg([at for n, at in enumerate(REGULAR) if n != 6]), 500).rhythm
    assert found.pauses == 1 and abs(found.longest - 1.6) < 0.02
    steps = np.random.default_rng(1).uniform(0.55, 1.15, 11)
    found = measure(ecg([0.3, *(0.3 + np.cumsum(steps))], but="p"), 500)
    assert found.rhythm.regularity == "fibrillation"
    assert found.values["pr"].value is None and "P wave" in found.values["pr"].reason
    coupled = np.cumsum([0.3, 1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.5, 1.0, 0.5, 1.0])
    found = measure(ecg(list(coupled)), 500)
    assert found.rhythm.early == 4 and "frequent early beats" in describe(found) and found.values["pr"].value
    varying = [0.4 + 0.8 * n + 0.14 * np.sin(n) for n in range(12)]
    assert measure(ecg(varying), 500).rhythm.regularity == "varying"


def number(found: Measurements, name: str) -> float:
    value = found.values[name].value
    assert value is not None, found.values[name].reason
    return value


def reason(found: Measurements, name: str = "rate") -> str:
    assert found.values[name].value is None
    return found.values[name].reason


def test_what_cannot_be_measured_has_a_reason() -> None:
    good, noise = ecg(REGULAR), np.random.default_rng(0).normal(0, 0.1, (12, 5000))
    assert "too short" in reason(measure(good[:, :500], 500)) and "too short" in reason(measure(good[:, :0], 500))
    assert reason(measure(np.zeros((12, 5000)), 500)) == "no lead with a signal"
    assert reason(measure(np.full((2, 5000), np.nan), 500)) == "no lead with a signal"
    assert reason(measure(noise, 500)) == "noise"
    assert "coarsely" in reason(measure(good[:, ::10], 50), "qrs")
    assert "aVF" in reason(measure(good[6:], 500, LEADS[6:]), "axis")
    assert reason(measure(good[:1], 500, ["I"]), "cornell") == "no V3, aVL"
    broken = good.copy()
    broken[3], broken[4, :2500], broken[5, 700:900], broken[11] = 0, np.inf, np.nan, noise[0] * 20
    found = measure(broken, 500)
    assert {n: lead.reason for n, lead in found.leads.items() if lead.reason} == {
        "aVR": "flat", "aVL": "samples missing", "V6": "noise",
    }  # fmt: skip
    assert abs(number(found, "qrs") - 92) <= 15 and abs(number(found, "rate") - 75) < 0.1
    assert "Not usable: aVR (flat), aVL (samples missing), V6 (noise)." in describe(found)
    one = measure(good[:1, :1200], 500)
    assert abs(number(one, "rate") - 75) < 1 and set(one.leads) == {"1"}


@pytest.mark.parametrize("seed", range(12))
def test_any_numbers_are_measured_or_refused_with_a_reason(seed: int) -> None:
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, 10.0 ** rng.integers(-6, 7), (rng.integers(1, 16), rng.integers(1, 4000)))
    signal[rng.random(signal.shape) < rng.choice([0, 0.05, 0.5])] = rng.choice([np.nan, np.inf, 0, 1e30])
    found = measure(signal.astype(rng.choice(["float32", "float64"])), float(rng.choice([20, 100, 257.3, 500, 2000])))
    for value in found.values.values():
        assert 0 <= value.quality <= 1 and (value.reason if value.value is None else np.isfinite(value.value))
    assert all(describe(found, language) for language in LANGUAGES)


def test_what_is_no_signal_is_refused() -> None:
    for signal, rate, leads in (
        (np.zeros(5000), 500, None), (np.zeros((2, 100), complex), 500, None), (np.zeros((2, 100)), 0, None),
        (np.zeros((2, 100)), np.nan, None), (np.zeros((2, 100)), 500, ["I"]), (np.zeros((2, 100)), 500, ["I", "I"]),
    ):  # fmt: skip
        with pytest.raises(UserError):
            measure(signal, rate, leads)


def test_an_axis_needs_two_leads_of_the_limbs() -> None:
    assert axis_of({"I": 1.0, "aVF": 0.0}) == 0 and axis_of({"I": -1.0, "aVF": -0.0}) == 180
    assert axis_of({"I": 0.0, "aVF": 1.0}) == 90
    assert axis_of({"I": 1.0, "II": 0.5 + 3**0.5 / 2}) == pytest.approx(45)
    assert axis_of({"I": 1.0}) is None and axis_of({"V1": 1.0}) is None and axis_of({"I": 0.0, "II": 0.0}) is None


def test_hand_measured_recordings(shared: Path) -> None:
    """Done when 90 % of each interval are near what was read by eye, of recordings that no threshold was chosen by."""
    rows = [row for row in csv.DictReader(HAND.open()) if row["use"] == "check"]
    near: dict[str, list[bool]] = {name: [] for name in WITHIN}
    for row in rows:
        recording = read_ecg(shared / "real" / row["recording"])
        found = measure(recording.signal, recording.sampling_rate).values
        for name, most in WITHIN.items():
            value = found[name].value
            near[name].append(value is not None and abs(value - float(row[f"{name}_ms"])) <= most)
    assert len(rows) == 20 and all(np.mean(hits) >= 0.9 for hits in near.values()), near


def test_beats_and_intervals_are_near_those_of_the_golden(golden: Callable[[str], Path]) -> None:
    folder = golden("beat_features")
    expected = json.loads((folder / "expected.json").read_text())
    with np.load(folder / "data.npz") as arrays:
        for name in (key.split("/")[0] for key in arrays if key.endswith("/ecg_uV")):
            found, truth = measure(arrays[f"{name}/ecg_uV"] / 1000, 500), expected[name]["_global"]
            assert len(found.beats) == len(truth["R_peaks"])
            assert np.abs(500 * np.array(found.beats) - truth["R_peaks"]).max() < 15  # the middle, not the R wave
            assert abs(number(found, "qrs") - truth["QRS_ms"]) <= 15
            assert abs(number(found, "qt") - truth["QT_ms"]) <= 25


def test_words_go_in_a_reader_s_order_in_both_languages() -> None:
    found = measure(ecg(REGULAR), 500)
    for language, order in (
        ("en", ("Heart rate 75/min", "PR interval", "QRS axis", "QRS", "No ST deviation", "T waves", "QT interval")),
        ("de", ("Herzfrequenz 75/min", "PQ-Zeit", "QRS-Achse", "QRS-Dauer", "Keine ST", "T-Wellen", "QT-Zeit")),
    ):
        text = describe(found, language)
        places = [text.index(word) for word in order]
        assert places == sorted(places), text
    assert describe(measure(np.zeros((12, 5000)), 500), "de").startswith("Herzfrequenz nicht messbar (keine Ableitung")
    with pytest.raises(UserError, match="--language"):
        describe(found, "fr")


def test_words_judge_the_number_that_they_write() -> None:
    found = measure(ecg(REGULAR), 500)

    def told(language: str = "en", **values: float) -> str:
        return describe(replace(found, values=found.values | {k: Value(v, 1.0) for k, v in values.items()}), language)

    assert "60/min, rhythm" in told(rate=59.6) and "59/min, slow" in told(rate=59.4)
    assert "3.5 mV," in told(sokolow_lyon=3.54, cornell=1.0) and "3,6 mV (hoch)" in told("de", sokolow_lyon=3.56)
    assert "normal (by Bazett)" in told(qtc_bazett=450.4) and "long for men" in told(qtc_bazett=455.0)
    assert "normal (by Fridericia" in told(qtc_bazett=480.0, qtc_fridericia=440.0, rate=110.0)
    unclear = replace(found, values=found.values | {"p": Value(None, 0.0, "its end is not told from the QRS complex")})
    assert "P wave duration not measurable (its end" in describe(unclear) and "PR interval" in describe(unclear)


def test_a_model_can_read_the_measurements() -> None:
    view = ELMS["mlp_llava_measured"]["measurements"]
    assert view.writes == "text" and view.text is written
    assert "Heart rate 75/min" in written(ecg(REGULAR, 250), 250, LEADS)
    assert "not measurable" in written(np.zeros((3, 500)), 50, LEADS[:3])


@pytest.mark.parametrize("leads", [tuple(range(11, -1, -1)), (0, 1, 5, 6, 7, 8)])
def test_what_a_model_reads_is_of_the_leads_that_it_is_shown(tmp_path: Path, leads: tuple[int, ...]) -> None:
    signal = ecg(REGULAR, 250).astype(np.float32)
    np.save(tmp_path / "a.npy", signal)
    spec = SignalSpec(
        root=str(tmp_path), leads=leads, length=2500, sampling_rate=250, norm_eps=1e-6, perturb=None, seed=0,
        texts={"measurements": written, "of two arguments": lambda shown, rate: f"{len(shown)} leads at {rate:g}"},
    )  # fmt: skip
    whole = describe(measure(signal, 250))
    axis = whole[whole.index("QRS axis") :].partition(",")[0]
    told = spec.words("a.npy", 0).behind
    assert told.endswith(f"\n{len(leads)} leads at 250\n")
    assert axis in told and "Sokolow-Lyon" in whole and ("Sokolow-Lyon" in told) == (len(leads) == 12)


def test_the_command_prints_a_table_json_words_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "one.npy"
    np.save(file, ecg(REGULAR, 250).astype(np.float32))
    assert cli.guard(main, [str(file), str(file), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and set(lines[0]["values"]) == set(UNITS)
    assert round(lines[0]["values"]["rate"]["value"]) == 75
    assert set(lines[0]["leads"]["II"]["amplitudes"]) == set(AMPLITUDES)
    assert cli.guard(main, [str(file), f"--picture={tmp_path / 'beat.png'}"]) == 0
    table = capsys.readouterr().out
    assert "qtc_bazett" in table and "V6" in table and (tmp_path / "beat.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.guard(main, [str(file), "--text", "--language=de"]) == 0
    assert capsys.readouterr().out.startswith("Herzfrequenz 75/min")


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flat = tmp_path / "flat.npy"
    np.save(flat, np.zeros((12, 2500), np.float32))
    recording = tmp_path / "recording.png"  # whatever it is called
    recording.write_bytes(b"kept")
    for args, says in (
        ([str(tmp_path / "none.npy")], "none.npy"), ([str(flat), f"--picture={tmp_path / 'x.png'}"], "heartbeat"),
        ([str(flat), str(flat), "--picture=x.png"], "one FILE"), ([str(flat), "--language=fr"], "language"),
        ([str(flat), "--unit=furlong"], "unit"), ([str(tmp_path)], "found a folder"),
        ([f"--picture={flat}", str(tmp_path / "none.hea")], "found flat.npy; expected a file of .png, .svg, .pdf"),
        ([str(recording), f"--picture={recording}"], "a file that is not read"),
        ([str(flat), f"--picture={tmp_path / 'none' / 'x.png'}"], "no folder"),
        ([str(flat), "--lead-order=I,II"], "2 lead names"),
    ):  # fmt: skip
        assert cli.guard(main, args) == 2
        error = capsys.readouterr().err
        *notes, last = error.splitlines()
        assert says in last and all(note.startswith(f"{flat}: ") for note in notes), error
    assert recording.read_bytes() == b"kept" and np.load(flat).shape == (12, 2500)


def test_what_was_assumed_and_what_looks_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    signal = ecg(REGULAR, 250)
    file = tmp_path / "a.csv"
    np.savetxt(file, signal[[3, 1, 2, 0, *range(4, 12)]].T, "%.4f", ",")
    asked = [str(file), "--json", "--sampling-rate=250"]
    told, axes = [], []
    for order in ([], ["--lead-order=aVR,II,III,I,aVL,aVF,V1,V2,V3,V4,V5,V6"]):
        assert cli.guard(main, [*asked, *order]) == 0
        out, error = capsys.readouterr()
        found = json.loads(out)
        assert error.splitlines() == [f"{file}: {note}" for note in found["notes"]]
        told.append(" ".join(found["notes"]))
        axes.append(found["values"]["axis"]["value"])
    assert "no lead names" in told[0] and "taken as mV" in told[0] and "I and aVR in each other's place" in told[0]
    assert "lead" not in told[1] and axes[1] == pytest.approx(number(measure(signal, 250), "axis"), abs=0.5)


def test_a_file_that_cannot_be_read_does_not_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = str(tmp_path / "no\udcff.npy")  # a name that is no UTF-8
    for name in (odd, str(tmp_path / "b.npy")):
        np.save(name, ecg(REGULAR, 250).astype(np.float32))
    assert cli.guard(main, [odd, str(tmp_path / "none.npy"), str(tmp_path / "b.npy"), "--json"]) == 2
    out, error = capsys.readouterr()
    assert [json.loads(line)["file"] for line in out.encode().splitlines()] == [odd, str(tmp_path / "b.npy")]
    assert [line for line in error.splitlines() if "none.npy" in line] == error.splitlines()[2:-2], error


def test_the_reference_s_features_have_names_and_are_those_of_the_golden(golden: Callable[[str], Path]) -> None:
    folder = golden("rag_features")
    assert list(NAMES) == json.loads((folder / "names.json").read_text())["names"]
    with np.load(folder / "cases.npz") as arrays:
        for case in {key.split("/")[0] for key in arrays}:
            truth, signal = arrays[f"{case}/f64"], arrays[f"{case}/ecg"].astype(np.float64)
            rate = 100 if case == "fs100" else 250
            found = ecg_features(signal, rate, ("feature_windows",))
            np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6, err_msg=case)
            assert ecg_features(signal, rate).size == len(NAMES) * len(signal)


def test_z_scores_have_no_size_and_no_place() -> None:
    features = np.random.default_rng(0).normal(5, 3, (50, 4)) * [1, 1e6, 1e-6, 0] + [0, 0, 0, 7]
    scored = z_scored(features)
    np.testing.assert_allclose(scored[:, :3].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scored[:, :3].std(0), 1)
    assert not scored[:, 3].any() and not z_scored(features[:1], features)[:, 3].any()
    np.testing.assert_allclose(z_scored(features[:5], features), scored[:5])
