"""Recordings: files in every form, lead order, what is refused, resampling, normalisation."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from parity_log import compare

from elm_jax.ecg.recording import AVL_FIRST, LEADS, NORMALIZATIONS, min_max, normalize, read_ecg, to_segment
from elm_jax.errors import UserError


def ramp(samples=40, rows=12, dtype=np.float32):
    """Row r is r + t/1000: every row and sample is told apart."""
    return (np.arange(rows)[:, None] + np.arange(samples)[None] / 1000).astype(dtype)


def save_dict(path, ecg, **others):
    np.save(path, {"ecg": ecg, "report": "sinus rhythm", **others}, allow_pickle=True)
    return path


def refusal(path, **kwargs):
    with pytest.raises(UserError) as caught:
        read_ecg(path, **kwargs)
    return str(caught.value)


# ---- plain .npy


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", ">f8", "<f2", "<i2", ">i4", "u1"])
def test_a_plain_array_is_read_whatever_its_dtype(tmp_path, dtype):
    values = ramp() if np.dtype(dtype).kind == "f" else np.arange(480).reshape(12, 40) % 100
    np.save(tmp_path / "a.npy", values.astype(dtype))
    recording = read_ecg(tmp_path / "a.npy")
    np.testing.assert_array_equal(recording.signal, values.astype(dtype).astype(np.float32))
    assert recording.signal.dtype == np.float32 and recording.signal.dtype.isnative
    assert recording.leads == LEADS and recording.sampling_rate == 250 and recording.report == ""


def test_fortran_order_and_later_header_versions_are_read(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(ramp()))
    np.testing.assert_array_equal(read_ecg(tmp_path / "f.npy").signal, ramp())
    with open(tmp_path / "v2.npy", "wb") as file:
        np.lib.format.write_array(file, ramp(), version=(2, 0))
    np.testing.assert_array_equal(read_ecg(tmp_path / "v2.npy").signal, ramp())


def test_the_signal_returned_may_be_written_to(tmp_path):
    np.save(tmp_path / "a.npy", ramp())
    read_ecg(tmp_path / "a.npy").signal[0, 0] = 1.0


def test_truncated_and_padded_files_are_named(tmp_path):
    np.save(tmp_path / "a.npy", ramp())
    whole = (tmp_path / "a.npy").read_bytes()
    for cut in (3, 60, len(whole) - 1):
        (tmp_path / "cut.npy").write_bytes(whole[:cut])
        assert "cut.npy" in refusal(tmp_path / "cut.npy")
    assert "truncated" in refusal(tmp_path / "cut.npy")
    (tmp_path / "long.npy").write_bytes(whole + b"x")
    assert "trailing" in refusal(tmp_path / "long.npy")


def test_a_header_that_claims_an_absurd_shape_is_refused_without_allocating(tmp_path):
    np.save(tmp_path / "a.npy", ramp())
    data = (tmp_path / "a.npy").read_bytes().replace(b"(12, 40), }" + b" " * 12, b"(12, 400000000000), }  ")
    (tmp_path / "big.npy").write_bytes(data)
    assert "400000000000" in refusal(tmp_path / "big.npy")


@pytest.mark.parametrize(
    "values, says",
    [
        (ramp(rows=11), "11 rows"),
        (ramp().T, "transposed"),
        (np.zeros((1, 12, 40)), "(1, 12, 40)"),
        (np.zeros(12), "(12,)"),
        (np.zeros((12, 0)), "(12, 0)"),
        (ramp().astype(complex), "dtype <c16"),
        (np.full((12, 40), "x"), "dtype <U1"),
        (ramp() > 3, "dtype |b1"),
    ],
)
def test_what_is_not_twelve_leads_of_numbers_is_refused(tmp_path, values, says):
    np.save(tmp_path / "a.npy", values)
    assert says in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_lead_and_sample(tmp_path, bad):
    values = ramp()
    values[4, 17] = bad
    np.save(tmp_path / "a.npy", values)
    assert "lead aVL at sample 17 (1 in all)" in refusal(tmp_path / "a.npy")


def test_a_value_beyond_float32_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ramp(dtype=np.float64) * 1e300)
    assert "inf" in refusal(tmp_path / "a.npy")


def test_files_that_are_not_there_or_not_numpy(tmp_path):
    (tmp_path / "text.npy").write_text("hello")
    assert "no numpy header" in refusal(tmp_path / "text.npy")
    assert "none.npy" in refusal(tmp_path / "none.npy")
    assert "data.root" in refusal(tmp_path / "none.npy")
    (tmp_path / "dir.npy").mkdir()
    assert "directory" in refusal(tmp_path / "dir.npy").lower()
    assert "no file" in refusal(tmp_path / "record")
    (tmp_path / "a.csv").write_text("1,2")
    assert "header" in refusal(tmp_path / "a.csv")


# ---- the reference's pickled dictionaries


def test_the_references_dictionary_is_read(tmp_path):
    path = save_dict(tmp_path / "a.npy", ramp(dtype=np.float64), target_sf=500, segment_len=40, npy_path="x")
    recording = read_ecg(path)
    np.testing.assert_array_equal(recording.signal, ramp())
    assert recording.report == "sinus rhythm" and recording.sampling_rate == 500
    assert read_ecg(path, sampling_rate=100).sampling_rate == 100


def test_rows_that_are_lists_of_numbers_are_read(tmp_path):
    np.testing.assert_array_equal(read_ecg(save_dict(tmp_path / "a.npy", ramp().tolist())).signal, ramp())


def test_a_report_of_several_statements_is_joined(tmp_path):
    np.save(tmp_path / "a.npy", {"ecg": ramp(), "report": ["one", "two"]}, allow_pickle=True)
    assert read_ecg(tmp_path / "a.npy").report == "one; two"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_binary_pickle_protocol_and_numpys_old_module_names_are_read(tmp_path, protocol):
    header = (
        b"\x93NUMPY\x01\x00\x46\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(69)
        + b"\n"
    )
    content = np.array({"ecg": ramp(), "report": "r", "n": np.float64(3), "b": b"\xff"}, dtype=object)
    body = pickle.dumps(content, protocol)
    if protocol == 2:
        body = body.replace(b"numpy._core", b"numpy.core")  # as numpy 1 wrote it
    (tmp_path / "a.npy").write_bytes(header + body)
    np.testing.assert_array_equal(read_ecg(tmp_path / "a.npy").signal, ramp())


class _Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["value", "report", "ecg"])
def test_a_pickle_that_would_run_code_is_refused_before_it_runs(tmp_path, place):
    flag = tmp_path / "ran"
    exploit = _Exploit(os.system, f"touch {flag}")
    value = {"ecg": ramp(), "report": "r"}
    np.save(tmp_path / "a.npy", exploit if place == "value" else {**value, place: exploit}, allow_pickle=True)
    assert "refused" in refusal(tmp_path / "a.npy")
    assert not flag.exists()


@pytest.mark.parametrize(
    "function, arguments",
    [
        (eval, ("1",)),
        (getattr, ("a", "upper")),
        (np.load, ("x",)),
        (pickle.loads, (b"x",)),
        (__import__, ("os",)),
    ],
)
def test_no_function_but_the_ones_that_rebuild_arrays_is_reachable(tmp_path, function, arguments):
    np.save(tmp_path / "a.npy", {"ecg": ramp(), "report": _Exploit(function, *arguments)}, allow_pickle=True)
    assert "refused" in refusal(tmp_path / "a.npy")


def test_broken_or_strange_pickles_are_refused_in_one_line(tmp_path):
    save_dict(tmp_path / "a.npy", ramp())
    whole = (tmp_path / "a.npy").read_bytes()
    for cut in range(130, len(whole), 97):
        (tmp_path / "b.npy").write_bytes(whole[:cut])
        assert "\n" not in refusal(tmp_path / "b.npy")
    for value, says in [
        ({"signal": ramp()}, "ecg"),
        ([1, 2], "list"),
        ({"ecg": "text"}, "type str"),
        ({"ecg": [[1.0, 2.0], [3.0]]}, "type list"),
        ({"ecg": [["1.0"] * 40] * 12}, "type list"),
        ({"ecg": [[10**400] * 40] * 12}, "broken"),
        ({"ecg": ramp(), "target_sf": 10**400}, "broken"),
        ({"ecg": ramp(), "target_sf": 1e-9}, "sampling rate 1e-09"),
        ({"ecg": ramp(), "target_sf": "500"}, "sampling rate of type str"),
        ({"ecg": ramp(), "target_sf": True}, "sampling rate of type bool"),
        ({"ecg": ramp(), "leads": "I II"}, "leads of type str"),
        ({"ecg": ramp(), "leads": [1] * 12}, "leads of type list"),
        ({"ecg": np.array([["1.0"] * 40] * 12)}, "broken"),
        ({1: 2}, "dict"),
    ]:
        np.save(tmp_path / "c.npy", np.array(value, dtype=object) if isinstance(value, dict) else value)
        if isinstance(value, list):
            content = np.empty((), object)
            content[()] = value
            np.save(tmp_path / "c.npy", content, allow_pickle=True)
        assert says in refusal(tmp_path / "c.npy")


# ---- lead order


@pytest.mark.parametrize(
    "folder, order",
    [
        ("ptb_xl/preprocessed_40", LEADS),
        ("csn/preprocessed_40_250", LEADS),
        ("cpsc", LEADS),
        ("mimic_iv/preprocessed_40", AVL_FIRST),
        ("code15/preprocessed_40_250", AVL_FIRST),
        ("elsewhere", LEADS),
    ],
)
def test_rows_without_names_follow_the_known_order_of_their_dataset(tmp_path, folder, order):
    (tmp_path / folder).mkdir(parents=True)
    save_dict(tmp_path / folder / "a.npy", ramp())
    rows = read_ecg(tmp_path / folder / "a.npy").signal[:, 0].astype(int)
    assert [order[row] for row in rows] == list(LEADS)


def test_an_order_that_is_only_assumed_is_noted_once_per_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", ramp())
        read_ecg(tmp_path / f"{name}.npy")
    assert sum("no lead names" in message for message in caplog.messages) == 1


def test_names_in_the_file_and_lead_order_win_over_the_folder(tmp_path):
    folder = tmp_path / "mimic_iv"
    folder.mkdir()
    names = tuple(reversed(LEADS))
    path = save_dict(folder / "a.npy", ramp(), leads=names)
    assert read_ecg(path).signal[:, 0].tolist() == list(range(11, -1, -1))
    assert read_ecg(path, lead_order=[n.upper() for n in LEADS]).signal[:, 0].tolist() == list(range(12))


def test_further_rows_are_dropped_and_a_lead_missing_or_twice_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ramp(rows=15))
    order = ("vx", *LEADS, "vy", "vz")
    assert read_ecg(tmp_path / "a.npy", lead_order=order).signal[:, 0].tolist() == list(range(1, 13))
    assert "no lead aVF" in refusal(tmp_path / "a.npy", lead_order=[n if n != "aVF" else "x" for n in order])
    assert "each lead once" in refusal(
        tmp_path / "a.npy", lead_order=[n if n != "vx" else "i" for n in order]
    )
    assert "15 rows for 12 lead names" in refusal(tmp_path / "a.npy", lead_order=LEADS)


@pytest.mark.parametrize("rate", [0, -250, float("nan"), float("inf"), 1e-9, 1e9])
def test_a_rate_that_is_none_is_refused(tmp_path, rate):
    np.save(tmp_path / "a.npy", ramp())
    assert "sampling rate" in refusal(tmp_path / "a.npy", sampling_rate=rate)
    assert "sampling rate" in refusal(save_dict(tmp_path / "b.npy", ramp(), target_sf=rate))
    assert "sampling rate inf" in refusal(tmp_path / "a.npy", sampling_rate=10**400)


# ---- WFDB


def write_wfdb(folder, name="r", values=None, names=LEADS, units="mV", fmt="16", rate=500, **kwargs):
    import wfdb

    values = ramp(rows=len(names), dtype=np.float64) if values is None else values
    wfdb.wrsamp(
        name,
        fs=rate,
        units=[units] * len(names),
        sig_name=list(names),
        p_signal=values.T,
        fmt=[fmt] * len(names),
        write_dir=str(folder),
        **kwargs,
    )
    return Path(folder, name)


def test_a_wfdb_record_is_read_by_any_of_its_names_in_canonical_order(tmp_path):
    names = [n.upper() for n in AVL_FIRST] + ["vx"]
    record = write_wfdb(tmp_path, names=names)
    for path in (record, f"{record}.hea", f"{record}.dat", str(record)):
        recording = read_ecg(path)
        assert recording.leads == LEADS and recording.sampling_rate == 500
        rows = recording.signal[:, 0].round().astype(int)
        assert [names[row].casefold() for row in rows] == [n.casefold() for n in LEADS]


def test_a_gap_in_a_wfdb_record_is_refused_with_its_lead(tmp_path):
    values = ramp(dtype=np.float64)
    values[6, 5] = np.nan
    assert "lead V1 at sample 5" in refusal(write_wfdb(tmp_path, values=values))


def test_damaged_wfdb_records_are_refused(tmp_path):
    record = write_wfdb(tmp_path)
    data = Path(f"{record}.dat").read_bytes()
    Path(f"{record}.dat").write_bytes(data[: len(data) // 2])
    assert "r.hea" in refusal(record)
    Path(f"{record}.dat").unlink()
    assert "r.hea" in refusal(record)
    Path(f"{record}.hea").write_text("nonsense\n")
    assert "r.hea" in refusal(record)
    assert "no lead" in refusal(write_wfdb(tmp_path, "short", names=LEADS[:8]))


# ---- normalisation


def test_normalisation_equals_the_golden_in_both_dtypes(golden):
    cases = np.load(golden("ecg_normalize") / "cases.npz")
    keys = {key.split("/")[0] for key in cases}
    assert keys
    for key in keys:
        signal, eps, wanted = cases[f"{key}/in"], float(key.rsplit("eps")[-1]), cases[f"{key}/out"]
        bound = 1e-12 if signal.dtype == np.float64 else 1e-6
        compare("ecg_normalize", f"{key}, {signal.dtype}", min_max(signal, eps), wanted, bound)
        compare("ecg_normalize", f"{key}, as the models take it", normalize(signal, eps), wanted, 1e-6)
        assert normalize(signal, eps).dtype == np.float32


def test_a_constant_signal_is_zeros_even_without_eps():
    assert not normalize(np.full((12, 5), 7.0), eps=0).any()


@pytest.mark.parametrize("how", NORMALIZATIONS[:-1])
def test_every_normalisation(how):
    signal = np.random.default_rng(0).normal(3.0, 2.0, (3, 50))
    axis = 1 if how.startswith("lead_") else None
    low, high, mean, deviation = (
        np.asarray(of(signal, axis=axis, keepdims=axis is not None)) for of in (np.min, np.max, np.mean, np.std)
    )
    zscore = how.endswith("zscore")
    wanted = (signal - mean) / (deviation + 0.1) if zscore else (signal - low) / (high - low + 0.1)
    found = normalize(signal, 0.1, how)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not normalize(np.full((2, 5), 7.0), 0, how).any()
    np.testing.assert_array_equal(normalize(signal, 0.1, "none"), signal.astype(np.float32))


# ---- real recordings


@pytest.mark.parametrize(
    "name, rate",
    [
        ("ptbxl/records500/00000/00002_hr", 500),
        ("ptbxl/records100/00000/00002_lr", 100),
        ("cinc2021/JS20000", 500),
        ("cinc2021/E07500.mat", 500),
        ("ludb/1", 500),
        ("ptbdb/s0010_re", 1000),
    ],
)
def test_real_records_of_every_kind_are_read(shared, name, rate):
    recording = read_ecg(shared / "real/ecg" / name)
    assert recording.signal.shape[0] == 12 and recording.sampling_rate == rate
    assert to_segment(recording).shape == (12, 2500)
    if "ludb" not in name:  # its leads do not satisfy Einthoven's law
        one, two, three = recording.signal[:3]
        assert np.abs(two - one - three).max() < 0.01
        assert np.abs(recording.signal[3] + (one + two) / 2).max() < 0.01, "aVR is not in row 3"
        assert np.abs(recording.signal[4] - (one - two / 2)).max() < 0.01, "aVL is not in row 4"


def test_a_record_in_two_forms_is_the_same_to_the_last_bit(shared):
    for record in ("00002", "00005", "00006", "00010"):
        a = read_ecg(shared / f"real/ecg/ptbxl/records500/00000/{record}_hr")
        b = read_ecg(shared / f"real/ecg/ptbxl_as_cinc2021/HR{record}")
        np.testing.assert_array_equal(a.signal, b.signal)
