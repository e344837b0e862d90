"""WFDB records: each signal at its own rate and in millivolts, each segment by its own header, the rest refused."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elm_jax.config import DataConfig
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import LEADS, read_ecg, say_again, to_segment
from elm_jax.errors import UserError

MICRO = ("\u00b5V", "\u03bcV", "uV", "UV", "uv", "\u00b5v", "\u33b6", "microvolt", "microvolts", "Microvolts", "uvolts")
MILLI = ("mV", "mv", "MV", "millivolt", "millivolts", "mvolt", "\u33b7", "")
OTHERS = {1e3: ("V", "v", "volt", "Volts"), 1e-6: ("nV", "nanovolts")}
SCALES = {unit: 1e-3 for unit in MICRO} | {unit: 1.0 for unit in MILLI}
SCALES |= {unit: scale for scale, units in OTHERS.items() for unit in units}
STEPS = np.arange(12)[:, None] * 10 + np.arange(40)[None]  # of the converter: every row and sample is told apart

few = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(
    folder, name="r", steps=STEPS, lines=None, first=None, gain="1000/mV", form="16", names=LEADS, encoding="utf-8",
    more="",
):
    """A record of format 16: `first` is its first line; `lines` of its signals, or their `gain`, `form` and `names`."""
    rows = len(names)
    lines = lines or [f"{name}.dat {form} {gain} 16 0 0 0 0 {lead}" for lead in names]
    first = first or f"{name} {rows} 500 {steps.shape[1]}"
    (folder / f"{name}.hea").write_bytes("\n".join([first, *lines, more, ""]).encode(encoding))
    (folder / f"{name}.dat").write_bytes(steps.T.astype("<i2").tobytes())
    return folder / name


def refusal(path, **kwargs):
    with pytest.raises(UserError) as caught:
        read_ecg(path, **kwargs)
    return str(caught.value)


# ---- units


@few
@given(st.sampled_from(sorted(SCALES)), st.sampled_from(["utf-8", "utf-8-sig", "latin-1"]), st.data())
def test_every_spelling_of_a_unit_is_its_millivolts_in_every_encoding_and_gain(tmp_path, unit, encoding, data):
    try:
        unit.encode(encoding)
    except UnicodeEncodeError:
        encoding = "utf-8"
    gain = data.draw(st.sampled_from([1.0, 200.0, 1000.0, 0.5, -2.0, 1e3, 4.88]))
    baseline = data.draw(st.none() | st.integers(-100, 100))
    field = f"{gain}{'' if baseline is None else f'({baseline})'}{'/' + unit if unit else ''}"
    path = write(tmp_path, gain=field, encoding=encoding, more="# größe 5 µV \x85 end" if encoding != "ascii" else "")
    expected = (STEPS - (baseline or 0)) / gain * SCALES[unit]
    np.testing.assert_allclose(read_ecg(path).signal, expected, rtol=1e-6)


@pytest.mark.parametrize("unit", ["adu", "mmHg", "A", "mVs", "V/s", "dB", "pm", "%", "nd", "µ", "Mega-V"])
def test_a_unit_that_is_no_voltage_is_refused_by_name(tmp_path, unit):
    said = refusal(write(tmp_path, gain=f"1000/{unit}"))
    assert f"unit {unit!r} of signal I" in said and "V, mV, µV or nV" in said and "r.hea" in said


def test_a_signal_that_is_not_read_may_have_any_unit_gain_and_rate(tmp_path):
    names = ("Resp", *LEADS)
    lines = [f"r.dat 16x2 0/pm 16 0 0 0 0 {names[0]}", *(f"r.dat 16 1000/mV 16 0 0 0 0 {lead}" for lead in LEADS)]
    steps = np.concatenate([np.zeros((2, 40), int), STEPS])
    recording = read_ecg(write(tmp_path, steps=steps, lines=lines, names=names))
    np.testing.assert_allclose(recording.signal, STEPS / 1000, atol=1e-6)
    assert recording.dropped == ("Resp",)


@pytest.mark.parametrize("gain", ["0", "0.0/mV", "0(5)/uV", "/mV", "", "-0/mV"])
def test_a_signal_without_a_gain_is_refused_as_uncalibrated(tmp_path, gain):
    lines = [f"r.dat 16 {gain} 16 0 0 0 0 {lead}" if gain else "r.dat 16" for lead in LEADS]
    assert "uncalibrated" in refusal(write(tmp_path, lines=lines), lead_order=LEADS)


@pytest.mark.parametrize(
    "gain", ["ten/mV", "+200/mV", "1,5/mV", "1000(1.5)/mV", "1000(+5)/mV", "1E3/mV", "nan/mV", "-/mV", "."]
)
def test_a_gain_that_wfdb_would_read_as_another_is_refused(tmp_path, gain):
    assert "r.hea: found" in refusal(write(tmp_path, gain=gain))


def test_without_a_baseline_the_converters_zero_counts(tmp_path):
    lines = [f"r.dat 16 1000/mV 16 100 0 0 0 {lead}" for lead in LEADS]
    np.testing.assert_allclose(read_ecg(write(tmp_path, lines=lines)).signal, (STEPS - 100) / 1000, atol=1e-6)


# ---- rates


@few
@given(st.integers(1, 12), st.sampled_from([1, 7, 50, 62.5, 0.5, 360]), st.integers(1, 9))
def test_each_signal_is_read_at_its_own_rate_whatever_a_frame_holds(tmp_path, per_frame, frame_rate, frames):
    steps = np.random.default_rng(per_frame).integers(-500, 500, (12, frames * per_frame))
    framed = steps.reshape(12, frames, per_frame).transpose(1, 0, 2).reshape(frames, -1).T
    path = write(tmp_path, steps=framed, form=f"16x{per_frame}", first=f"r 12 {frame_rate} {frames}")
    if frame_rate * per_frame < 1:
        assert "0.5" in refusal(path)
        return
    recording = read_ecg(path)
    assert recording.sampling_rate == frame_rate * per_frame
    np.testing.assert_allclose(recording.signal, steps / 1000, atol=1e-6)


def test_leads_at_several_rates_are_refused_with_the_rates(tmp_path):
    lines = [f"r.dat 16{'x2' * (lead == 'V6')} 1000/mV 16 0 0 0 0 {lead}" for lead in LEADS]
    assert "leads at 500 Hz and 1000 Hz" in refusal(write(tmp_path, steps=np.ones((13, 40)), lines=lines))


@pytest.mark.parametrize(
    "field, rate",
    [("500", 500), ("500/1000(0)", 500), ("500/1000", 500), ("257.5", 257.5), ("5e2", 500), ("500(3)", 500), ("", 250)],
)
def test_the_rate_is_read_with_or_without_a_counter(tmp_path, field, rate):
    assert read_ecg(write(tmp_path, first=f"r 12 {field}{' 40' * bool(field)}")).sampling_rate == rate


@pytest.mark.parametrize("field", ["-250", "0", "1e-9", f"1{'0' * 400}", "nan", "inf", "fast", "5e5"])
def test_a_rate_that_no_ecg_has_is_refused(tmp_path, field):
    said = refusal(write(tmp_path, first=f"r 12 {field} 40"))
    assert "rate" in said and "r" in said and len(said) < 400


def test_skewed_signals_are_brought_together_and_end_where_all_have_samples(tmp_path):
    steps = STEPS.copy()
    steps[3] = np.roll(STEPS[3], 4)
    lines = [f"r.dat 16{':4' * (lead == 'aVR')} 1000/mV 16 0 0 0 0 {lead}" for lead in LEADS]
    path = write(tmp_path, steps=steps, lines=lines)
    np.testing.assert_allclose(read_ecg(path).signal, STEPS[:, :36] / 1000, atol=1e-6)
    lines[3] = lines[3].replace(":4", ":999999")
    assert "no samples" in refusal(write(tmp_path, steps=steps, lines=lines))


def test_samples_behind_a_byte_offset_are_read(tmp_path):
    path = write(tmp_path, form="16x1+24")
    data = path.with_suffix(".dat")
    data.write_bytes(b"\xff" * 24 + data.read_bytes())
    np.testing.assert_allclose(read_ecg(path).signal, STEPS / 1000, atol=1e-6)


def test_a_header_that_names_what_no_file_can_be_called_is_refused(tmp_path):
    path = write(tmp_path, lines=[f"{'a' * 300} 16 1000/mV 16 0 0 0 0 {lead}" for lead in LEADS])
    assert "r.hea: found an unreadable record" in refusal(path)


# ---- segments


def segments(folder, kinds, layout=False, first=None):
    """A record of 40 samples a segment, of segments with these gains."""
    for place, gain in enumerate(kinds):
        write(folder, f"s{place}", gain=gain)
    lines = [f"s{place} 40" for place in range(len(kinds))]
    if layout:
        (folder / "layout.hea").write_text("layout 12 500 0\n" + "".join(f"~ 0 200/mV 0 0 0 0 0 {n}\n" for n in LEADS))
        lines.insert(0, "layout 0")
    head = first or f"m/{len(lines)} 12 500 {40 * len(kinds)}"
    (folder / "m.hea").write_text("\n".join([head, *lines]) + "\n")
    return folder / "m"


@pytest.mark.parametrize("layout", [False, True])
def test_each_segment_is_scaled_by_its_own_header(tmp_path, layout):
    recording = read_ecg(segments(tmp_path, ["1000/mV", "1/uV", "1e6/V"], layout))
    np.testing.assert_allclose(recording.signal, np.concatenate([STEPS / 1000] * 3, axis=1), atol=1e-6)
    assert recording.sampling_rate == 500


def test_a_segment_with_its_leads_in_another_order_is_read_by_their_names(tmp_path):
    path = segments(tmp_path, ["1000/mV"] * 2, layout=True)
    write(tmp_path, "s1", steps=STEPS[::-1], names=LEADS[::-1])
    np.testing.assert_allclose(read_ecg(path).signal, np.concatenate([STEPS / 1000] * 2, axis=1), atol=1e-6)


def test_segments_that_do_not_fit_together_are_refused(tmp_path):
    path = segments(tmp_path, ["1000/mV"] * 2)
    write(tmp_path, "s1", names=LEADS[:11], steps=STEPS[:11])
    assert "s1.hea" in refusal(path) and "V6" in refusal(path)
    write(tmp_path, "s1", first="s1 12 250 40")
    assert "250 frames a second; expected 500" in refusal(path)
    write(tmp_path, "s1", steps=STEPS[:, :30])
    assert "30 frames; expected 40" in refusal(path)
    write(tmp_path, "s1", gain="1/adu")
    assert "s1.hea" in refusal(path) and "'adu'" in refusal(path)
    (tmp_path / "s1.hea").write_text("s1/1 12 500 40\ns0 40\n")
    assert "segments of a segment" in refusal(path)
    (tmp_path / "s1.hea").unlink()
    assert "s1.hea" in refusal(path)


@pytest.mark.parametrize("lines", ["m 40", "../s0 40", "~ 40", "s0", "s0 -40", "/etc/passwd 40", "s0 40 extra"])
def test_segments_that_are_none_are_refused(tmp_path, lines):
    path = segments(tmp_path, ["1000/mV"])
    (tmp_path / "m.hea").write_text(f"m/1 12 500 40\n{lines}\n")
    assert "m.hea: found" in refusal(path)


def test_a_recordings_stamp_changes_with_every_file_of_every_segment(tmp_path):
    path = segments(tmp_path, ["1000/mV"] * 2)
    spec = signal_spec(DataConfig(root=str(tmp_path)), seed=0)
    seen = [spec.names_of(path.name, 0)]
    for name in ("m.hea", "s0.hea", "s1.hea", "s0.dat", "s1.dat"):
        os.utime(tmp_path / name, ns=(1, 1))
        seen.append(spec.names_of(path.name, 0))
    assert len(set(seen)) == len(seen)
    (tmp_path / "s0.hea").write_text("s0/1 12 500 40\nm 40\n")  # segments of each other
    assert spec.names_of(path.name, 0)


# ---- what a header can leave empty


@few
@given(st.data())
def test_whatever_field_of_a_header_is_empty_the_values_are_right_or_refused(tmp_path, data):
    fields = ["r.dat", "16", "1000(0)/mV", "16", "0", "0", "0", "0"]
    kept = data.draw(st.integers(0, len(fields)))
    named = data.draw(st.booleans())
    row = data.draw(st.integers(0, 11))
    lines = [" ".join([*fields, lead]) for lead in LEADS]
    lines[row] = " ".join([*fields[:kept], *[LEADS[row]] * (named and kept == len(fields))])
    record = ["r", "12", "500", "40"][: data.draw(st.integers(0, 4))]
    comments = data.draw(st.sampled_from(["", "# age 5", "#"]))
    path = write(tmp_path, lines=lines, first=" ".join(record) or "#", more=comments)
    order = data.draw(st.sampled_from([None, LEADS]))
    try:
        recording = read_ecg(path, order)
    except UserError as error:
        assert "r.hea" in str(error) or "no lead" in str(error)
        assert kept < 3 or not named or len(record) < 2 or kept < len(fields)
    else:
        np.testing.assert_allclose(recording.signal, STEPS / 1000, atol=1e-6)
        assert recording.sampling_rate == (500 if len(record) > 2 else 250)


@pytest.mark.parametrize(
    "text", ["", "# only\n# comments\n", "\n\n", "\ufeff", "r\n", "r 12\n", "r -1 500 40\n", "\x00\x01", "r 0 500\n"]
)
def test_a_header_without_signals_is_refused(tmp_path, text):
    path = write(tmp_path)
    (tmp_path / "r.hea").write_text(text, encoding="utf-8")
    assert re.search(r"r\.hea: found|no lead", refusal(path))


def test_signals_without_a_description_are_refused_or_named_by_lead_order(tmp_path):
    path = write(tmp_path, lines=["r.dat 16 1000/mV 16 0 0 0 0"] * 12)
    assert "one without a name" in refusal(path) and "in the header" in refusal(path)
    np.testing.assert_allclose(read_ecg(path, lead_order=LEADS).signal, STEPS / 1000, atol=1e-6)


@pytest.mark.parametrize(
    "form", ["16x0", "16x-2", "99", "16:x", "16:9999999", "sixteen", "16x1+99999999", "24", "32", "508", "516"]
)
def test_a_format_that_does_not_fit_the_file_is_refused(tmp_path, form):
    assert "r.hea: found" in refusal(write(tmp_path, form=form))


@pytest.mark.parametrize(
    "first", ["r 12 500 41", "r 12 500 900000000000000", "r 13 500 40", "r 999999999 500 40", "r/3 12 500 40"]
)
def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path, first):
    assert "r.hea: found" in refusal(write(tmp_path, first=first))


def test_the_advice_for_a_record_that_wfdb_cannot_read_can_be_followed(tmp_path):
    path = write(tmp_path)
    (tmp_path / "r.dat").unlink()
    assert "download it again if it is damaged, else save its signals as .npy" in refusal(path)
    assert "r.dat" in refusal(path)


# ---- leads


@pytest.mark.parametrize("name", ["-aVR", "-AVR", "\N{MINUS SIGN}aVR"])
def test_a_negated_lead_is_turned_back(tmp_path, name):
    names = [name if lead == "aVR" else lead for lead in LEADS]
    recording = read_ecg(write(tmp_path, names=names))
    expected = np.where(np.array(LEADS)[:, None] == "aVR", -STEPS, STEPS) / 1000
    np.testing.assert_allclose(recording.signal, expected, atol=1e-6)
    assert recording.leads == LEADS and recording.dropped == ()


def test_a_lead_that_is_there_both_ways_is_taken_as_it_is_and_twice_is_refused(tmp_path):
    both = read_ecg(write(tmp_path, names=("-aVR", *LEADS), steps=np.concatenate([STEPS[:1], STEPS])))
    np.testing.assert_allclose(both.signal, STEPS / 1000, atol=1e-6)
    assert both.dropped == ("-aVR",)
    twice = write(tmp_path, names=("avr", *LEADS), steps=np.concatenate([STEPS[:1], STEPS]))
    assert "each lead once, aVR too" in refusal(twice)
    others = write(tmp_path, names=("Resp", *LEADS, "Resp"), steps=np.concatenate([STEPS[:1], STEPS, STEPS[:1]]))
    assert read_ecg(others).dropped == ("Resp", "Resp"), "others may be named alike"


def test_leads_left_out_are_said_once_for_all_recordings_and_stand_in_the_recording(tmp_path, caplog):
    say_again()
    names = (*LEADS, "vx", "vy", "vz")
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        path = write(tmp_path / patient, names=names, steps=np.concatenate([STEPS, STEPS[:3]]))
        assert read_ecg(path).dropped == ("vx", "vy", "vz")
    said = [record for record in caplog.records if "vx, vy, vz left out" in record.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING"


# ---- paths


@pytest.mark.parametrize(
    "path", ["", "a\0b", "a\0.npy", "\ud800", "\ud800.npy", ".", "..", "/", "a" * 5000, "b" * 5000 + ".npy"]
)
def test_what_no_file_can_be_called_is_refused_by_reading_and_by_name(tmp_path, path):
    with pytest.raises(UserError) as caught:
        read_ecg(path)
    str(caught.value).encode()
    spec = signal_spec(DataConfig(root=str(tmp_path)), seed=0)
    with pytest.raises(UserError):
        spec.load(path, 0)
    assert spec.names_of(path, 0)


# ---- real recordings


def test_fifteen_real_leads_are_read_as_twelve_and_say_so(shared):
    recording = read_ecg(shared / "real/ecg/ptbdb/s0010_re")
    assert recording.dropped == ("vx", "vy", "vz") and to_segment(recording).shape == (12, 2500)


def test_real_records_are_what_wfdb_says_they_are(shared):
    import wfdb

    headers = sorted(Path(shared / "real/ecg").rglob("*.hea"))
    for header in headers[:: max(1, len(headers) // 40)]:
        record = wfdb.rdrecord(str(header.with_suffix("")))
        order = [[name.casefold() for name in record.sig_name].index(lead.casefold()) for lead in LEADS]
        recording = read_ecg(header)
        assert recording.sampling_rate == record.fs
        np.testing.assert_allclose(recording.signal, record.p_signal.T[order], atol=1e-5)


LONG = {"line": b"r 12 500 40\n" + b"x" * 2000, "file": b"r 12 500 40\n# " + b"x" * 2_000_000}


@pytest.mark.parametrize("header", LONG.values(), ids=LONG)
def test_a_header_longer_than_any_is_refused(tmp_path, header):
    (tmp_path / "r.hea").write_bytes(header)
    assert "at most" in refusal(tmp_path / "r.hea")


@pytest.mark.parametrize("file", ["r.dat", "part.hea"])
def test_devices_and_pipes_are_not_read(tmp_path, file):
    path = write(tmp_path)
    if file == "part.hea":
        (tmp_path / "r.hea").write_text("r/1 12 500 40\npart 40\n")
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).symlink_to(os.devnull)
    assert f"{file}: found no regular file" in refusal(path)
