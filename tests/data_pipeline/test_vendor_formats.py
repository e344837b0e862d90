"""What ECG carts and archives export: HL7 aECG, MUSE, Philips, SCP-ECG, DICOM."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where `scripts` lies

from scripts.fuzz.writers import (  # noqa: E402
    EIGHT,
    EVEN,
    LIMBS,
    STEPS,
    aecg,
    dicom,
    differences,
    huffman,
    muse,
    philips,
    residuals,
    scp,
    xli,
)

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_ecg(path, **kwargs)
    return str(caught.value)


def check(path: Path, step: float, rate: float = 500, derived: Sequence[str] = ()) -> None:
    recording = read_ecg(path)
    assert (recording.sampling_rate, recording.derived) == (rate, tuple(derived))
    np.testing.assert_allclose(recording.signal, STEPS * step, rtol=1e-6, atol=1e-7)


# ---- HL7 aECG


def text(folder: Path, content: str, encoding: str = "utf-8") -> Path:
    (folder / "a.xml").write_bytes(content.encode(encoding))
    return folder / "a.xml"


def test_hl7_aecg(tmp_path: Path) -> None:
    mdc = [f"MDC_ECG_LEAD_{name.upper()}" for name in LEADS]
    check(text(tmp_path, aecg(mdc)), 4.88e-3)
    assert read_ecg(tmp_path / "a.xml").report == "Sinus rhythm"
    check(text(tmp_path, aecg([*mdc[:2], *mdc[6:]], EVEN, scale=2.5)), 2.5e-3, derived=LIMBS)
    check(text(tmp_path, aecg(mdc, STEPS + 7, origin=-7 * 5, scale=5)), 5e-3)
    check(text(tmp_path, aecg(mdc, increment="4E-3", unit="mV", scale=0.001)), 1e-3, rate=250)


HOSTILE = {
    "an entity": '<!DOCTYPE a [<!ENTITY x "y">]>',
    "lol": '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>',
    "an outer entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    "a parameter": '<!DOCTYPE a [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]>',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_definitions_in_xml_are_refused(tmp_path: Path, what: str) -> None:
    assert "definitions of its own" in refusal(text(tmp_path, aecg(before=HOSTILE[what])))


def test_an_outer_dtd_is_never_read_and_its_entities_are_refused(tmp_path: Path) -> None:
    named = '<!DOCTYPE AnnotatedECG SYSTEM "nowhere.dtd">'
    check(text(tmp_path, aecg(before=named)), 4.88e-3)
    assert "definitions of its own" in refusal(text(tmp_path, aecg(before=named, more="<x>&other;</x>")))


@pytest.mark.parametrize(
    "change, said",
    [
        (("uV", "furlong"), "unit 'furlong'"),
        (('"4.88"', '"0"'), "gain 0"),
        (("TIME_ABSOLUTE", "X"), "no sampling rate|digits|number"),
        (("0.002", "nan"), "number"),
        (("0.002", "0"), "increment"),
        (("</digits>", "x</digits>"), "no numbers"),
        (("</digits>", " 5</digits>", 1), "leads of"),
        (("AnnotatedECG", "Other"), "begins with Other"),
        (("</series>", ""), "no XML"),
        (("<sequenceSet>", "<x>"), "no XML"),
        (("sequenceSet", "sets"), "0 sets"),
        (("xml version", "xml versio"), "no XML"),
    ],
)
def test_hl7_aecg_that_is_none_is_refused(tmp_path: Path, change: tuple[Any, ...], said: str) -> None:
    assert re.search(said, refusal(text(tmp_path, aecg().replace(*change))))


def test_xml_that_is_too_deep_or_of_no_encoding_is_refused(tmp_path: Path) -> None:
    assert "nested too deeply" in refusal(text(tmp_path, "<a>" * 500))
    assert "encoding klingon" in refusal(text(tmp_path, '<?xml version="1.0" encoding="klingon"?><a/>'))
    assert "no XML" in refusal(text(tmp_path, ""))


# ---- MUSE


def test_muse_has_eight_leads_and_the_others_follow(tmp_path: Path) -> None:
    check(text(tmp_path, muse()), 4.88e-3, derived=LIMBS)
    assert read_ecg(tmp_path / "a.xml").report == "Sinus rhythm; Normal"
    check(text(tmp_path, muse(LEADS, STEPS)), 4.88e-3)
    check(text(tmp_path, muse(exponent="-1")), 4.88e-3, rate=50, derived=LIMBS)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "Median"}, "Median, Median"),
        ({"gain": ""}, "number"),
        ({"gain": "0"}, "gain 0"),
        ({"unit": "BITS"}, "unit 'BITS'"),
        ({"count": 3}, "300 bytes of lead I for 3 samples"),
        ({"size": "4"}, "samples of 4 bytes"),
        ({"exponent": "9"}, "sampling rate"),
        ({"names": ("I", "III", *LEADS[6:])}, "no lead II"),
    ],
)
def test_muse_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(text(tmp_path, muse(**change)))


def test_muse_with_samples_that_are_no_base64_is_refused(tmp_path: Path) -> None:
    assert "no base64" in refusal(text(tmp_path, muse().replace("<WaveFormData>", "<WaveFormData>*")))


# ---- Philips


def test_philips_packed_and_plain(tmp_path: Path) -> None:
    check(text(tmp_path, philips(xli(residuals(STEPS))), "utf-16"), 5e-3)
    assert read_ecg(tmp_path / "a.xml").report == "SR normal"
    check(text(tmp_path, philips(STEPS.astype("<i2").tobytes(), ""), "utf-16"), 5e-3)
    check(text(tmp_path, philips(xli(EVEN), leads=EIGHT), "utf-16"), 5e-3, derived=LIMBS)


@few
@given(st.integers(0, 2**32), st.integers(3, 400), st.sampled_from([1, 30, 5000]))
def test_whatever_xli_has_packed_is_unpacked(seed: int, samples: int, size: int) -> None:
    from elm_jax.ecg.formats.xli import unpack_xli

    rows = np.random.default_rng(seed).integers(-size, size + 1, (2, samples))
    np.testing.assert_array_equal(unpack_xli(Path("a"), xli(rows), 2, samples), rows)


def test_philips_that_is_packed_otherwise_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    data = xli(residuals(STEPS))
    assert "packed by LZX; expected base64, plain or packed by XLI" in refusal(
        text(tmp_path, philips(data, "LZX"), "utf-16")
    )
    assert "packed bytes of lead 12" in refusal(text(tmp_path, philips(data[:-9]), "utf-16"))
    assert "unpacked bytes" in refusal(text(tmp_path, philips(data, milliseconds=900), "utf-16"))
    assert "bytes for 12 leads" in refusal(text(tmp_path, philips(bytes(9), ""), "utf-16"))
    assert "packed limb leads without" in refusal(text(tmp_path, philips(data, leads=LEADS[1:]), "utf-16"))
    assert "number" in refusal(text(tmp_path, philips(data, step=""), "utf-16"))
    assert "no names of leads" in refusal(text(tmp_path, philips(data, leads=()), "utf-16"))
    for at in range(0, len(data), 97):
        spoilt = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            read_ecg(text(tmp_path, philips(spoilt), "utf-16"))
        except UserError as error:
            assert "a.xml" in str(error)


# ---- SCP-ECG


def binary(folder: Path, data: bytes, name: str = "a.scp") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("order", [0, 1, 2])
def test_scp_ecg_plain_and_packed(tmp_path: Path, order: int) -> None:
    check(binary(tmp_path, scp(order=order)), 5e-3, derived=LIMBS)
    assert read_ecg(tmp_path / "a.scp").report == "Sinus rhythm"
    check(binary(tmp_path, scp(order=order, tables=None)), 5e-3, derived=LIMBS)
    check(binary(tmp_path, scp(LEADS, STEPS, order, interval=1000, step=1000)), 1e-3, rate=1000)
    check(binary(tmp_path, scp(("Resp", *LEADS), np.concatenate([STEPS[:1], STEPS]), order, checksum=False)), 5e-3)


def test_scp_ecg_with_a_table_of_its_own_and_a_negated_lead(tmp_path: Path) -> None:
    found = sorted({value for row in EVEN for value in differences(row, 1).tolist()})
    table = {value: f"{place:010b}" for place, value in enumerate(found)}
    codes = b"".join(struct.pack("<BBBhI", 10, 10, 1, value, int(code[::-1], 2)) for value, code in table.items())
    tables = struct.pack("<HH", 1, len(found)) + codes
    check(binary(tmp_path, scp(order=1, tables=tables, table=table)), 5e-3, derived=LIMBS)
    turned = STEPS * np.where(np.array(LEADS) == "aVR", -1, 1)[:, None]
    check(binary(tmp_path, scp([{"aVR": "-aVR"}.get(lead, lead) for lead in LEADS], turned)), 5e-3)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"flags": 1}, "average beats"),
        ({"bimodal": 1}, "bimodal"),
        ({"interval": 0}, "0 µs"),
        ({"step": 0}, "0 nV"),
        ({"end": 400}, "samples of I"),
        ({"end": 4_000_000_000}, "8 leads of 4000000000 samples"),
        ({"tables": struct.pack("<HH", 40, 3)}, "40 Huffman tables"),
        ({"tables": struct.pack("<HHBBBhI", 1, 1, 3, 3, 0, 1, 0)}, "tables that change"),
        ({"tables": struct.pack("<HH", 1, 2) + struct.pack("<BBBhI", 2, 2, 1, 7, 1) * 2}, "one begins another"),
        ({"names": EIGHT[::-1][:7] + ("V9",)}, "no lead"),
    ],
)
def test_scp_ecg_of_a_kind_that_is_not_read_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert re.search(said, refusal(binary(tmp_path, scp(**change))))


def test_as_many_scp_samples_are_unpacked_as_there_are_whatever_stands_behind_them() -> None:
    from elm_jax.ecg.formats.scp import _codes, _unpacked

    codes = _codes(Path("a"), struct.pack("<H", 19999))
    values = np.array([0, 3, -8, 8, -1, 100, -128, 3000, -32768])
    packed = huffman(values) + b"\xff" * 1000
    np.testing.assert_array_equal(_unpacked(packed, len(values), codes), values)
    assert len(_unpacked(huffman(values)[:-1], len(values) + 9, codes)) == len(values) - 1


@few
@given(st.data())
def test_scp_ecg_that_is_damaged_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(scp(checksum=False))
    assert "checksum" in refusal(binary(tmp_path, b"\1\2" + bytes(whole[2:])))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(2, 300))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole), 5, 21, 40, 200]))
    spoilt = whole[:2] + struct.pack("<I", cut) + whole[6:cut]
    try:
        assert read_ecg(binary(tmp_path, spoilt)).signal.shape[0] == 12
    except UserError as error:
        assert "a.scp" in str(error)


# ---- DICOM


@pytest.mark.parametrize("scheme", ["MDC", "SCPECG", "99X"])
def test_dicom(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("pydicom")
    check(dicom(tmp_path / "a.dcm", scheme=scheme), 5e-3)
    check(dicom(tmp_path / "a.dcm", EIGHT, EVEN, scheme), 5e-3, derived=LIMBS)
    check(dicom(tmp_path / "a.dcm", kind="SL", bits=32, scheme=scheme), 5e-3)
    check(dicom(tmp_path / "a.dcm", steps=STEPS + 30, baseline=-150, scheme=scheme), 5e-3)
    check(dicom(tmp_path / "a.DCM", syntax="1.2.840.10008.1.2.2", scheme=scheme), 5e-3)


def test_dicom_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    path = tmp_path / "a.dcm"
    assert "bytes and 12 definitions" in refusal(dicom(path, samples=1 << 30))
    assert "unit 'g'" in refusal(dicom(path, unit="g"))
    assert "gain 0" in refusal(dicom(path, sensitivity="0"))
    assert "whole numbers without a unit" in refusal(dicom(path, sensitivity=None, baseline=0.5))
    assert "16 bits, AB" in refusal(dicom(path, kind="AB"))
    assert "one group of waveforms" in refusal(dicom(path, label="MEDIAN"))
    data = dicom(path).read_bytes()
    assert "a.dcm" in refusal(binary(tmp_path, data[:400], "a.dcm"))
    assert "a.dcm" in refusal(binary(tmp_path, b"nothing", "a.dcm"))
    assert "deflated" in refusal(dicom(path, syntax="1.2.840.10008.1.2.1.99"))


# ---- HDF5


def test_hdf5_with_named_data_and_attributes(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for place, (name, values) in enumerate([("ecg", STEPS), ("record/signal", STEPS.T), ("tracings", STEPS.T[None])]):
        with h5py.File(tmp_path / f"{place}.h5", "w") as file:
            data = file.create_dataset(name, data=values * 0.005, compression=None if place else "gzip")
            (data if place else file).attrs["sampling_rate"] = 500
            data.attrs["leads"] = list(LEADS)
            file["unit"] = "mV"
        check(tmp_path / f"{place}.h5", 5e-3)


def test_matlab_version_7_3(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["ecg"] = STEPS.T * 5.0
        file["fs"] = [[500.0]]
        file["unit"] = np.frombuffer("uV".encode("utf-16-le"), "<u2")[:, None]
        file["unit"].attrs["MATLAB_class"] = b"char"
        cells = file.create_dataset("leads", (12, 1), h5py.ref_dtype)
        for place, lead in enumerate(LEADS):
            text = file.create_dataset(f"#refs#/{place}", data=np.frombuffer(lead.encode("utf-16-le"), "<u2")[:, None])
            text.attrs["MATLAB_class"] = b"char"
            cells[place] = text.ref
    check(tmp_path / "a.mat", 5e-3)


def test_hdf5_beside_other_things_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("ecg", data=STEPS * 0.005)
        data.attrs.update({"fs": 500, "leads": list(LEADS), "unit": "mV", "note": h5py.Empty("f8")})
        peaks = file.create_dataset("peaks", 2, h5py.vlen_dtype(np.int32))
        peaks[0] = [10, 60]
        group = file.create_group("more")
        file.create_dataset("cells", (1,), h5py.ref_dtype)[0] = group.ref
        file.create_dataset("regions", (1,), h5py.regionref_dtype)[0] = data.regionref[:2]
        file["nothing"] = h5py.Empty("f8")
    check(tmp_path / "a.h5", 5e-3)


def test_hdf5_whose_heaps_lie_in_one_another_is_refused(tmp_path: Path) -> None:
    blocks, heap = 8000, b"GCOL\1\0\0\0"
    data = b"".join(heap + struct.pack("<QQQ", 32 * (blocks - i), 1, 16) for i in range(blocks))
    assert "a damaged heap" in refusal(binary(tmp_path, data, "a.h5"))


def test_hdf5_that_reads_elsewhere_or_becomes_large_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"

    def file(what: Any) -> Path:
        with h5py.File(path, "w") as opened:
            opened.attrs["fs"] = 500
            what(opened)
        return path

    (tmp_path / "secret.bin").write_bytes(bytes(12 * 100 * 8))
    layout = h5py.VirtualLayout((12, 100), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "ecg", (12, 100))
    outside = {
        "link to elsewhere": lambda f: f.__setitem__("ecg", h5py.ExternalLink("other.h5", "/ecg")),
        "stored in other files": lambda f: f.create_dataset(
            "ecg", (12, 100), "f8", external=str(tmp_path / "secret.bin")
        ),
        "ecg, stored in other": lambda f: f.create_virtual_dataset("ecg", layout),
        "packed bytes that become": lambda f: f.create_dataset(
            "ecg", (12, 1 << 24), "f8", chunks=(1, 1 << 20), compression="gzip"
        ),
        "shape (40000, 4096, 12)": lambda f: f.create_dataset("tracings", (40_000, 4096, 12), "f4", chunks=True),
    }
    for said, what in outside.items():
        assert said in refusal(file(what)), said
    assert "a.h5" in refusal(binary(tmp_path, path.read_bytes()[:500], "a.h5"))
    assert "a.h5" in refusal(binary(tmp_path, b"nothing", "a.h5"))


def test_a_file_without_a_known_ending_is_what_it_begins_as(tmp_path: Path) -> None:
    for name, data in (("scp", scp()), ("b.ecg", scp()), ("xml", aecg().encode()), ("1.2.840.3", aecg().encode())):
        check(binary(tmp_path, data, name), 5e-3 if data[:1] != b"<" else 4.88e-3, derived=LIMBS * (data[:1] != b"<"))
    assert "no header other.hea beside it" in refusal(binary(tmp_path, b"something", "other"))


@pytest.mark.parametrize("package, name", [("h5py", "a.h5"), ("pydicom", "a.dcm"), ("h5py", "a.mat")])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path: Path, package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = binary(tmp_path, b"\x89HDF\r\n\x1a\n" + bytes(600), name)
    assert f"pip install {package}" in refusal(path)
