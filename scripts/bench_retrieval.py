"""How long one look into a large index takes, and what it needs.

    python scripts/bench_retrieval.py --entries 1000000

Makes an index of so many feature vectors in a temporary folder (1.2 kB each): those of generated ECGs, each moved by
part of the difference of two others, so that columns hang together as those of ECGs do. Measured are the start (the
turned vectors), single queries and many at once, z-scored, and the memory of the process; some answers are held against
comparing with all entries. Then --build generated ECGs are indexed by build_index. Prints a line of JSON and a
sentence; exits with 1 where an answer is wrong, or the median query takes more than 20 ms of processor time, which
other work on the machine changes less than what a clock shows.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

from elm_jax.config import DataConfig
from elm_jax.data.demo import load_demo_ecg
from elm_jax.ecg.features import NAMES, ecg_features
from elm_jax.ecg.recording import LEADS
from elm_jax.folders import file_checksum, seal, write_json
from elm_jax.retrieval.build import build_index
from elm_jax.retrieval.index import INDEX, SCALE, VERSION, Index, bytes_of, part_name
from elm_jax.retrieval.nearest import Exact, Vectors
from elm_jax.weights.safetensors import save_safetensors

RATE, LENGTH, PART, MOST_MS = 250, 2500, 16_384, 20.0
MOVED = 0.3  # of the difference of two others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--ecgs", type=int, default=1000, help="generated ECGs that entries are made of")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--build", type=int, default=500, help="generated ECGs that are indexed, to time that")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ecgs = (load_demo_ecg(f"demo:train:{i}", RATE, LENGTH) for i in range(options.ecgs))
        base = np.stack([ecg_features(ecg, RATE) for ecg in ecgs])
        made(folder / "index", base, options.entries, rng)
        before = own_memory()
        begin = time.perf_counter()
        vectors = Vectors(Index(folder / "index"), "feature", "z_scored", tuple(range(len(LEADS))))
        search = Exact(vectors)
        figures = {"entries": options.entries, "start_s": round(time.perf_counter() - begin, 2)}
        queries = drawn(base, options.queries, rng)
        none = np.zeros(0, np.int64)
        search(queries[:1], 5, [none])
        times, busy, wrong = [], [], 0
        for query in queries:
            begin, used = time.perf_counter(), time.process_time()
            search(query[None], 5, [none])
            times.append(1e3 * (time.perf_counter() - begin))
            busy.append(1e3 * (time.process_time() - used))
        begin = time.perf_counter()
        found = search(queries, 5, [none] * len(queries))
        many = 1e3 * (time.perf_counter() - begin) / len(queries)
        figures |= {"query_ms": round(statistics.median(times), 2), "query_ms_least": round(min(times), 2)}
        figures |= {"query_processor_ms": round(statistics.median(busy), 2)}
        figures |= {"query_ms_of_many": round(many, 2), "memory_mb": round((own_memory() - before) / 1e6)}
        for place in range(0, len(queries), max(1, len(queries) // 5)):
            best = nearest_of_all(vectors, queries[place])
            wrong += not np.isclose(best, found[place][1][0], rtol=1e-4)
        figures |= {"wrong": wrong} | built(folder, options.build, options.workers)
    print(json.dumps(figures))
    print(
        f"One look into {options.entries} entries takes {figures['query_ms']} ms ({figures['query_processor_ms']} of "
        f"processors), of many at once {figures['query_ms_of_many']} ms each; the start {figures['start_s']} s."
    )
    return int(bool(wrong) or figures["query_processor_ms"] > MOST_MS)


def drawn(base: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Features (count, F) like those of ECGs."""
    one, two, three = (base[rng.integers(len(base), size=count)] for _ in range(3))
    return (one + MOVED * (two - three)).astype(np.float32)


def made(folder: Path, base: np.ndarray, entries: int, rng: np.random.Generator) -> None:
    """An index of so many entries, without texts."""
    folder.mkdir()
    parts, sums = [], np.zeros((2, base.shape[1]))
    for number, first in enumerate(range(0, entries, PART)):
        features = drawn(base, min(PART, entries - first), rng)
        owned = np.arange(len(features), dtype=np.int32)
        owners = np.array([xxhash.xxh3_64_intdigest(f"{first + i}".encode()) for i in owned], np.uint64)
        arrays = {"features": features, "owners": owners, "owned": owned}
        save_safetensors(folder / f"{part_name(number)}.safetensors", arrays)
        sums += [features.sum(0, dtype=np.float64), (features.astype(np.float64) ** 2).sum(0)]
        parts.append({"name": part_name(number), "entries": len(features), "bytes": bytes_of(folder, number)})
    mean = sums[0] / entries
    deviation = np.sqrt(np.maximum(sums[1] / entries - mean**2, 0))
    save_safetensors(folder / SCALE, {"features_mean": mean, "features_deviation": deviation})
    facts = {"format": VERSION, "names": list(NAMES), "segment_len": LENGTH, "sampling_rate": RATE, "reports": 0}
    facts |= {"compat": [], "signals": False, "scale": file_checksum(folder / SCALE), "parts": parts}
    write_json(folder / INDEX, seal(facts))


def nearest_of_all(vectors: Vectors, query: np.ndarray) -> float:
    scaled = vectors.scaled(query).astype(np.float64)
    return min(float(((block - scaled) ** 2).sum(1).min()) for _, block in vectors.blocks())


def built(folder: Path, count: int, workers: int) -> dict[str, float]:
    """How fast ECGs are indexed."""
    rows = ({"ecg_path": f"demo:train:{i}", "text": "a report", "patient_id": str(i)} for i in range(count))
    (folder / "ecgs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(names=("ecgs.jsonl",), root=str(folder), sampling_rate=RATE, segment_len=LENGTH)
    begin = time.perf_counter()
    build_index(data, folder / "built", workers=workers, progress=False)
    return {"built": count, "built_per_s": round(count / (time.perf_counter() - begin), 1), "workers": workers}


def own_memory() -> int:
    """Bytes of memory that this process has for itself: not those of mapped files, which the system takes back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
