"""The reader of pickles: it gives what numpy and the reference wrote, and nothing that a file says is ever done."""

import io
import pickle
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.ecg.npy import read_npy
from elm_jax.ecg.pickled import read_pickle
from elm_jax.ecg.recording import read_ecg
from elm_jax.errors import UserError

PROTOCOLS = range(2, 6)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
ARRAYS = st.tuples(st.sampled_from(["<f4", ">f8", "<i2", "u1", "?", "<f2", ">i8"]), SHAPES, st.booleans()).map(
    lambda said: np.ones(said[1], said[0], order="F" if said[2] else "C")
)
ATOMS = st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text(max_size=300)
VALUES = st.recursive(
    ATOMS | st.binary(max_size=300) | ARRAYS | st.sampled_from([np.float32(1.5), np.int64(-3), np.bool_(True)]),
    lambda inner: st.lists(inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text(max_size=5) | st.integers(-(2**31), 2**31), inner, max_size=4),
    max_leaves=12,
)


def same(ours, theirs):
    if isinstance(theirs, np.ndarray):
        assert isinstance(ours, np.ndarray) and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours == theirs and type(ours) is type(theirs.item() if isinstance(theirs, np.generic) else theirs)


@given(VALUES, st.sampled_from(PROTOCOLS))
@settings(max_examples=300)
def test_plain_values_and_arrays_come_back_as_they_were(value, protocol):
    empty = protocol == 2 and b"bytes" in pickle.dumps(value, 2)  # protocol 2 has no way to write no bytes but a call
    if not empty:
        same(read_pickle(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_texts_and_of_objects_are_lists_of_what_they_hold(protocol):
    named = {"leads": np.array(["I", "aVR"]), "more": np.array(["a", 1, None], dtype=object), "one": np.array("x")}
    found = read_pickle(pickle.dumps(named, protocol))
    assert found == {"leads": ["I", "aVR"], "more": ["a", 1, None], "one": "x"}


def test_the_same_value_twice_is_read_twice():
    leads, signal = ["I", "II"], np.ones((2, 3))
    found = read_pickle(pickle.dumps({"a": leads, "b": leads, "c": signal, "d": signal}))
    assert found["a"] == found["b"] == leads and np.array_equal(found["d"], signal)


# ---- hostile files

OBJECTS = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02O8\x89\x88\x87R"  # numpy's dtype of objects, by protocol 4
STATE = b"(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK%ctb"  # its state, with flags of one's own
REBUILD = b"\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93\x8c\x05numpy\x8c\x07ndarray\x93K\x00\x85C\x01b\x87R"
NUMBERS = (OBJECTS + STATE % b"\0").replace(b"O8", b"f8").replace(b"|", b"<")

EIGHT = b"C\x08AAAAAAAA"


def array_of(shape, dtype, content):
    return REBUILD + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def doubled(times):
    return b"]\x94" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(times))


HOSTILE = {
    "objects whose flags say they are numbers": array_of(b"K\x01\x85", OBJECTS + STATE % b"\0", EIGHT),
    "objects from bytes": array_of(b"K\x01\x85", OBJECTS + STATE % b"?", EIGHT),
    "a scalar of objects": b"\x8c\x16numpy._core.multiarray\x8c\x06scalar\x93"
    + (OBJECTS + STATE % b"\0" + b"C\x08\x41AAAAAAA\x86R"),
    "state set on a type": b"\x8c\x05numpy\x8c\x07ndarray\x93}\x8c\x01aK\x01sb",
    "state set twice": OBJECTS + STATE % b"?" + STATE % b"\0",
    "state set on a list": b"]}b",
    "a dtype as a value": OBJECTS + STATE % b"?",
    "a name as a value": b"\x8c\x05numpy\x8c\x07ndarray\x93",
    "a dtype with fields": array_of(b"K\x01\x85", OBJECTS + b"(K\x03\x8c\x01|N\x8c\x01a\x85}K\x08K\x08K\x00tb", EIGHT),
    "a call of a call": OBJECTS + b")R",
    "a call of a list": b"])R",
    "arguments that are no tuple": b"\x8c\x05numpy\x8c\x05dtype\x93]R",
    "a subclass of arrays": REBUILD.replace(b"\x07ndarray", b"\x08recarray"),
    "a global": b"cbuiltins\neval\n",
    "a global without an end": b"cbuiltins",
    "a name of no text": b"]]\x93",
    "a name of a whole tree": doubled(200) + b"]\x93",
    "an instance": b"(S'1/0'\nibuiltins\neval\n",
    "an object by class": b"(\x8c\x05numpy\x8c\x07ndarray\x93o",
    "a new object": b"\x8c\x05numpy\x8c\x07ndarray\x93)\x81",
    "a new object with keywords": b"\x8c\x05numpy\x8c\x07ndarray\x93)}\x92",
    "an extension": b"\x82\x01",
    "an extension of two bytes": b"\x83\x01\x00",
    "an extension of four bytes": b"\x84\x01\x00\x00\x00",
    "a persistent id": b"Pid\n",
    "a persistent id by value": b"K\x01Q",
    "a buffer from outside": b"\x97",
    "a set": b"\x8f",
    "a whole number of 2 GB": b"\x8b\xff\xff\xff\x7f",
    "a whole number of 255 bytes": b"\x8a\xff" + b"\x7f" * 255,
    "bytes of 2 GB": b"B\xff\xff\xff\x7f",
    "bytes of more than there is memory": b"\x8e" + struct.pack("<Q", 2**62),
    "a bytearray of more than there is memory": b"\x96" + struct.pack("<Q", 2**62),
    "a text of 4 GB": b"X\xff\xff\xff\xff",
    "a text that is none": b"\x8c\x01\xff",
    "half a surrogate": b"\x8c\x03\xed\xa0\x80",
    "a reference to nothing": b"h\x07",
    "a reference numbered 4 billion": b"K\x01r\xff\xff\xff\xff",
    "a list in itself": b"]\x94h\x00a",
    "a dictionary in itself": b"}\x94K\x00h\x00s",
    "a tuple in itself": b"]\x94h\x00\x85a",
    "references that unfold to a billion": doubled(30),
    "references that unfold to 2**200": doubled(200),
    "200 000 lists in each other": b")" + b"\x85" * 200_000,
    "200 000 lists in each other as a key": b"})" + b"\x85" * 200_000 + b"K\x01s",
    "keys that fall into one place": b"}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 99))
    + b"u",
    "a key that is a list": b"}]K\x01s",
    "an odd number of keys and values": b"}(K\x01u",
    "marks without end": b"(" * 100_000,
    "a mark that is not there": b"]K\x01e",
    "nothing to take": b"\x86",
    "two values": b"K\x01K\x02",
    "an array of other length": array_of(b"K\x02\x85", NUMBERS, EIGHT),
    "an array of a billion axes": array_of(b"(" + b"K\x01" * 100_000 + b"t", NUMBERS, EIGHT),
    "an array of negative size": array_of(b"J\xff\xff\xff\xff\x85", NUMBERS, EIGHT),
    "an array of no bytes and much": array_of(
        b"K\x00" + b"\x8a\x06\xff\xff\xff\xff\xff\x00" * 2 + b"\x87", NUMBERS, b"C\x00"
    ),
    "an array whose size is a list": array_of(b"]\x85", NUMBERS, EIGHT),
    "an array of a dictionary": array_of(b")", NUMBERS, b"}"),
    "an array of a number": array_of(b")", NUMBERS, b"K\x01"),
    "an array without its state": REBUILD,
    "texts of no characters": array_of(
        b"K\x01\x85", NUMBERS.replace(b"f8", b"U2"), b"C\x08\xff\xff\xff\xff\0\0\0\0"
    ),
    "bytes by another codec": b"c_codecs\nencode\n\x8c\x01a\x8c\x06idna\xc3\x86R",
    "text made bytes again and again": b"](X\x00\x10\x00\x00"
    + (b"a" * 4096 + b"\x94" + b"c_codecs\nencode\nh\x00\x8c\x06latin1\x86R" * 500 + b"e"),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused_in_words(tmp_path, body):
    for around in (b"\x80\x04%s.", b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"%s."):
        with pytest.raises(ValueError) as refused:
            read_pickle(around % body)
        assert len(str(refused.value)) < 500
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + b"\x80\x04}\x8c\x03ecg" + body + b"s.")
    with pytest.raises(UserError):
        read_ecg(tmp_path / "a.npy")


def test_a_pickle_changes_nothing_that_numpy_knows_of_its_dtypes():
    before = np.dtype("O").flags, np.dtype("f8").str
    for name in ("O8", "f8"):
        body = OBJECTS.replace(b"O8", name.encode()) + STATE % b"\0"
        with pytest.raises(ValueError):
            read_pickle(b"\x80\x04" + body + b".")
    assert (np.dtype("O").flags, np.dtype("f8").str) == before


def test_reading_a_pickle_imports_nothing():
    sys.modules.pop("this", None)
    with pytest.raises(ValueError):
        read_pickle(b"\x80\x04cthis\ns\n.")
    assert "this" not in sys.modules


def test_whatever_is_cut_off_or_put_behind_is_refused():
    whole = pickle.dumps(np.array({"ecg": np.ones((2, 3)), "leads": ["I", "II"]}, dtype=object), 4)
    for cut in range(len(whole)):
        with pytest.raises(ValueError):
            read_pickle(whole[:cut])
    with pytest.raises(ValueError):
        read_pickle(whole + b"x")


# ---- headers of .npy files


DTYPES = ("<f1", "<i16", "<u3", "<c8", "<f", "f4_", "|V8", "<M8[s]", "|b1", "<U3", "<", "O8", "<f99999")


@pytest.mark.parametrize("descr", DTYPES)
def test_a_dtype_that_is_no_real_number_is_refused(tmp_path, descr):
    (tmp_path / "a.npy").write_bytes(npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (2, 3), }}"))
    with pytest.raises(UserError, match=r"a\.npy"):
        read_npy(tmp_path / "a.npy")


SIZES = ["9" * 5000, ", ".join(["1"] * 100), "0, " + ", ".join(["9" * 15] * 5), "1 2", "-1,", ",", "1e3", "٣,", "0, 5"]


@pytest.mark.parametrize("sizes", SIZES, ids=[sizes[:12] for sizes in SIZES])
def test_a_shape_that_no_recording_has_is_refused(tmp_path, sizes):
    (tmp_path / "a.npy").write_bytes(npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}), }}", b""))
    with pytest.raises(UserError, match=r"a\.npy"):
        read_ecg(tmp_path / "a.npy")


def npy(header, content=bytes(24)):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + content


@pytest.mark.parametrize("length", [0, 1, 2**32 - 1])
def test_a_header_of_a_length_that_is_not_there_is_refused(tmp_path, length):
    whole = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }")
    (tmp_path / "a.npy").write_bytes(whole[:8] + struct.pack("<I", length) + whole[12:])
    with pytest.raises(UserError, match="header"):
        read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("path", ["a\0.npy", "half\ud800.npy", "x" * 5000 + ".npy"], ids=["NUL", "surrogate", "long"])
def test_a_path_that_no_file_can_have_is_refused(path):
    with pytest.raises(UserError, match="path"):
        read_npy(path)


def test_only_regular_files_are_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "zero.npy").symlink_to("/dev/zero")
    for name in ("pipe.npy", "zero.npy"):
        with pytest.raises(UserError, match="no regular file"):
            read_npy(tmp_path / name)
