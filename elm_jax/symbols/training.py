"""Training an ECG-Byte tokenizer from recordings: choose them, read them, learn, and say what was done.

Recordings are chosen at random, or equally many of every kind. Kinds are clusters of the recordings' features, as the
reference makes them: principal components with 95 % of the variance of the unscaled features, scaled to unit variance,
then k-means; the number of clusters is the smaller of the elbow's and the best silhouette's. Where that gives fewer
than three, DBSCAN is asked; if it knows no more, k-means stands. Dimension letters: N recordings, F features.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.ecg.features import ecg_features
from elm_jax.errors import UserError, refused
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.corpus import Reader
from elm_jax.symbols.files import check_ending
from elm_jax.symbols.report import encode_by_all, totals

MOST_RECORDS = 300_000  # unless told otherwise, as the reference
# Of memory, as measured on hundreds of ECGs: 4 for the corpus, at most 12 for places in it, and the rest for pairs of
# neighbours, about 150 bytes for each distinct one ever seen: many in noise, and for their size in few ECGs.
BYTES_PER_SYMBOL = 20
_MEASURED = 200  # recordings
KINDS = ("random", "stratified")
_VARIANCE = 0.95
_MOST_CLUSTERS, _STARTS, _FEWEST = 10, 10, 3
_SILHOUETTE_OF = 10_000  # recordings
_NEAR = 6  # decimals: points that agree to so many, in standard deviations, are one
_EPS, _NEIGHBOURS = 0.5, 5  # of DBSCAN

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """What a training is asked for; `records` None: all, up to MOST_RECORDS."""

    num_merges: int
    records: int | None = None
    sample: str = "random"
    seed: int = 0
    across_records: bool = False


def check_place(out: Path) -> None:
    """Whether a tokenizer can be written to `out` is learnt before the work is done, not after: UserError if not."""
    check_ending(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK) and not out.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise UserError(str(out), "a place that cannot be written to", "a file in a folder of yours", "give another")


def train(paths: Sequence[Path], plan: Plan, reader: Reader, tell: Tell) -> tuple[EcgByte, list[Path]]:
    """The tokenizer learnt from a sample of the recordings at `paths`, and the recordings of the sample.

    Its settings say what decides the merges, and a checksum of the corpus; no path is among them. `tell` gets lines for
    the user. Ctrl-C while merges are learnt keeps what there is (settings: interrupted_of). Raises UserError for too
    many unreadable recordings, so for an empty corpus, and where a library or the extension is missing.
    """
    letters = EcgByte([])
    letters.encode_symbols(b"")  # a missing extension is found before all is read
    if plan.sample == "stratified":
        require_sampling()
    chosen, spare, kinds = _choose(paths, plan, reader)
    tell(f"recordings: {len(chosen)} of {len(paths)} ({plan.sample}, seed {plan.seed})")
    if kinds:
        tell(f"kinds: {', '.join(map(str, kinds['sizes']))} recordings ({kinds['method']})")
    _tell_memory(len(chosen) * reader.form.symbols, tell)
    place = {path: i for i, path in enumerate(paths)}
    corpus = sorted(reader.each(chosen, letters.to_symbols, "reading", spare), key=lambda one: place[one[0]])
    symbols = [text for _, text in corpus]
    tell(f"learning: up to {plan.num_merges} merges from {len(symbols)} recordings; Ctrl-C keeps what is learnt")
    learnt = _learn(symbols, plan, reader.threads)
    settings = {
        **reader.form.describe(),
        "files": len(paths),
        "unreadable": len(reader.unreadable),
        "sample": plan.sample,
        "seed": plan.seed,
        **({"kinds": kinds} if kinds else {}),
        "num_merges": plan.num_merges,
        "corpus_sha256": _checksum(symbols),
    }
    return EcgByte(learnt.merges, settings=settings | learnt.settings), [path for path, _ in corpus]


def measure(tokenizer: EcgByte, paths: Sequence[Path], reader: Reader) -> dict[str, Any]:
    """`totals` by all methods on the recordings, or on some spread evenly over them."""
    some = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(_MEASURED, len(paths))).astype(int))]
    work = partial(encode_by_all, tokenizer)
    return totals(encoded for _, encoded in reader.each(some, work, "measuring"))


def _choose(paths: Sequence[Path], plan: Plan, reader: Reader) -> tuple[list[Path], list[Path], dict[str, Any]]:
    """The recordings to read, those to read in place of unreadable ones, and what is said of their kinds."""
    wanted = plan.records or MOST_RECORDS
    if plan.sample == "random":
        order = random_order(len(paths), plan.seed)
        return [paths[i] for i in np.sort(order[:wanted])], [paths[i] for i in order[wanted:]], {}
    described = list(reader.each(paths, lambda x: ecg_features(x, reader.form.sampling_rate), "features"))
    labels, method = cluster(np.stack([features for _, features in described]), plan.seed)
    taken, sizes = stratified_sample(labels, wanted, plan.seed), Counter(labels.tolist()).values()
    kinds = {"method": method, "sizes": sorted(sizes, reverse=True)}
    return [described[i][0] for i in taken], [], kinds  # all of these were readable just now


def _learn(symbols: Sequence[bytes], plan: Plan, threads: int) -> EcgByte:
    with tqdm(total=plan.num_merges, desc="learning", unit="merge", disable=None) as bar:

        def progress(merges: int, count: int, tokens: int) -> None:
            bar.set_postfix(pairs=count, tokens=tokens, refresh=False)
            bar.update(merges - bar.n)

        learnt = EcgByte.train(symbols, plan.num_merges, plan.across_records, threads, progress)
        bar.update(len(learnt.merges) - bar.n)
    return learnt


def _tell_memory(symbols: int, tell: Tell) -> None:
    need = symbols * BYTES_PER_SYMBOL
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    each = f"{BYTES_PER_SYMBOL} bytes for each of {symbols} symbols"
    tell(f"memory: about {need / 1e9:.2g} GB ({each}; two or three times that for noise or few ECGs)")
    if need > there:
        tell(f"warning: this machine has {there / 1e9:.2g} GB; fewer --records need less")


def _checksum(symbols: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for record in symbols:
        digest.update(len(record).to_bytes(8, "little") + record)
    return digest.hexdigest()


def random_order(total: int, seed: int) -> np.ndarray:
    """0..total-1, each order as likely as any other: the first few are a random sample."""
    return np.random.default_rng(seed).permutation(total)


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` places in `labels` (N,), sorted: of every label equally many, or all that it has; the rest at random."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(labels))
    kinds = np.unique(labels)
    quota = count // len(kinds)
    taken = np.concatenate([places[labels[places] == kind][:quota] for kind in kinds])
    others = places[~np.isin(places, taken)]
    return np.sort(np.concatenate([taken, others[: count - len(taken)]]))


def require_sampling() -> None:
    """Raises UserError where scikit-learn is not installed."""
    fix = "run pip install scikit-learn threadpoolctl, or take --sample random"
    with refused("--sample stratified", "no scikit-learn", "scikit-learn", fix, ImportError):
        import sklearn  # noqa: F401


def cluster(features: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """The kind of each of recordings with `features` (N, F), int (N,), and how it was found: the same for the same
    features and seed. -1: DBSCAN's noise, a kind, too.

    Raises UserError where scikit-learn is not installed.
    """
    require_sampling()
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # threads would add up in another order each time
        return _cluster(features, seed)


def _cluster(features: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    from sklearn.cluster import DBSCAN

    points = _components(features, seed)
    if points is None:
        return np.zeros(len(features), np.int64), "one kind"
    labels = _k_means(points, seed)
    if len(np.unique(labels)) < _FEWEST:
        dense = DBSCAN(eps=_EPS, min_samples=_NEIGHBOURS).fit_predict(points)
        if len(np.unique(dense)) >= _FEWEST:
            return dense, "DBSCAN"
    return labels, "k-means"


def _components(features: np.ndarray, seed: int) -> np.ndarray | None:
    """Scaled principal components (N, few), or None where they tell fewer than three recordings apart."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(features, axis=0)) < _FEWEST:
        return None
    few = PCA(_VARIANCE, svd_solver="full", random_state=seed).fit_transform(features)
    points = StandardScaler().fit_transform(few).round(_NEAR)
    return None if len(np.unique(points, axis=0)) < _FEWEST else points


def _k_means(points: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    most = min(_MOST_CLUSTERS, len(np.unique(points, axis=0)) - 1)
    settings: dict[str, Any] = {"n_init": _STARTS, "random_state": seed}
    runs: list[Any] = [KMeans(k, **settings).fit(points) for k in range(2, most + 1)]
    labels = [run.labels_ for run in runs]
    some = random_order(len(points), seed)[:_SILHOUETTE_OF]
    scores = [_silhouette(points[some], found[some]) for found in labels]
    falls = np.diff([run.inertia_ for run in runs])
    elbow = int(np.argmin(falls)) if len(falls) else 0
    return labels[min(elbow, int(np.argmax(scores)))]


def _silhouette(points: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import silhouette_score

    # Some of the recordings may be all of one cluster, where the others are rare.
    return float(silhouette_score(points, labels)) if 1 < len(np.unique(labels)) < len(labels) else -1.0
