"""Which recordings a tokenizer learns from: found, described, grouped and chosen, the same every time."""

import sys
import warnings
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elm_jax.ecg.features import PER_LEAD, ecg_features
from elm_jax.errors import UserError
from elm_jax.symbols import training
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.corpus import Form, Reader, find_recordings
from elm_jax.symbols.report import encode, median, totals
from elm_jax.symbols.training import cluster, random_order, stratified_sample

# Unlike numbers, and such that lie so near each other that rounding may tell them apart or not.
_NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, 1 + 1e-15, 1e-12, -1e-12, 1e6, 0.1 + 0.2, 0.3]), st.floats(-1e6, 1e6))

# --- features ----------------------------------------------------------------------------------------------


def test_features_of_a_sine_are_those_that_one_can_work_out():
    rate, seconds, hertz = 250, 10, 2.0
    time = np.arange(rate * seconds) / rate
    lead = 3 + np.sin(2 * np.pi * hertz * time)
    found = ecg_features(lead[None], rate)
    assert found.shape == (PER_LEAD,)
    mean, std, high, low, median, p25, p75, power, peak, at, centre, beats, spread = found[:13]
    np.testing.assert_allclose([mean, std, high, low, median], [3, np.sqrt(0.5), 4, 2, 3], atol=1e-2)
    np.testing.assert_allclose([p25, p75], [3 - np.sqrt(0.5), 3 + np.sqrt(0.5)], atol=1e-2)
    width = rate / 1024  # of a frequency's bin
    assert abs(at - hertz) <= width and abs(centre - hertz) < 2 * width
    assert abs(power * width - 0.5) < 0.02, "the density's integral is the variance"
    assert 0 < peak < power
    assert abs(beats - 120) < 0.5 and spread < 0.01
    np.testing.assert_allclose(found[-2:], [4 * hertz / rate, 2 * np.pi * hertz / rate / np.sqrt(2)], rtol=1e-2)


def test_wavelet_features_see_the_band_of_a_signal():
    rate = 256
    time = np.arange(rate * 8) / rate
    names = ["A5", "D5", "D4", "D3", "D2", "D1"]
    for hertz, band in ((1, "A5"), (6, "D5"), (12, "D4"), (24, "D3"), (48, "D2"), (96, "D1")):
        sizes = ecg_features(np.sin(2 * np.pi * hertz * time)[None], rate)[16:22]
        assert names[int(sizes.argmax())] == band, (hertz, sizes)


def test_the_wavelet_analysis_keeps_energy_and_sees_no_cubic():
    from elm_jax.ecg.features import _HIGH, _LOW, _analyse

    for shift in range(0, 8, 2):  # an orthonormal filter bank
        expected = 1.0 if shift == 0 else 0.0
        for a, b, value in ((_LOW, _LOW, expected), (_HIGH, _HIGH, expected), (_LOW, _HIGH, 0.0)):
            assert abs(np.dot(a[shift:], b[: len(b) - shift]) - value) < 1e-11
    cubic = np.linspace(-1, 1, 64)[None] ** 3
    assert np.abs(_analyse(cubic)[1][:, 4:-4]).max() < 1e-10


@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float64]),
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=60),
        elements=st.floats(-1e3, 1e3, width=32),
    ),
    st.sampled_from([1.0, 100.0, 500.0]),
)
def test_features_are_finite_for_any_finite_signal(signal, rate):
    found = ecg_features(signal, rate)
    assert found.shape == (PER_LEAD * len(signal),) and np.isfinite(found).all()


# --- choice ------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 5))
def test_a_random_order_has_each_once_and_is_that_of_its_seed(total, seed):
    found = random_order(total, seed)
    assert sorted(found.tolist()) == list(range(total))
    np.testing.assert_array_equal(found, random_order(total, seed))


def test_totals_hold_no_ids():
    tokenizer, alive = EcgByte([]), []

    def encoded():
        for level in range(5):
            one = encode(tokenizer, np.full((1, 10), float(level)))
            alive.append(weakref.ref(one))
            yield {"longest": one}
            del one
            assert sum(ref() is not None for ref in alive) <= 1

    assert totals(encoded())["tokens"] == {"longest": 50}


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=20))
def test_the_median_of_counted_lengths_is_that_of_all_of_them(counted):
    lengths, counts = np.array(counted).T
    assert median(lengths, counts) == np.median(np.repeat(lengths, counts))


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80), st.integers(0, 100), st.integers(0, 5))
def test_a_stratified_sample_gives_every_kind_its_quota(labels, count, seed):
    labels, count = np.array(labels), min(count, len(labels))
    found = stratified_sample(labels, count, seed)
    assert len(set(found.tolist())) == len(found) == count and (np.diff(found) > 0).all()
    there, taken = Counter(labels.tolist()), Counter(labels[found].tolist())
    quota = count // len(there)
    for kind, size in there.items():
        assert taken[kind] >= min(quota, size), (kind, taken, there)
    np.testing.assert_array_equal(found, stratified_sample(labels, count, seed))


def _blobs(kinds: int, each: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = np.concatenate([np.zeros((1, 6)), np.eye(6)[: kinds - 1] * 10])
    return np.concatenate([centre + 0.1 * rng.normal(size=(each, 6)) for centre in centres])


@pytest.mark.parametrize("kinds", [3, 4, 5])
def test_kinds_that_lie_apart_are_never_mixed_with_each_other_beyond_the_elbow(kinds):
    pytest.importorskip("sklearn")
    labels, _ = cluster(_blobs(kinds, 40), seed=0)
    by_kind = labels.reshape(kinds, 40)
    assert all(len(set(row.tolist())) == 1 for row in by_kind), "a kind was torn apart"
    assert len(np.unique(labels)) >= 3
    assert len(labels) == 40 * kinds


def test_where_k_means_sees_two_kinds_dbscan_is_asked_and_believed_if_it_sees_more():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(1)
    # The inertia falls most from two to three clusters, and the elbow of that is two.
    line = np.concatenate([rng.normal(0, 0.01, 60), rng.normal(4, 0.01, 60), rng.normal(9, 0.01, 60)])[:, None]
    labels, method = cluster(line, seed=0)
    assert method == "DBSCAN"
    assert [len(set(row.tolist())) for row in labels.reshape(3, 60)] == [1, 1, 1]
    two = np.concatenate([rng.normal(0, 0.01, 60), rng.normal(9, 0.01, 60)])[:, None]
    assert cluster(two, seed=0)[1] == "k-means"


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.zeros((9, 4)), np.repeat(np.eye(2), 5, 0)])
def test_recordings_that_are_too_few_or_alike_are_one_kind(features):
    pytest.importorskip("sklearn")
    labels, method = cluster(features, seed=0)
    assert method == "one kind" and labels.tolist() == [0] * len(features)


def test_recordings_that_the_components_cannot_tell_apart_are_one_kind():
    pytest.importorskip("sklearn")
    features = np.zeros((9, 2))
    features[3:6, 0], features[6:, 1] = 100, 1e-6  # the second column's share of the variance is dropped
    labels, method = cluster(features, seed=0)
    assert method == "one kind" and labels.tolist() == [0] * 9


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=_NUMBERS),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.floats(0, 1e-3),
)
@settings(max_examples=60)
def test_few_distinct_recordings_have_kinds_too(distinct, which, noise):
    pytest.importorskip("sklearn")
    features = distinct[np.array(which) % len(distinct)]
    features = features * (1 + noise * np.random.default_rng(0).normal(size=features.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of k-means that finds fewer kinds
        labels = cluster(features, seed=0)[0]
    assert labels.shape == (len(which),)


def test_a_kind_of_one_among_more_recordings_than_the_silhouette_sees(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(training, "_SILHOUETTE_OF", 20)
    features = np.random.default_rng(0).normal(size=(400, 1))
    features[0] = 1000
    labels = cluster(features, seed=0)[0]
    assert np.count_nonzero(labels == labels[0]) == 1


def test_three_recordings_can_be_grouped_and_grouping_repeats_itself():
    pytest.importorskip("sklearn")
    features = np.random.default_rng(3).normal(size=(120, 30))
    np.testing.assert_array_equal(cluster(features, 7)[0], cluster(features, 7)[0])
    assert len(cluster(features[:3], 0)[0]) == 3


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install scikit-learn threadpoolctl"):
        cluster(np.zeros((5, 2)), 0)


# --- recordings --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.npy", "b/10.npy", "a.npy", "b/.hidden.npy", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save((tmp_path / name).open("wb"), np.ones((12, 20)))
    return tmp_path


def test_recordings_are_found_in_folders_files_and_lists_once_each_and_in_order(folder):
    whole = [folder / "a.npy", folder / "b/10.npy", folder / "b/2.npy"]
    assert find_recordings([folder]) == whole
    assert find_recordings([folder / "b", folder]) == [*whole[1:], whole[0]]
    (folder / "list.txt").write_text("b/2.npy\n\nb\n")
    assert find_recordings([folder / "list.txt"]) == [whole[2], whole[1]]


def test_a_folder_that_can_be_reached_in_many_ways_is_read_once(folder):
    (folder / "b" / "up").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")
    whole = [folder / "a.npy", folder / "b/10.npy", folder / "b/2.npy"]
    assert find_recordings([folder]) == whole
    (folder / "0").symlink_to(folder / "b")  # the first of its names is taken
    assert find_recordings([folder]) == [folder / "0/10.npy", folder / "0/2.npy", whole[0]]


@pytest.mark.parametrize(
    ("place", "what"),
    [("absent", "no such file or folder"), ("absent.txt", "no readable file"), ("empty", "no recording")],
)
def test_a_place_without_recordings_is_refused(tmp_path, place, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=what):
        find_recordings([tmp_path / place])


@pytest.mark.parametrize(
    ("form", "what"),
    [
        ({"sampling_rate": 0}, "--sampling-rate: found 0"),
        ({"sampling_rate": float("nan")}, "--sampling-rate: found nan"),
        ({"segment_len": -1}, "--segment-len: found -1"),
        ({"leads": ["I", "v1"]}, "did you mean 'V1'"),
        ({"leads": ["I", "I"]}, "each item once"),
        ({"leads": []}, "--leads: found no leads"),
    ],
)
def test_a_form_that_no_recording_has_is_refused(form, what):
    with pytest.raises(UserError) as error:
        Form(**form)
    assert what in str(error.value)


def test_a_form_takes_its_leads_in_its_order_and_states_itself(tmp_path):
    signal = np.arange(12 * 40, dtype=np.float32).reshape(12, 40)
    np.save(tmp_path / "x.npy", signal)
    form = Form(250, 30, ("V6", "I"))
    np.testing.assert_array_equal(form.read(tmp_path / "x.npy"), signal[[11, 0], :30])
    assert form.symbols == 60 and Form.of(form.describe(), tmp_path) == form


@pytest.mark.parametrize("threads", [1, 3])
def test_the_order_of_results_is_that_of_the_files_whatever_the_threads(tmp_path, threads):
    paths = []
    for i in range(40):
        paths.append(tmp_path / f"{i}.npy")
        np.save(paths[-1], np.full((12, 10), float(i)))
    reader = Reader(Form(250, 10), threads=threads)
    assert list(reader.each(paths, lambda x: int(x[0, 0]), "t")) == list(zip(paths, range(40), strict=True))


def test_unreadable_recordings_are_left_out_and_named_until_they_are_too_many(tmp_path):
    paths = [tmp_path / f"{i}.npy" for i in range(10)]
    for i, path in enumerate(paths):
        np.save(path, np.full((12, 10), np.nan if i in (3, 6) else 1.0))
    reader = Reader(Form(250, 10), share=0.2, threads=2)
    assert [path for path, _ in reader.each(paths, len, "t")] == [p for i, p in enumerate(paths) if i not in (3, 6)]
    reader.log(tmp_path / "log.txt")
    assert [line.split("\t")[0] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        str(paths[3]),
        str(paths[6]),
    ]
    with pytest.raises(UserError, match=r"6\.npy: found nan.*2 of 10 recordings unreadable.*--max-bad-records"):
        list(Reader(Form(250, 10), share=0.1, threads=2).each(paths, len, "t"))


def test_every_pass_counts_its_own_unreadable_recordings_and_spares_take_their_places(tmp_path):
    paths = [tmp_path / f"{i}.npy" for i in range(20)]
    for i, path in enumerate(paths):
        np.save(path, np.full((12, 10), np.nan if i in (3, 6, 10) else 1.0))
    reader = Reader(Form(250, 10), share=0.3, threads=2)
    for _ in range(2):
        read = [path for path, _ in reader.each(paths[:10], len, "t", spare=paths[10:])]
        assert read == [*(p for i, p in enumerate(paths[:10]) if i not in (3, 6)), paths[11], paths[12]]
    assert sorted(reader.unreadable) == sorted(paths[i] for i in (3, 6, 10))
    with pytest.raises(UserError, match=r"10\.npy: found nan.*3 of 10 recordings unreadable"):
        list(Reader(Form(250, 10), share=0.2, threads=2).each(paths[:10], len, "t", spare=paths[10:]))


def test_synthetic_recordings_of_two_kinds_are_sampled_in_equal_parts():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    slow = [np.sin(np.arange(1000) * f)[None] for f in rng.uniform(0.02, 0.021, 90)]
    fast = [5 * np.sin(np.arange(1000) * f)[None] for f in rng.uniform(0.3, 0.31, 10)]
    labels, _ = cluster(np.stack([ecg_features(x, 250) for x in slow + fast]), 0)
    taken = stratified_sample(labels, 20, 0)
    assert np.count_nonzero(taken >= 90) >= 5, "the rare kind is a tenth of the recordings"
