"""Training an ECG-Byte tokenizer from recordings: choose them, read them, learn, and say what was done."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.ecg.features import ecg_features
from elm_jax.errors import UserError
from elm_jax.symbols import sampling
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.corpus import Reader
from elm_jax.symbols.files import check_ending
from elm_jax.symbols.report import encode_by_all, totals

MOST_RECORDS = 300_000  # unless told otherwise, as the reference
# Of memory, as measured on hundreds of ECGs: 4 for the corpus, at most 12 for places in it, and the rest for pairs of
# neighbours, about 150 bytes for each distinct one ever seen: many in noise, and for their size in few ECGs.
BYTES_PER_SYMBOL = 20
_MEASURED = 200  # recordings

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
        sampling.require_sampling()
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
        order = sampling.random_order(len(paths), plan.seed)
        return [paths[i] for i in np.sort(order[:wanted])], [paths[i] for i in order[wanted:]], {}
    described = list(reader.each(paths, lambda x: ecg_features(x, reader.form.sampling_rate), "features"))
    strata = sampling.cluster(np.stack([features for _, features in described]), plan.seed)
    taken = sampling.stratified_sample(strata.labels, wanted, plan.seed)
    return [described[i][0] for i in taken], [], strata.describe()  # all of these were readable just now


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
