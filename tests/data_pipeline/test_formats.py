"""Recordings of other formats than WFDB and .npy: what a writer has written is read, the rest refused in words."""

from __future__ import annotations

import csv
import gzip
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elm_jax.ecg.names import lead_of, millivolts
from elm_jax.ecg.recording import LEADS, Recording, read_ecg
from elm_jax.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where `scripts` lies

from scripts.fuzz.writers import edf  # noqa: E402

EIGHT = ("I", "II", *LEADS[6:])
STEPS = np.random.default_rng(5).integers(-900, 900, (12, 200))  # of one µV
STEPS[2] = STEPS[1] - STEPS[0]
MV = STEPS / 1000
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_ecg(path, **kwargs)
    return str(caught.value)


def same(recording: Recording, rate: float = 500, atol: float = 1e-6) -> None:
    assert recording.leads == LEADS and recording.sampling_rate == rate
    np.testing.assert_allclose(recording.signal, MV, atol=atol)


def of_eight(recording: Recording) -> None:
    """III, aVR, aVL and aVF from I and II."""
    one, two = MV[:2]
    limbs = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    assert recording.derived == ("III", "aVR", "aVL", "aVF")
    np.testing.assert_allclose(recording.signal, [*limbs, *MV[6:]], atol=1e-6)


# ---- names

SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper": str.upper,
    "lower": str.lower,
    "lead": lambda n: f"Lead {n}",
    "mdc": lambda n: f"MDC_ECG_LEAD_{n.upper()}",
    "ecg": lambda n: f"ECG {n}",
    "ekg": lambda n: f"EKG_{n}",
    "hyphen": lambda n: f"ecg-{n}",
    "blanks": lambda n: f"  {n} ",
    "apart": lambda n: " ".join(n) if n[0] in "aV" else n,
    "one word": lambda n: f"Lead{n}",
    "told": lambda n: f"Lead {n} (Einthoven)",
    "Latin": lambda n: f"D{n}" if n in LEADS[:3] else n.upper(),
    "digits": lambda n: f"D{len(n)}" if n in LEADS[:3] else n,
    "zeros": lambda n: n.replace("V", "V0") if n in LEADS[6:] else n,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lead_is_found_in_every_spelling(spelling: str) -> None:
    assert [lead_of(SPELLINGS[spelling](lead)) for lead in LEADS] == [(lead, False) for lead in LEADS]


NEGATED = "-aVR|−AVR|ECG -aVR|Lead -aVR|lead--aVR|MDC_ECG_LEAD_-AVR|MDC_ECG_LEAD_AVRneg|minus aVR|inverted aVR|- avr"


@pytest.mark.parametrize("name", NEGATED.split("|"))
def test_a_negated_lead_is_known_as_such(name: str) -> None:
    assert lead_of(name) == ("aVR", True)


OTHERS = ("|1|12|lead 1|VR|V7|V3R|IV|C1|EEG|SpO2|vx|aVRL|ECG|-|I II", "x" * 10_000, "lead" * 50 + "I")


@pytest.mark.parametrize("name", "|".join(OTHERS).split("|"), ids=lambda name: name[:9])
def test_what_is_no_lead_of_the_twelve_is_none(name: str) -> None:
    assert lead_of(name) is None


MICRO = "uV|µV|μV|ÂµV|Î¼V|æV|UV| uv |microvolt|MICROVOLTS|micro_volts|㎶|MDC_DIM_MICRO_VOLT"


@pytest.mark.parametrize("unit", MICRO.split("|"))
def test_microvolts_in_every_spelling_and_encoding(unit: str) -> None:
    assert millivolts(unit) == 1e-3


@pytest.mark.parametrize("unit", ["", "?V", "\ufffdV", "V/s", "mmHg", "kV", "µ", "%", "adu", "mV mV"])
def test_a_unit_that_is_none_of_volts_is_none(unit: str) -> None:
    assert millivolts(unit) is None


# ---- MATLAB


def mat(path: Path, values: dict[str, Any], **kwargs: Any) -> Path:
    scipy.io.savemat(path, values, **kwargs)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("names", [None, LEADS, np.array(LEADS, object), ", ".join(LEADS)], ids=str)
def test_matlab_version_5(tmp_path: Path, packed: bool, turned: bool, names: Any) -> None:
    values = {"ecg": MV.T if turned else MV, "fs": 500.0} | ({} if names is None else {"leads": names})
    same(read_ecg(mat(tmp_path / "a.mat", values, do_compression=packed)))


def test_matlab_version_4_and_big_endian_numbers(tmp_path: Path) -> None:
    path = mat(tmp_path / "a.mat", {"signal": MV, "Sampling_Rate": 500, "unit": "mV"}, format="4")
    same(read_ecg(path))
    head = struct.pack(">5I", 1000, *MV.shape, 0, 4) + b"ecg\0"
    rate = struct.pack(">5I", 1000, 1, 1, 0, 3) + b"fs\0" + struct.pack(">d", 500)
    path.write_bytes(head + MV.T.astype(">f8").tobytes() + rate)
    same(read_ecg(path))


def test_matlab_numbers_are_in_the_unit_that_is_said(tmp_path: Path) -> None:
    values = {"data": STEPS.astype(np.int16), "fs": 500, "units": "µV", "labels": list(LEADS[::-1])}
    recording = read_ecg(mat(tmp_path / "a.mat", values))
    np.testing.assert_allclose(recording.signal[::-1], MV, atol=1e-6)
    assert "furlongs" in refusal(mat(tmp_path / "b.mat", values | {"units": "furlongs"}))
    fields = [{"leads": names, "ecg": MV[[0, 1, *range(6, 12)]], "fs": 500} for names in (EIGHT, EIGHT[::-1])]
    of_eight(read_ecg(mat(tmp_path / "c.mat", fields[0])))
    assert read_ecg(tmp_path / "c.mat").dropped == ()


@pytest.mark.parametrize("packed", [False, True])
def test_a_matrix_of_matlab_5_beside_its_header_is_read_in_the_headers_units(tmp_path: Path, packed: bool) -> None:
    fields = ["1000(0)/mV 16 0", "2000(7)/mV 16 0", "1/uV 16 5", "1000/mV 16 0"]
    lines = [f"a.mat 16+24 {fields[place % 4]} 0 0 0 {lead}" for place, lead in enumerate(LEADS)]
    (tmp_path / "a.hea").write_text("\n".join(["a 12 500 200", *lines, ""]))
    steps = STEPS * np.array([1, 2, 1, 1] * 3)[:, None] + np.array([0, 7, 5, 0] * 3)[:, None]
    mat(tmp_path / "a.mat", {"val": steps.astype(np.int16)}, do_compression=packed)
    for name in ("a.mat", "a.hea", "a"):
        same(read_ecg(tmp_path / name))
    mat(tmp_path / "a.mat", {"val": steps[:, :100].astype(np.int16)})
    assert "val of 12 x 100; expected 12 x 200, as in a.hea" in refusal(tmp_path / "a")
    mat(tmp_path / "a.mat", {"ecg": steps})
    assert "no matrix val" in refusal(tmp_path / "a")


def test_matlab_structures_as_those_of_cpsc_2018(tmp_path: Path) -> None:
    path = mat(tmp_path / "a.mat", {"ECG": {"sex": "Male", "age": 61.0, "data": MV}})
    same(read_ecg(path))
    assert "no sampling rate" in refusal(mat(tmp_path / "b.mat", {"ECG": {"data": MV}}))
    assert read_ecg(tmp_path / "b.mat", sampling_rate=360).sampling_rate == 360


def test_matlab_files_that_leave_something_open_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    for whole in (STEPS.astype(np.int16), STEPS.astype(float)):
        assert "whole numbers without a unit" in refusal(mat(path, {"val": whole, "fs": 500}))
        same(read_ecg(path, unit="uV"))
    assert "unit: found 'steps'" in refusal(path, unit="steps")
    assert "ecg, data" in refusal(mat(path, {"ecg": MV, "data": MV, "fs": 500}))
    assert "no array" in refusal(mat(path, {"fs": 500}))
    assert "shape (3, 12, 40)" in refusal(mat(path, {"ecg": np.zeros((3, 12, 40)), "fs": 500}))
    assert "8 rows for 12" in refusal(mat(path, {"ecg": MV[:8], "fs": 500}), lead_order=LEADS)
    assert "no lead" in refusal(mat(path, {"ecg": MV[:8], "fs": 500}))


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_matlab_file_is_read_or_refused_whatever_its_bytes(tmp_path: Path, packed: bool) -> None:
    data = mat(tmp_path / "a.mat", {"ecg": MV, "fs": 500.0, "leads": list(LEADS)}, do_compression=packed).read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(150):
        spoilt = bytearray(data[: rng.choice([len(data), rng.integers(len(data))])])
        for at in rng.integers(min(len(spoilt), 400), size=3) if spoilt else ():
            spoilt[at] = rng.integers(256)
        (tmp_path / "b.mat").write_bytes(spoilt)
        try:
            assert read_ecg(tmp_path / "b.mat").signal.shape[0] == 12
        except UserError as error:
            assert "b.mat" in str(error)


def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    machine = zlib.compressobj(9)
    packed = b"".join(machine.compress(bytes(1 << 20)) for _ in range(24)) + machine.flush()
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    (tmp_path / "a.mat").write_bytes(head + struct.pack("<2I", 15, len(packed)) + packed)
    assert "packed bytes that become more than" in refusal(tmp_path / "a.mat")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(bytes(24 << 20)))
    assert "packed bytes that become more than" in refusal(tmp_path / "a.csv.gz")


def test_packed_arrays_may_not_become_large_together(tmp_path: Path) -> None:
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    count = 1 << 20

    def array(kind: int, numbers: int) -> bytes:
        body = struct.pack("<4I", 6, 8, kind, 0) + struct.pack("<2I2i", 5, 8, 1, count) + struct.pack("<2I", 1, 0)
        body += struct.pack("<2I", 2, numbers) + bytes(numbers)
        packed = zlib.compress(struct.pack("<2I", 14, len(body)) + body)
        return struct.pack("<2I", 15, len(packed)) + packed

    for kind, arrays in ((9, 17), (6, 2)):  # bytes that stay bytes; bytes that become double
        (tmp_path / "a.mat").write_bytes(head + array(kind, count) * arrays)
        assert "bytes that become more than" in refusal(tmp_path / "a.mat")
        (tmp_path / "a.mat").write_bytes(head + array(kind, count) * (arrays // 2))
        assert "no array" in refusal(tmp_path / "a.mat")


# ---- EDF


FRAMES = [row.reshape(4, 50) for row in STEPS]


@pytest.mark.parametrize("wide", [False, True])
def test_edf_and_bdf_with_other_signals_at_other_rates(tmp_path: Path, wide: bool) -> None:
    ending = "bdf" if wide else "edf"
    names = [f"ECG {lead}" for lead in LEADS]
    steps = [np.zeros((4, 9), int), *FRAMES, np.ones((4, 3), int)]
    path = edf(tmp_path / f"a.{ending}", ["EDF Annotations", *names, "SpO2"], steps, wide=wide)
    same(read_ecg(path))
    assert read_ecg(path).dropped == ("SpO2",)
    path = edf(tmp_path / f"b.{ending.upper()}", LEADS, FRAMES, wide=wide, records=-1, unit="µV".encode("latin-1"))
    same(read_ecg(path))


def test_edf_takes_limits_for_the_scale(tmp_path: Path) -> None:
    path = edf(tmp_path / "a.edf", LEADS, FRAMES, limits=(-5, 5, -1000, 1000), unit=b"mV")
    np.testing.assert_allclose(read_ecg(path).signal, STEPS / 200, atol=1e-6)
    names = [f"-{n}" if n == "aVR" else n for n in LEADS]
    path = edf(tmp_path / "b.edf", names, FRAMES, limits=(0, 1, 0, 1000), unit=b"mV")
    np.testing.assert_allclose(read_ecg(path).signal[3], -MV[3], atol=1e-6)


@few
@given(st.data())
def test_edf_that_lies_or_is_cut_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = edf(tmp_path / "a.edf", LEADS, FRAMES)
    content = bytearray(path.read_bytes())
    where = data.draw(st.sampled_from([184, 236, 244, 252, *range(256 + 12 * 216, 256 + 12 * 224, 8)]))
    value = data.draw(st.sampled_from(b"-2|0|9|99999999|1e9|x||nan|0.0001|-0|1 2".split(b"|")))
    width = 4 if where == 252 else 8
    content[where : where + width] = value[:width].ljust(width)
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), 100, 255, 300, len(content) - 1]))])
    try:
        recording = read_ecg(path)
    except UserError as error:
        assert "a.edf" in str(error)
    else:
        assert recording.signal.shape[0] == 12


def test_edf_with_gaps_unknown_units_or_no_scale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.edf"
    assert "in pieces" in refusal(edf(path, LEADS, FRAMES, kind=b"EDF+D"))
    assert "unit 'x'" in refusal(edf(path, LEADS, FRAMES, unit=b"x"))
    assert "unit ''" in refusal(edf(path, LEADS, FRAMES, unit=b""))
    assert "gain 0" in refusal(edf(path, LEADS, FRAMES, limits=(-5, 5, 7, 7)))
    assert "leads of" in refusal(edf(path, LEADS, [*FRAMES[:11], FRAMES[0][:, :20]]))
    assert "bytes of samples" in refusal(edf(path, LEADS, FRAMES, records=9))


# ---- tables


def lines(head: str, rows: Iterable[Sequence[object]], mark: str) -> str:
    return "\n".join([*([head] if head else []), *(mark.join(map(str, row)) for row in rows), ""])


@few
@given(st.data())
def test_a_table_is_read_whatever_parts_it_and_however_it_says_rate_and_unit(
    tmp_path: Path, data: st.DataObject
) -> None:
    draw = data.draw
    mark = draw(st.sampled_from([",", ";", "\t"]))
    unit, scale = draw(st.sampled_from([("mV", 1.0), ("uV", 1e3), ("µV", 1e3), ("", 1.0)]))
    names = [draw(st.sampled_from([lead, lead.upper(), f"Lead {lead}"])) for lead in LEADS]
    in_names, quoted = draw(st.booleans()), draw(st.booleans())
    time = draw(st.sampled_from([None, ("time", 1.0), ("time (s)", 1.0), ("Time [ms]", 1e3), ("sample", None)]))
    columns = list(np.round(MV * scale, 9))
    titles = [f"{name} ({unit})" if unit and in_names else name for name in names]
    if time:
        titles.insert(0, time[0])
        columns.insert(0, np.arange(200) * (0.002 * time[1] if time[1] else 1))
    said = [] if time and time[1] else ["# fs: 500 Hz"]
    said += [f"# unit: {unit}"] if unit and not in_names else []
    rows = [[f"{value:.9g}" for value in row] for row in np.array(columns).T]
    if mark != "," and draw(st.booleans()):
        rows = [[value.replace(".", ",") for value in row] for row in rows]
    head = mark.join(f'"{title}"' if quoted else title for title in titles)
    text = "\n".join([*said, lines(head, rows, mark)])
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "latin-1"]))
    path = tmp_path / draw(st.sampled_from(["a.csv", "a.TSV", "a.txt"]))
    path.write_bytes(text.replace("\n", draw(st.sampled_from(["\n", "\r\n"]))).encode(encoding))
    same(read_ecg(path))


def test_a_table_without_names_has_the_leads_in_order_and_its_rate_from_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    rows = np.concatenate([np.arange(200)[None], MV]).T
    path.write_bytes(gzip.compress(lines("", rows, ",").encode()))
    assert "no sampling rate" in refusal(path)
    same(read_ecg(path, sampling_rate=500))
    order = LEADS[::-1]
    np.testing.assert_allclose(read_ecg(path, order, sampling_rate=500).signal, MV[::-1], atol=1e-6)


NO_TABLES = {
    "": "no line",
    "I\n1\n": "1 columns",
    "I,II\n1,x\n": "no table",
    "I,II\n1\n": "no table|under",
    "I,II\n1,2\n3\n": "no table",
    "I,II\n": "no line of numbers",
    "I,II\n1,2\n": "no lead",
    "\0\1,2\n\0": "a NUL|no table",
    "x" * 30_000: "30000 characters",
    "time,I\n0,1\n1,1\n3,1\n": "not evenly",
    "# fs: fast\nI,II\n1,2\n": "rate",
    "time (h),I\n0,1\n1,1\n": "times in 'h'",
}


@pytest.mark.parametrize("text, said", NO_TABLES.items(), ids=lambda text: ascii(text)[:20])
def test_what_is_no_table_of_leads_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert re.search(said, refusal(tmp_path / "a.csv"))


def test_eight_leads_of_a_table_are_made_twelve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("# fs=500\n" + lines(",".join(EIGHT), MV[[0, 1, *range(6, 12)]].T, ","))
    with caplog.at_level("INFO"):
        of_eight(read_ecg(tmp_path / "a.csv"))
    assert "III, aVR, aVL, aVF computed from I and II" in caplog.text and "taken as mV" in caplog.text


# ---- real files


def test_real_files_are_what_their_index_says(shared: Path) -> None:
    with (shared / "real" / "INDEX_ecg.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["source"].startswith("ptbxl")]
    assert len(rows) > 80
    for row in rows:
        bare = {"sampling_rate": 500, "unit": "uV"} if row["source"] == "cinc2011" else {}
        recording = read_ecg(shared / "real" / row["path"], **bare)
        assert recording.sampling_rate == float(row["fs"]), row
        assert recording.signal.shape == (12, int(row["n_samples"])), row
        if int(row["leads"]) == 12:  # else the index counts further leads too
            found = [recording.signal.min(), recording.signal.max()]
            np.testing.assert_allclose(found, [float(row["min_mV"]), float(row["max_mV"])], atol=6e-4, err_msg=str(row))
            flat = np.count_nonzero(np.ptp(recording.signal, axis=1) == 0)  # the index misses some
            assert flat >= int(row["flat_leads"]), row


def test_a_real_recording_comes_out_equal_from_every_format_that_holds_its_steps(shared: Path, tmp_path: Path) -> None:
    source = read_ecg(shared / "real/ecg/ptbxl/records500/00000/00002_hr", dtype=np.float64)
    steps = np.round(source.signal * 1000).astype(int)
    np.testing.assert_allclose(steps / 1000, source.signal, atol=1e-9)
    edf(tmp_path / "a.edf", LEADS, [row.reshape(10, 500) for row in steps], seconds=1)
    mat(tmp_path / "b.mat", {"ecg": source.signal, "fs": 500, "leads": list(LEADS)})
    (tmp_path / "c.csv").write_text("# fs: 500\n" + lines(",".join(LEADS), source.signal.T, ","))
    for name in ("a.edf", "b.mat", "c.csv"):
        np.testing.assert_array_equal(read_ecg(tmp_path / name).signal, source.signal.astype(np.float32), name)
