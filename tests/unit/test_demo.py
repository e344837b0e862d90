"""The embedded demo: its recordings, their truth, its questions, its tokenizer and its pictures."""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from matplotlib.figure import Figure

from elm_jax.data.demo import (
    SYSTEM_PROMPT,
    demo_records,
    demo_rhythm,
    demo_tokenizer,
    load_demo_ecg,
    parse_sizes,
)
from elm_jax.ecg.recording import LEADS
from elm_jax.ecg.synthetic import RATE_RANGE, draw_rhythm
from elm_jax.errors import UserError
from elm_jax.pictures.ecg_paper import Example, draw_ecg, draw_on, gallery, loss_plot

PATHS = [f"demo:test:{i}" for i in range(200)]


def at_100_hz(path):
    return load_demo_ecg(path, 100.0, 1000)


def lead(signal, name):
    return signal[LEADS.index(name)]


def turns(record):
    return [turn["value"] for turn in json.loads(record["text"])]


def detected_beats(signal, sampling_rate):
    """Times of the R peaks, found in the signal alone: where the slopes of all leads together are steep."""
    slope = np.gradient(signal, axis=1)
    energy = np.convolve(np.sum(slope**2, axis=0), np.ones(7) / 7, "same")
    threshold = 0.3 * np.percentile(energy, 99)
    refractory = round(0.2 * sampling_rate)
    beats = []
    for i in np.flatnonzero(energy > threshold):
        if not beats or i - beats[-1][-1] > refractory:
            beats.append([i])
        else:
            beats[-1].append(i)
    return np.array([np.mean(beat) for beat in beats]) / sampling_rate


def test_recordings_are_finite_millivolts_in_canonical_leads():
    for path in PATHS[:50]:
        signal = load_demo_ecg(path)
        assert signal.shape == (12, 500)
        assert signal.dtype == np.float32
        assert np.isfinite(signal).all()
        assert 0.5 < np.ptp(signal) < 12


def test_limb_leads_obey_einthoven_and_goldberger():
    signal = load_demo_ecg(PATHS[0]).astype(float)
    one, two = lead(signal, "I"), lead(signal, "II")
    np.testing.assert_allclose(lead(signal, "III"), two - one, atol=1e-5)
    np.testing.assert_allclose(lead(signal, "aVR"), -(one + two) / 2, atol=1e-5)
    np.testing.assert_allclose(lead(signal, "aVL"), one - two / 2, atol=1e-5)
    np.testing.assert_allclose(lead(signal, "aVF"), two - one / 2, atol=1e-5)


def test_truth_is_what_a_beat_detector_reads_from_the_signal():
    errors = []
    for path in PATHS:
        beats = detected_beats(at_100_hz(path), 100)
        errors.append(abs(60 * (len(beats) - 1) / (beats[-1] - beats[0]) - demo_rhythm(path).heart_rate))
    assert np.median(errors) < 0.5
    assert np.mean(np.array(errors) <= 2) >= 0.95, sorted(errors)[-10:]


def test_heart_rate_counts_the_beats_inside_the_window():
    for path in PATHS:
        rhythm = demo_rhythm(path)
        inside = rhythm.r_peaks[(rhythm.r_peaks >= 0) & (rhythm.r_peaks < 10)]
        assert rhythm.heart_rate == round(60 * (len(inside) - 1) / (inside[-1] - inside[0]))
        assert rhythm.r_peaks[1] <= 0 and rhythm.r_peaks[-1] >= 10, "beats must reach beyond the window"


def test_rates_are_uniform_over_the_range_and_one_in_four_rhythms_is_irregular():
    rhythms = [draw_rhythm((1, i), 10.0) for i in range(4000)]
    rates = np.array([rhythm.heart_rate for rhythm in rhythms])
    assert rates.min() >= RATE_RANGE[0] and rates.max() <= RATE_RANGE[1]
    counts = np.histogram(rates, bins=11, range=(39.5, 150.5))[0]
    assert counts.min() > 0.75 * 4000 / 11 and counts.max() < 1.25 * 4000 / 11, counts
    assert np.mean([rhythm.regular for rhythm in rhythms]) == pytest.approx(0.75, abs=0.03)


def test_irregular_rhythms_are_irregular():
    def variation(rhythm):
        intervals = np.diff(rhythm.r_peaks)
        return intervals.std() / intervals.mean()

    rhythms = [demo_rhythm(path) for path in PATHS]
    assert max(variation(r) for r in rhythms if r.regular) < 0.08
    assert min(variation(r) for r in rhythms if not r.regular) > 0.09


def test_p_waves_are_present_in_sinus_rhythm_and_missing_in_fibrillation():
    def bump(path):
        """Lead II where the P wave peaks, above where it begins, over the beats, relative to the R wave."""
        rhythm, two = demo_rhythm(path), lead(at_100_hz(path), "II")
        peaks = rhythm.r_peaks[(rhythm.r_peaks > 1) & (rhythm.r_peaks < 9)]
        stretch = np.cbrt(60 / rhythm.heart_rate)
        at = lambda shift: np.mean([two[round(100 * (t + shift))] for t in peaks])  # noqa: E731
        return (at(-0.165 * stretch) - at(-0.08 * stretch)) / at(0)

    slow = [path for path in PATHS if demo_rhythm(path).heart_rate < 90]
    sinus = [bump(path) for path in slow if demo_rhythm(path).regular]
    fibrillation = [bump(path) for path in slow if not demo_rhythm(path).regular]
    assert np.median(sinus) > 0.06
    assert abs(np.median(fibrillation)) < 0.03


def test_a_recording_depends_on_its_path_alone():
    np.testing.assert_array_equal(load_demo_ecg("demo:train:7"), load_demo_ecg("demo:train:7"))
    others = ["demo:train:8", "demo:val:7", "demo:test:7"]
    assert all(not np.array_equal(load_demo_ecg("demo:train:7"), load_demo_ecg(other)) for other in others)


@pytest.mark.parametrize("index", range(8))
def test_other_sampling_rates_show_the_same_recording(index):
    fine, coarse = load_demo_ecg(PATHS[index], 500.0, 5000), load_demo_ecg(PATHS[index], 50.0, 500)
    assert fine.shape == (12, 5000) and coarse.shape == (12, 500)
    around = fine[:, 5:-5].reshape(12, 499, 10).mean(-1)  # a sample is the mean over its interval
    for name in ("II", "V2", "V5"):
        assert np.corrcoef(lead(around, name), lead(coarse, name)[1:])[0, 1] > 0.9


@pytest.mark.parametrize(
    "path", ["demo", "demo:test", "demo:tset:1", "demo:test:-1", "demo:test:1x", "demo:test:"]
)
def test_a_path_that_is_none_of_the_demo_is_the_users_error(path):
    with pytest.raises(UserError, match="demo:<split>:<index>"):
        load_demo_ecg(path)


def test_a_window_that_is_not_ten_seconds_is_the_users_error():
    with pytest.raises(UserError, match="segment_len to 2500"):
        load_demo_ecg(PATHS[0], 250.0, 1250)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_records_ask_what_is_true(split):
    for record in demo_records(split, "demo:train=30,val=30,test=30"):
        question, answer = turns(record)
        assert question and "<" not in question
        if record["name"] == "heart_rate":
            assert answer == str(demo_rhythm(record["ecg_path"]).heart_rate)
        elif record["name"] == "regularity":
            assert answer == ("regular" if demo_rhythm(record["ecg_path"]).regular else "irregular")
        else:
            assert answer == ("ecg" if record["ecg_path"].startswith("demo:") else record["ecg_path"])


def test_signal_types_are_equally_frequent_and_the_test_split_asks_of_every_recording():
    records = demo_records("test", "demo:test=1000")
    names = Counter(record["name"] for record in records)
    assert names == {"heart_rate": 1000, "regularity": 1000, "signal_type": 3000}
    answers = Counter(turns(record)[1] for record in records if record["name"] == "signal_type")
    assert answers == {"ecg": 1000, "noise": 1000, "flatline": 1000}
    train = Counter(turns(r)[1] for r in demo_records("train", "demo:train=41") if r["name"] == "signal_type")
    assert train == {"ecg": 3, "noise": 3, "flatline": 3}


def test_questions_about_a_recording_stand_together_and_share_its_patient():
    records = demo_records("test", "demo:test=3")
    assert [r["ecg_path"] for r in records[:3]] == ["demo:test:0"] * 3
    assert {r["patient_id"] for r in records[:3]} == {"demo-test-0"}
    assert len({r["patient_id"] for r in records}) == 9


def test_splits_share_no_recording():
    paths = [
        {r["ecg_path"] for r in demo_records(split)} - {"noise", "flatline"}
        for split in ("train", "val", "test")
    ]
    assert not (paths[0] & paths[1] or paths[0] & paths[2] or paths[1] & paths[2])


def test_records_are_a_lazy_sequence():
    records = demo_records("train", "demo:train=100000000")
    assert len(records) == 218_750_000
    assert records[-1] == records[len(records) - 1]
    assert records[5:7] == [records[5], records[6]]
    assert isinstance(records[np.int64(3)]["name"], str)
    with pytest.raises(IndexError):
        records[len(records)]


def test_smaller_sizes_are_beginnings_of_larger_ones():
    small, large = demo_records("train", "demo:train=6"), demo_records("train", "demo:train=60")
    assert list(small) == large[: len(small)]


def test_questions_are_paraphrased():
    asked = Counter((r["name"], turns(r)[0]) for r in demo_records("train", "demo:train=2000"))
    for name in ("heart_rate", "regularity", "signal_type"):
        counts = [n for (kind, _), n in asked.items() if kind == name]
        assert len(counts) >= 4
        assert min(counts) > 0.7 * np.mean(counts)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("demo:trian=5", "did you mean 'train'"),
        ("demo:train=5,train=6", "train twice"),
        ("demo:train=0", "train=<recordings>"),
        ("demo:test=1e3", "test=<recordings>"),
        ("demo:", "a split of train, val, test"),
        ("demos", "expected demo"),
    ],
)
def test_nonsense_sizes_are_the_users_error(name, found):
    with pytest.raises(UserError, match=found):
        parse_sizes(name)


def test_sizes_not_named_keep_their_default():
    assert parse_sizes("demo:test=7").train == parse_sizes("demo").train
    assert parse_sizes("demo:test=7").test == 7


def test_tokenizer_round_trips_and_gives_every_digit_a_token(tmp_path):
    tokenizer = demo_tokenizer()
    text = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>assistant\n142<|im_end|>\n  ü→ 5\n\nx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("142 7") == ["1", "4", "2", "Ġ", "7"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.tokenize("".join(specials)) == specials
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_an_answer_is_a_few_tokens():
    tokenizer = demo_tokenizer()
    for record in demo_records("val", "demo:val=40"):
        question, answer = turns(record)
        assert len(tokenizer(answer)["input_ids"]) <= 3
        assert len(tokenizer(question)["input_ids"]) <= 20


def test_tokenizer_is_saved_and_found_again(tmp_path):
    fresh = demo_tokenizer(tmp_path / "tokenizer")
    (stamp,) = {os.stat(tmp_path / "tokenizer/tokenizer.json").st_mtime_ns}
    again = demo_tokenizer(tmp_path / "tokenizer")
    assert os.stat(tmp_path / "tokenizer/tokenizer.json").st_mtime_ns == stamp
    assert sorted(os.listdir(tmp_path / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]
    assert fresh.get_vocab() == again.get_vocab() == demo_tokenizer().get_vocab()
    assert again.eos_token == "<|im_end|>"


def test_tokenizer_is_the_same_in_every_process():
    code = (
        "from elm_jax.data.demo import demo_tokenizer as t; import zlib;"
        "print(zlib.crc32(t().backend_tokenizer.to_str().encode()))"
    )
    run = lambda seed: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run("1").stdout == run("2").stdout != ""


def test_recordings_need_no_jax_and_no_tokenizer_library():
    code = (
        "import sys; from elm_jax.data.demo import load_demo_ecg; load_demo_ecg('demo:test:1');"
        "assert not {'jax', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paper_is_to_scale():
    ax = Figure().add_subplot()
    signal = np.zeros((12, 1000))
    signal[LEADS.index("II"), 100:400] = 2.0  # two millivolts from 1 s to 4 s
    draw_on(ax, signal, 100.0)
    (strip,) = (line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 1000)
    assert strip[:, 1].max() - strip[:, 1].min() == pytest.approx(20)  # 10 mm/mV
    assert strip[400, 0] - strip[100, 0] == pytest.approx(75)  # 25 mm/s
    pulse = ax.lines[0].get_xydata()
    assert np.ptp(pulse[:, 1]) == pytest.approx(10)
    assert ax.get_aspect() == 1


@pytest.mark.parametrize("text", ["$\\boxed{yes}$", "$", "a_b^$c$"])
def test_what_data_and_models_say_is_drawn_as_it_is_not_as_a_formula(tmp_path, text):
    signal = np.zeros((12, 500))
    gallery([Example([signal], text, text, text, True)], 50.0, tmp_path / "gallery.png")
    draw_ecg(signal, 50.0, tmp_path / "ecg.png", title=text, caption=(text,))


def test_paper_shows_every_lead_at_its_place():
    ax = Figure().add_subplot()
    signal = np.tile(np.arange(12.0)[:, None] / 20, (1, 1000)) * np.where(np.arange(1000) % 20 == 0, 1, 0)
    draw_on(ax, signal, 100.0)
    parts = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 250]
    labels = {text.get_text(): np.array(text.get_position()) for text in ax.texts if text.get_text() in LEADS}
    assert len(parts) == 12 and set(labels) == set(LEADS)
    for part, (index, name) in zip(parts, enumerate(LEADS), strict=True):
        assert np.ptp(part[:, 1]) == pytest.approx(index / 2)
        if name != "II":  # its label is repeated at the rhythm strip
            assert abs(labels[name][0] - part[0, 0]) < 2
            assert 0 < labels[name][1] - part[:, 1].min() < 15


def test_pictures_are_png_files(tmp_path):
    signal = at_100_hz(PATHS[0])
    draw_ecg(signal, 100.0, tmp_path / "ecg.png", title="How fast?", caption=("72", "71"))
    noise = np.random.default_rng(0).standard_normal((12, 1000))
    examples = [
        Example([signal, noise], "How fast?", "72", "71", True),
        Example([noise], "What is it?", "", "noise", False),
    ]
    gallery(examples, 100.0, tmp_path / "gallery.png")
    loss_plot([1, 2, 3], [3.0, float("nan"), 0.1], [None, None, 1.0], tmp_path / "loss.png")
    for name in ("ecg.png", "gallery.png", "loss.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
