"""The ECG-Byte tokenizer: the reference's ids exactly, files that cannot do harm, and lossless spelling."""

import hashlib
import json
import os
import pickle
import sys
import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity_log import compare, record

from elm_jax.errors import UserError
from elm_jax.symbols.coder import EcgByte

MERGES = [b"ab", b"abc", b"zz", b"zzzz", b"bcd"]


@pytest.fixture(scope="module")
def reference(shared):
    return EcgByte.load(shared / "real" / "ecg_byte" / "ecg_byte_tokenizer_10000.pkl")


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden("ecg_byte_encode") / "cases.json").read_text())


@pytest.fixture(scope="module")
def signals(golden):
    with np.load(golden("ecg_byte_encode") / "signals.npz") as file:
        return dict(file)


# --- against the reference ---------------------------------------------------------------------------------


def test_every_golden_signal_gives_the_reference_symbols_and_ids(reference, cases, signals):
    checked = 0
    for case in (case for case in cases if case["signal"]):
        signal = signals[case["signal"]]
        assert reference.to_symbols(signal) == case["symbols"].encode(), case["signal"]
        ids = reference.encode(signal)
        assert ids.dtype == np.int32
        record("ecg_byte_encode", f"ids of {case['signal']}", _differences(ids.tolist(), case["ids"]), 0)
        checked += 1
    assert checked == len(signals)


def test_golden_symbol_strings_give_the_reference_ids_and_spell_them_back(reference, cases):
    different = 0
    for case in cases:
        symbols = case["symbols"].encode()
        different += _differences(reference.encode_symbols(symbols).tolist(), case["ids"])
        assert reference.spell(case["ids"]) == symbols
    record("ecg_byte_encode", f"ids of {len(cases)} symbol strings", different, 0)


def test_levels_and_their_values_are_those_of_the_golden(reference, golden):
    with np.load(golden("ecg_byte_encode") / "quantize.npz") as file:
        # With 0 and 1 beside them, and no epsilon, amplitudes are normalised to themselves.
        unit = np.concatenate([[0.0, 1.0], np.clip(file["x"], 0.0, 1.0)])
        levels = np.frombuffer(reference.to_symbols(unit[None], eps=0.0), np.uint8)[2:] - 97
        record("ecg_byte_encode", "levels", np.count_nonzero(levels != file["q"]), 0)
        letters = np.arange(97, 97 + 26)
        faithful = reference.decode(letters, (1, 26), 0.0, 1.0, compat=("dequantize_by_25",))
        compare("ecg_byte_encode", "values of levels (dequantize_by_25)", faithful[0], file["dequant"], 1e-15)


def test_facts_of_the_shipped_pickle_survive_loading(reference, golden):
    facts = json.loads((golden("ecg_byte_encode") / "tokenizer_facts.json").read_text())
    assert len(reference) == facts["len_vocab"] and len(reference.merges) == facts["len_merges"]
    assert list(reference.order[:10]) == facts["vocab_key_order_first"]
    assert max(map(len, reference.merges)) == facts["max_token_len"]
    assert [[list(merge), 256 + i] for i, merge in enumerate(reference.merges[:3])] == facts["merge_first3"]
    assert reference.settings["source_sha256"] == facts["sha256"]


def test_converting_the_pickle_to_json_keeps_everything(reference, tmp_path, signals):
    reference.save(tmp_path / "tok.json")
    again = EcgByte.load(tmp_path / "tok.json")
    assert _state(again) == _state(reference)
    signal = signals["ptb_float64"]
    np.testing.assert_array_equal(again.encode(signal), reference.encode(signal))


# --- encode ------------------------------------------------------------------------------------------------


def test_a_batch_is_a_list_of_its_recordings():
    tok = EcgByte(MERGES)
    batch = np.random.default_rng(0).normal(size=(3, 2, 50))
    encoded = tok.encode(batch)
    assert isinstance(encoded, list) and len(encoded) == 3
    for ids, signal in zip(encoded, batch, strict=True):
        np.testing.assert_array_equal(ids, tok.encode(signal))


def test_scale_and_offset_do_not_change_the_ids():
    signal = np.random.default_rng(1).normal(size=(2, 500))
    tok = EcgByte(MERGES)
    np.testing.assert_array_equal(tok.encode(signal), tok.encode(4.0 * signal + 8.0))


def test_leads_are_flattened_one_after_the_other():
    assert EcgByte([]).to_symbols(np.array([[0.0, 0.0], [1.0, 1.0]])) == b"aazz"


def test_a_flat_recording_is_all_lowest_letters():
    assert EcgByte([]).to_symbols(np.full((2, 3), 7.0)) == b"aaaaaa"


@pytest.mark.parametrize(
    ("signal", "method", "what"),
    [
        (np.zeros((1, 4)), "merge", "did you mean 'merges'"),
        (np.zeros(4), "longest", "shape (4,)"),
        (np.zeros((12, 0)), "longest", "shape (12, 0)"),
        (np.array([[0.0, np.nan, np.inf]]), "longest", "2 samples that are not finite"),
    ],
)
def test_what_cannot_be_encoded_is_refused_by_name(signal, method, what):
    with pytest.raises(UserError) as error:
        EcgByte(MERGES).encode(signal, method)
    assert what in str(error.value)


def test_of_two_merges_that_spell_the_same_the_later_id_wins():
    assert EcgByte([b"ab", b"ab"]).encode_symbols(b"abab").tolist() == [257, 257]


def test_a_missing_extension_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "elm_jax._bpe", None)
    with pytest.raises(UserError, match=r"elm_jax\._bpe.*rust_bpe.*pip install"):
        EcgByte(MERGES).encode_symbols(b"ab")


def test_threads_share_one_encoder():
    tok, text = EcgByte(MERGES), b"abczzzzzbcd" * 2000
    expected, got = tok.encode_symbols(text).tolist(), []

    def work():
        got.append(tok.encode_symbols(text).tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4


def test_a_tokenizer_crosses_to_another_process_after_use():
    tok = EcgByte(MERGES, settings={"a": 1})
    tok.encode_symbols(b"abc")
    again = pickle.loads(pickle.dumps(tok))
    assert _state(again) == _state(tok) and again.encode_symbols(b"abcd").tolist() == [257, 100]


# --- decode ------------------------------------------------------------------------------------------------

symbol_strings = st.text("abcdez", max_size=60).map(str.encode) | st.binary(max_size=40)
merge_lists = st.lists(st.text("abcdez", min_size=1, max_size=6).map(str.encode), max_size=20)


@given(merge_lists, symbol_strings)
def test_spelling_the_ids_gives_back_the_symbols(merges, symbols):
    tok = EcgByte(merges)
    assert tok.spell(tok.encode_symbols(symbols)) == symbols


@given(merge_lists, symbol_strings)
def test_ids_are_the_greedy_longest_match(merges, symbols):
    entries = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    expected, start = [], 0
    while start < len(symbols):
        length = max(n for n in range(1, 7) if symbols[start : start + n] in entries)
        length = len(symbols[start : start + length])
        expected.append(entries[symbols[start : start + length]])
        start += length
    assert EcgByte(merges).encode_symbols(symbols).tolist() == expected


def test_decoding_is_within_half_a_level_and_unbiased():
    signal = np.random.default_rng(2).uniform(-1.5, 2.5, size=(12, 2500))
    low, high = signal.min(), signal.max()
    tok = EcgByte(MERGES)
    back = tok.decode(tok.encode(signal), signal.shape, low, high)
    level = (high - low) / 26
    assert back.shape == signal.shape and back.dtype == np.float64
    assert np.abs(back - signal).max() <= 0.5 * level + 1e-5
    assert abs((back - signal).mean()) < 0.01 * level


@pytest.mark.parametrize("compat", ["dequantize_by_25", "elm-2026-04", "elm-2026-08"])
def test_the_reference_levels_are_there_by_name_and_by_preset(compat):
    ids = np.frombuffer(b"anz", np.uint8)
    faithful = EcgByte([]).decode(ids, (1, 3), -1.0, 1.0, compat=(compat,))
    np.testing.assert_allclose(faithful, [[-1.0, -1.0 + 2 * 13 / 25, 1.0]], rtol=0, atol=1e-15)
    ours = EcgByte([]).decode(ids, (1, 3), -1.0, 1.0)
    np.testing.assert_allclose(ours, [[-1 + 1 / 26, -1 + 27 / 26, 1 - 1 / 26]], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("ids", "shape", "compat", "what"),
    [
        ([97], (1, 2), (), "spell 1 samples"),
        ([97, 300], (1, 2), (), "id 300"),
        ([-1, 97], (1, 2), (), "id -1"),
        ([97, 65], (1, 2), (), "byte 65"),
        ([97, 98], (1, 2), ("dequantise_by_25",), "did you mean 'dequantize_by_25'"),
    ],
)
def test_ids_that_are_no_signal_are_refused(ids, shape, compat, what):
    with pytest.raises(UserError) as error:
        EcgByte(MERGES).decode(np.array(ids), shape, 0.0, 1.0, compat)
    assert what in str(error.value)


# --- files -------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=8), st.randoms(use_true_random=False))
def test_our_file_gives_back_the_tokenizer(tmp_path_factory, merges, random):
    order = list(range(256 + len(merges)))
    random.shuffle(order)
    path = tmp_path_factory.mktemp("tok") / "tok.json"
    tok = EcgByte(merges, order=order, settings={"num_merges": len(merges)})
    tok.save(path)
    assert _state(EcgByte.load(path)) == _state(tok)


def test_saving_is_reproducible_to_the_byte(tmp_path):
    for name in ("a.json", "b.json"):
        EcgByte(MERGES, settings={"seed": 0}).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


class _Runs:
    """Unpickling this calls os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", [lambda x: x, lambda x: ({0: x}, []), lambda x: ({}, [([1], x)])])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, protocol, place):
    trap = tmp_path / "ran"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(place(_Runs(trap)), protocol))
    says = "mkdir" if protocol >= 2 else "a pickle that is not a tokenizer"  # the older ones are not read at all
    with pytest.raises(UserError, match=says):
        EcgByte.load(tmp_path / "evil.pkl")
    assert not trap.exists(), "loading the file ran its code"


@pytest.mark.parametrize(
    "raw",
    [
        b"cbuiltins\neval\n(S'1/0'\ntR.",  # a global
        b"(S'1/0'\nibuiltins\neval\n.",  # an instance
        b"\x80\x02\x82\x01.",  # an extension code
        b"Pid\n.",  # a persistent id
        b"\x80\x04]}b.",  # state set on a list
    ],
)
def test_no_way_of_naming_an_object_in_a_pickle_passes(tmp_path, raw):
    (tmp_path / "evil.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="a pickle that is not a tokenizer"):
        EcgByte.load(tmp_path / "evil.pkl")


VOCABULARY = {i: "" for i in range(257)}


@pytest.mark.parametrize(
    "contents",
    [
        None,
        ({}, []),
        ({i: "" for i in range(256)}, [], []),
        (VOCABULARY, [([97, 300], 256)]),
        (VOCABULARY, [([97, 98], 257)]),
        (VOCABULARY, [([], 256)]),
        (VOCABULARY, [97]),
        (VOCABULARY, [(10**13, 256)]),
        (VOCABULARY, [([97, 98], 256.0)]),
        ({**VOCABULARY, "256": ""}, [([97, 98], 256)]),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, contents):
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match="expected an ECG-Byte tokenizer"):
        EcgByte.load(tmp_path / "odd.pkl")


def test_a_pickle_in_the_reference_form_is_read(tmp_path):
    order = [256, *range(256)]
    contents = ({i: str(i) for i in order}, [([97, 98], 256)])
    (tmp_path / "tok.pkl").write_bytes(pickle.dumps(contents))
    tok = EcgByte.load(tmp_path / "tok.pkl")
    assert tok.merges == (b"ab",) and tok.order == tuple(order)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"ab"', '"ac"'),
        lambda text: text.replace('"sha256"', '"sha512"'),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
    ],
)
def test_a_damaged_json_file_is_refused(tmp_path, damage):
    path = tmp_path / "tok.json"
    EcgByte(MERGES).save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="tok.json"):
        EcgByte.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"symbols": 26},
        {"symbols": "aab"},
        {"symbols": "aβ"},
        {"merges": "ab"},
        {"merges": [5]},
        {"merges": ["ab", ""]},
        {"merges": ["β"]},
        {"settings": None},
        {"order": "sorted"},
        {"order": [0, 1]},
        {"order": [*range(256), "256"]},
    ],
)
def test_a_json_file_of_the_wrong_structure_is_refused_even_with_a_right_checksum(tmp_path, change):
    contents = {"version": 1, "symbols": "ab", "merges": ["ab"], "order": None, "settings": {}} | change
    checksum = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    (tmp_path / "tok.json").write_text(json.dumps({**contents, "sha256": checksum}))
    with pytest.raises(UserError, match="tok.json"):
        EcgByte.load(tmp_path / "tok.json")


@pytest.mark.parametrize("name", ["tok.bin", "tok", "absent.json", "absent.pkl"])
def test_other_and_absent_files_are_refused(tmp_path, name):
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=name):
        EcgByte.load(tmp_path / name)


def test_a_device_is_no_tokenizer(tmp_path):
    (tmp_path / "t.json").symlink_to(os.devnull)
    with pytest.raises(UserError, match="no regular file"):
        EcgByte.load(tmp_path / "t.json")


def test_deep_json_and_settings_with_numbers_for_keys(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="deep.json"):
        EcgByte.load(tmp_path / "deep.json")
    EcgByte(MERGES, settings={"of": {2: "a", 10: "b"}}).save(tmp_path / "new" / "t.json")
    assert EcgByte.load(tmp_path / "new" / "t.json").settings == {"of": {"2": "a", "10": "b"}}


def test_what_is_no_id_no_thread_and_no_aligned_array():
    tok = EcgByte(MERGES)
    for ids in (np.array([97.9]), np.array([[97]])):
        with pytest.raises(UserError, match="ids of shape"):
            tok.spell(ids)
    with pytest.raises(UserError, match="threads = -1"):
        tok.encode(np.zeros((2, 1, 3)), threads=-1)
    with pytest.raises(UserError, match="threads = 0"):
        EcgByte.train([b"ab"], 1, threads=0)
    shifted = np.frombuffer(b"\0" + np.arange(6.0).tobytes(), np.float64, offset=1).reshape(2, 3)
    np.testing.assert_array_equal(tok.encode(shifted), tok.encode(np.arange(6.0).reshape(2, 3)))


def test_more_merges_than_there_can_be_are_asked_for_without_harm():
    assert EcgByte.train([b"abab"], 2**62).merges == (b"ab", b"abab")


def test_the_fingerprint_tells_merges_apart():
    assert EcgByte([b"a\0b"]).fingerprint != EcgByte([b"a", b"b"]).fingerprint


def test_saving_under_a_name_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(UserError, match="json"):
        EcgByte(MERGES).save(tmp_path / "tok.bin")
    with pytest.raises(UserError, match="symbols 'ab'"):
        EcgByte([], symbols="ab").save(tmp_path / "tok.pkl")
    assert not list(tmp_path.iterdir())


def _differences(found, expected):
    return abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected, strict=False))


def _state(tok):
    return tok.merges, tok.symbols, tok.order, tok.settings


# ---- training


def merged_by_definition(records: list[bytes], num_merges: int) -> tuple[list[bytes], list[int]]:
    """What each merge spells and the count of its pair: all windows counted anew for every merge."""
    spelled = [bytes([i]) for i in range(256)]
    corpus, counts = [list(r) for r in records], []
    for _ in range(num_merges):
        found = Counter(pair for ids in corpus for pair in pairwise(ids))
        if not found:
            break
        pair = min(found, key=lambda p: (-found[p], p))
        counts.append(found[pair])
        for ids in corpus:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == pair:
                    ids[at : at + 2] = [len(spelled)]
                at += 1
        spelled.append(spelled[pair[0]] + spelled[pair[1]])
    return spelled[256:], counts


@given(st.lists(st.binary(max_size=40).map(lambda b: bytes(97 + x % 3 for x in b)), max_size=4), st.integers(0, 12))
def test_training_is_that_of_the_definition(records: list[bytes], num_merges: int) -> None:
    assert list(EcgByte.train(records, num_merges).merges) == merged_by_definition(records, num_merges)[0]
    whole = [b"".join(records)]
    assert list(EcgByte.train(records, num_merges, across_records=True).merges) == (
        merged_by_definition(whole, num_merges)[0]
    )


def test_training_equals_the_golden(golden) -> None:
    from elm_jax import _bpe

    wrong = 0
    cases = json.loads((golden("ecg_byte_train") / "cases.json").read_text())
    for case in cases:
        text = case["text"].encode()
        spelled, counts, symbols, tokens, _ = _bpe.train([text], case["num_merges"], True, 1, None)
        wrong += [[list(s), 256 + i] for i, s in enumerate(spelled)] != case["merges"]
        wrong += counts != [step["count"] for step in case["per_merge"]]
        wrong += EcgByte(spelled).encode_symbols(text, "merges").tolist() != case["ids"]
        wrong += (symbols, tokens) != (len(text), len(case["ids"]))
        wrong += list(EcgByte.train([text], case["num_merges"]).merges) != [bytes(m) for m, _ in case["merges"]]
    record("ecg_byte_train", f"differing merges, counts and corpora of {len(cases)}", wrong, 0)


def test_a_trained_tokenizer_encodes_and_survives_its_file(tmp_path) -> None:
    made = EcgByte.train([b"abcabcabd", b"abd"], 3)
    assert made.settings == {"records": 2, "across_records": False, "symbols": 12, "tokens": 5}
    made.save(tmp_path / "t.json")
    again = EcgByte.load(tmp_path / "t.json")
    assert again.merges == made.merges and again.spell(again.encode_symbols(b"abdabc")) == b"abdabc"
    with pytest.raises(UserError, match="num_merges = -1"):
        EcgByte.train([b"ab"], -1)
