"""What holds for every tokenizer and every input: nothing is lost, nothing depends on threads, batches or dtypes."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elm_jax.errors import UserError
from elm_jax.symbols.coder import METHODS, EcgByte
from elm_jax.symbols.report import encode, token_of_sample

# Few letters make many pairs; any bytes at all make the rest.
texts = st.text("abcz", max_size=80).map(str.encode) | st.binary(max_size=60)
corpora = st.lists(texts, max_size=6)
methods = st.sampled_from(METHODS)
shapes = arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)
samples = st.floats(-1e6, 1e6, width=32)
signals = arrays.arrays(np.float32, shapes, elements=samples)


@pytest.fixture(scope="module")
def coder() -> EcgByte:
    """A tokenizer learnt from a few random walks, so that its merges meet the signals of the tests."""
    rng = np.random.default_rng(0)
    letters = EcgByte([])
    return EcgByte.train([letters.to_symbols(rng.normal(size=(2, 400)).cumsum(1)) for _ in range(8)], 300)


# --- symbols -----------------------------------------------------------------------------------------------


@given(corpora, st.integers(0, 20), texts, methods)
def test_ids_spell_the_symbols_by_both_methods(corpus, num_merges, text, method):
    tok = EcgByte.train(corpus, num_merges)
    ids = tok.encode_symbols(text, method)
    assert ids.dtype == np.int32 and tok.spell(ids) == text
    assert len(ids) <= len(text)


@given(st.lists(st.binary(min_size=1, max_size=6), max_size=12), texts)
def test_merges_of_any_bytes_in_any_order_encode_or_are_refused_and_never_lose_a_byte(merges, text):
    tok = EcgByte(merges)
    assert tok.spell(tok.encode_symbols(text)) == text
    try:
        ids = tok.encode_symbols(text, "merges")
    except UserError as error:
        assert "joined" in str(error)
    else:
        assert tok.spell(ids) == text


@given(corpora, st.integers(0, 20))
def test_merging_a_record_gives_what_training_made_of_it(corpus, num_merges):
    tok = EcgByte.train(corpus, num_merges)
    assert sum(len(tok.encode_symbols(text, "merges")) for text in corpus) == tok.settings["tokens"]


# --- training ----------------------------------------------------------------------------------------------


@given(corpora, st.integers(0, 20), st.integers(2, 9))
def test_any_number_of_threads_learns_the_same(corpus, num_merges, threads):
    one, many = (EcgByte.train(corpus, num_merges, threads=n) for n in (1, threads))
    assert one.merges == many.merges and one.settings == many.settings


def test_any_number_of_threads_learns_the_same_from_much():
    rng = np.random.default_rng(1)
    corpus = [bytes(97 + rng.integers(0, 5, size=n).cumsum() % 26) for n in rng.integers(1, 9000, size=60)]
    corpus = [np.frombuffer(text, np.uint8).tobytes() for text in corpus]
    made = [EcgByte.train(corpus, 400, threads=threads) for threads in (1, 2, 3, 8, 64)]
    assert len({tok.merges for tok in made}) == 1 and len({tok.settings["tokens"] for tok in made}) == 1


@given(corpora, st.integers(0, 10), st.integers(1, 10))
def test_fewer_merges_are_the_first_of_more(corpus, few, further):
    assert EcgByte.train(corpus, few + further).merges[:few] == EcgByte.train(corpus, few).merges


@given(corpora, st.integers(0, 20), st.randoms(use_true_random=False))
def test_the_order_of_records_makes_no_difference(corpus, num_merges, random):
    shuffled = random.sample(corpus, len(corpus))
    assert EcgByte.train(corpus, num_merges).merges == EcgByte.train(shuffled, num_merges).merges


def _slow_corpus() -> list[bytes]:
    """Training on it takes long enough for several calls of `progress`, a tenth of a second apart."""
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, size=100_000).astype(np.uint8).tobytes() for _ in range(30)]


def test_ctrl_c_keeps_what_has_been_learnt_and_says_so():
    corpus, told = _slow_corpus(), []

    def progress(merges: int, count: int, tokens: int) -> None:
        told.append((merges, count, tokens))
        if len(told) == 2:
            raise KeyboardInterrupt

    tok = EcgByte.train(corpus, 5000, threads=1, progress=progress)
    assert len(told) == 2 and told[1][0] >= told[0][0]
    assert tok.settings["interrupted_of"] == 5000
    learnt = len(tok.merges)
    assert told[1][0] <= learnt < 5000
    assert tok.merges == EcgByte.train(corpus, learnt, threads=2).merges
    assert tok.spell(tok.encode_symbols(corpus[0], "merges")) == corpus[0]


def test_another_error_of_progress_is_raised():
    def progress(merges: int, count: int, tokens: int) -> None:
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        EcgByte.train(_slow_corpus(), 5000, threads=1, progress=progress)


# --- signals -----------------------------------------------------------------------------------------------


@given(signals, methods)
def test_a_signal_comes_back_within_half_a_level_whatever_its_leads(coder, signal, method):
    ids = coder.encode(signal, method)
    assert coder.spell(ids) == coder.to_symbols(signal)
    low, high = float(signal.min()), float(signal.max())
    back = coder.decode(ids, signal.shape, low, high)
    # The epsilon of the normalisation may push an amplitude of a small range down by up to 26 levels.
    span = high - low
    pushed = 1e-6 / (span + 1e-6) * span if span else 0.0
    assert np.abs(back - signal).max() <= 0.5 * span / 26 + pushed + 1e-9 * max(1.0, abs(low), abs(high))


@given(signals, methods)
def test_every_sample_belongs_to_the_token_that_spells_it(coder, signal, method):
    encoded = encode(coder, signal, method)
    token = token_of_sample(coder, encoded)
    assert token.shape == signal.shape
    letters = np.frombuffer(coder.to_symbols(signal), np.uint8)
    for i, entry in enumerate(encoded.ids):
        assert letters[token.reshape(-1) == i].tobytes() == coder.spell([entry])


@given(signals, methods)
def test_float32_and_float64_of_the_same_values_have_the_same_ids(coder, signal, method):
    np.testing.assert_array_equal(coder.encode(signal, method), coder.encode(signal.astype(np.float64), method))


@given(arrays.arrays(st.sampled_from([np.int16, np.uint8, np.float16]), shapes), methods)
def test_other_numbers_have_the_ids_of_their_values(coder, signal, method):
    assume(np.isfinite(signal).all())
    expected = coder.encode(signal.astype(np.float64), method)
    np.testing.assert_array_equal(coder.encode(signal, method), expected)


@given(st.data(), methods)
def test_how_an_array_lies_in_memory_makes_no_difference(coder, data, method):
    whole = data.draw(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=20)))
    assume(np.isfinite(whole).all())
    for view in (whole.T, whole[::-1], whole[:, ::-2], whole[1:, 1:], np.asfortranarray(whole), whole.astype(">f4")):
        np.testing.assert_array_equal(coder.encode(view, method), coder.encode(view.copy(order="C"), method))
    whole.setflags(write=False)
    coder.encode(whole, method)


@given(
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=3, max_dims=3, max_side=12), elements=samples),
    methods,
    st.integers(1, 9),
)
def test_batches_and_threads_change_no_id(coder, batch, method, threads):
    alone = [coder.encode(signal, method) for signal in batch]
    together = coder.encode(batch, method, threads=threads)
    assert isinstance(together, list) and len(together) == len(batch)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


@given(arrays.arrays(st.sampled_from([np.float32, np.float64]), shapes), methods)
def test_any_floats_encode_or_are_refused_with_a_reason(coder, signal, method):
    bad = int(np.count_nonzero(~np.isfinite(signal)))
    if not bad:
        try:
            assert coder.spell(coder.encode(signal, method)) == coder.to_symbols(signal)
        except UserError as error:
            assert "too far apart" in str(error) and np.ptp(signal.astype(np.longdouble)) > 1e308
        return
    with pytest.raises(UserError, match=f"{bad} samples that are not finite"):
        coder.encode(signal, method)
    with pytest.raises(UserError, match="not finite in recording 1"):
        coder.encode(np.stack([np.zeros_like(signal), signal]), method, threads=2)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_signal_is_refused_and_an_empty_batch_is_none(coder, shape):
    with pytest.raises(UserError, match="not empty"):
        coder.encode(np.zeros(shape))
    with pytest.raises(UserError, match="not empty"):
        coder.to_symbols(np.zeros(shape))
    assert coder.encode(np.zeros((0, 12, 5))) == []


@given(shapes, samples, st.sampled_from([np.float32, np.float64]), methods)
def test_a_constant_signal_is_its_lowest_level_and_comes_back(coder, shape, value, dtype, method):
    signal = np.full(shape, value, dtype)
    ids = coder.encode(signal, method)
    assert coder.spell(ids) == b"a" * signal.size
    np.testing.assert_array_equal(coder.decode(ids, shape, float(signal.min()), float(signal.max())), signal)


@given(st.lists(st.integers(-2, 700), max_size=30))
def test_any_ids_decode_or_are_refused(coder, ids):
    try:
        back = coder.decode(np.array(ids, np.int64), (1, len(ids)), 0.0, 1.0)
    except UserError:
        return
    assert back.shape == (1, len(ids))


# --- files -------------------------------------------------------------------------------------------------


@given(merges=st.lists(st.binary(min_size=1, max_size=6), max_size=10), random=st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_both_files_hold_the_same_tokenizer(tmp_path_factory, merges, random):
    folder = tmp_path_factory.mktemp("both")
    order = random.sample(range(256 + len(merges)), 256 + len(merges))
    tok = EcgByte(merges, order=order, settings={"seed": 1})
    tok.save(folder / "t.pkl")
    EcgByte.load(folder / "t.pkl").save(folder / "t.json")
    again = EcgByte.load(folder / "t.json")
    assert (again.merges, again.symbols, again.order) == (tok.merges, tok.symbols, tok.order)
    again.save(folder / "again.pkl")
    assert (folder / "again.pkl").read_bytes() == (folder / "t.pkl").read_bytes()


@pytest.fixture(scope="module")
def theirs(shared):
    return shared / "real" / "ecg_byte" / "ecg_byte_tokenizer_10000.pkl"


def test_the_reference_pickle_survives_json_and_back_to_the_byte(theirs, tmp_path):
    EcgByte.load(theirs).save(tmp_path / "t.json")
    EcgByte.load(tmp_path / "t.json").save(tmp_path / "t.pkl")
    assert (tmp_path / "t.pkl").read_bytes() == theirs.read_bytes()


def test_real_recordings_have_the_same_ids_by_both_files(theirs, shared, tmp_path):
    from elm_jax.symbols.corpus import Form, find_recordings

    paths = find_recordings([shared / "real" / "ecg" / "ptbxl" / "records500"])[:12]
    batch = np.stack([Form().read(path) for path in paths])
    reference = EcgByte.load(theirs)
    for name in ("t.json", "t.pkl"):
        reference.save(tmp_path / name)
        converted = EcgByte.load(tmp_path / name)
        for method in METHODS:
            for ours, expected in zip(converted.encode(batch, method), reference.encode(batch, method), strict=True):
                np.testing.assert_array_equal(ours, expected)
