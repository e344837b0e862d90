"""Are a damaged config.json, a damaged tokenizer and damaged caches found, whatever happens to whichever file?

    python scripts/reliability/caches.py [--flips 40] [--seed 0] [--short]

Every file of each kind is flipped in one bit at random places, cut at some, emptied, replaced by a deep nesting, and
deleted; then it is read as every command reads it. What comes of it is one of:

    refused   one line that names the file (a config, a tokenizer)
    rebuilt   what was kept is made again, and is what it was (caches)
    harmless  what is read equals what was written, by its values

Anything else is a failure: other values, another error than ours, a crash. Tables and recordings are also replaced by
others of the same size and the same time stamp. Compiled programs are damaged on disk and run in processes of their
own: each must print the number that the whole one prints, and leave a whole program behind.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common  # before jax
import numpy as np

PROGRAM = """
import sys, jax, jax.numpy as jnp
from elm_jax.runtime.compilation import keep_compiled
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
keep_compiled()
print(float(jax.jit(lambda x: jnp.tanh(x @ x.T).sum() + jnp.cumsum(x, 0)[:, :1].mean())(jnp.arange(64.).reshape(8, 8))))
"""
Read = Callable[[], Any]  # what is in the files of a kind, as values that can be compared


def damages(data: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What is done to a file: how it is called, and what the file then holds; None: it is deleted."""
    for _ in range(flips):
        place = rng.randrange(len(data))
        yield "flipped", data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    for _ in range(max(2, flips // 20)):
        yield "cut", data[: rng.randrange(1, len(data))]
    yield from (("emptied", b""), ("nested", b"[" * 100_000), ("deleted", None))


def tried(read: Read, expected: Any) -> str:
    """How reading ends."""
    from elm_jax.errors import UserError

    try:
        found = read()
    except UserError as error:
        return "refused" if "\n" not in str(error) else "an error of several lines"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "equal" if found == expected else "other values"


def each_file(folder: Path, read: Read, is_cache: bool, flips: int, rng: random.Random) -> Counter[str]:
    """Damage every file below a folder, one at a time. A cache must be whole at the second start at the latest."""
    counts: Counter[str] = Counter()
    whole = Path(f"{folder}.whole")
    shutil.copytree(folder, whole)
    expected = read()
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        for how, data in damages((whole / file).read_bytes(), flips, rng):
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
            ended = tried(read, expected)
            if is_cache and ended in ("equal", "refused"):
                again = tried(read, expected)
                ended = "rebuilt" if again == "equal" else f"not rebuilt: {again}"
            elif ended == "equal":
                ended = "harmless"
            counts[f"{how}: {ended}"] += 1
    shutil.rmtree(folder)
    whole.rename(folder)
    return counts


# ---- the kinds


def a_run(folder: Path) -> tuple[Read, Read]:
    """A run's folder without checkpoints: how its config.json and its tokenizer are read."""
    from elm_jax.cli import ConfigFlags
    from elm_jax.config import resolve
    from elm_jax.data.demo import demo_tokenizer
    from elm_jax.folders import check_checksums, leave_folder
    from elm_jax.run.config import config_of_run
    from elm_jax.run.folder import keep_tokenizer, open_folder
    from elm_jax.text.vocabulary import load_tokenizer

    open_folder(resolve({"workdir": str(folder)}))
    leave_folder(folder)
    keep_tokenizer(folder, demo_tokenizer())
    (folder / ".lock").unlink()

    def tokens() -> Any:
        check_checksums(folder / "tokenizer")  # as `assemble` does
        tokenizer = load_tokenizer(folder / "tokenizer")
        ends = (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer))
        return ends, tokenizer.backend_tokenizer.to_str(), tokenizer("Is the rhythm regular? 72 bpm")["input_ids"]

    return lambda: config_of_run(str(folder), ConfigFlags()), tokens


def an_index(records: Path, cache: Path) -> Read:
    from texts import chat_tokenizer, write_records  # of the tests

    from elm_jax.config import DataConfig
    from elm_jax.data.dataset import Dataset, text_spec
    from elm_jax.data.sources import load_records
    from elm_jax.data.specs import signal_spec

    answered = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
    write_records(records, [answered] * 20)
    data, tokenizer = DataConfig(names=("records.jsonl",), root=str(records), val_fraction=0.0), chat_tokenizer()

    def read() -> Any:
        found = load_records(data, "train", 0)
        dataset = Dataset(found, tokenizer, text_spec(data, "qwen2", 4, "sft", ()), signal_spec(data, 0))
        return {name: column.tolist() for name, column in vars(dataset.length_index("ecg", 0.0, cache)).items()}

    return read


def a_table(file: Path) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from elm_jax.data.table_files import file_tables

    pq.write_table(pa.table({"ecg_path": ["a.npy"] * 200, "text": [f"text {i}" for i in range(200)]}), file)
    return lambda: [table[:] for _, _, table in file_tables(file)]


def outputs(folder: Path) -> Read:
    """An encoder's outputs: as at a start, those that are not there are computed; then all are read."""
    from elm_jax.data.kept_features import Features, FeatureWriter

    values = {name: np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32) for i, name in enumerate("abcd")}

    def features() -> Features:
        return Features(str(folder), (4, 8), "float32")

    def read() -> Any:
        missing = {name for name in values if name not in features()}
        for names in (["a", "b"], ["c", "d"]):
            if missing & set(names):
                with FeatureWriter(features(), names) as writer:
                    writer.put(np.stack([values[name] for name in names]))
        return {name: np.array(features().load(name)).tolist() for name in values}

    return read


def programs(folder: Path, flips: int, rng: random.Random) -> Counter[str]:
    counts: Counter[str] = Counter()
    own = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder), "PYTHONPATH": str(common.ROOT)}

    def run() -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=own, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout.strip()

    expected = run()
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    file = max(whole, key=lambda path: len(whole[path]))
    for how, data in damages(whole[file], flips, rng):
        file.unlink() if data is None else file.write_bytes(data)
        ended = run()
        found = max(folder.glob(f"{file.name.rpartition('.')[0]}.*"), default=None)
        rebuilt = found is not None and found.read_bytes() != data and ended == expected
        counts[f"{how}: {'rebuilt' if rebuilt else f'ended with {ended}'}"] += 1
        for path in folder.iterdir():
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
    return counts


def same_stamp(path: Path, change: Callable[[], Any]) -> bool:
    """Change a file so that its size and its time stamp stay."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path.stat().st_size == before.st_size


def stamps(folder: Path) -> Counter[str]:
    """A table and a recording that change while their time stamps do not."""
    from elm_jax.config import DataConfig
    from elm_jax.data.specs import signal_spec

    table, recording, spec = folder / "t.parquet", folder / "a.npy", signal_spec(DataConfig(root=str(folder)), 0)
    read = a_table(table)
    before = read()
    data = table.read_bytes()
    assert same_stamp(table, lambda: table.write_bytes(data.replace(b"text 1", b"TEXT 1")))
    seen = read() != before
    np.save(recording, np.zeros((12, 9)))
    name = spec.names_of("a.npy", 0)
    assert same_stamp(recording, lambda: np.save(recording, np.ones((12, 9))))
    again = spec.names_of("a.npy", 0) != name
    return Counter({f"table: {'seen' if seen else 'not seen'}": 1, f"recording: {'seen' if again else 'not seen'}": 1})


def all_kinds(folder: Path, flips: int, programs_too: int, rng: random.Random) -> dict[str, Counter[str]]:
    import datasets

    run = folder / "run"
    config, tokens = a_run(run)
    (run / "tokenizer").rename(folder / "tokenizer")
    found = {"config.json": each_file(run, config, False, flips, rng)}
    (folder / "tokenizer").rename(run / "tokenizer")
    found["tokenizer"] = each_file(run / "tokenizer", tokens, False, flips, rng)
    (folder / "records").mkdir()
    read = an_index(folder / "records", folder / "index")
    read()
    found["length index"] = each_file(folder / "index", read, True, flips, rng)
    datasets.config.HF_DATASETS_CACHE = folder / "tables"
    read = a_table(folder / "table.parquet")
    read()
    found["table cache"] = each_file(folder / "tables", read, True, flips, rng)
    read = outputs(folder / "encoder")
    read()
    found["encoder cache"] = each_file(folder / "encoder", read, True, flips, rng)
    found["compilation cache"] = programs(folder / "programs", programs_too, rng) if programs_too else Counter()
    found["same time stamp"] = stamps(folder)
    return found


def failures(counts: Counter[str]) -> int:
    fine = ("refused", "rebuilt", "harmless", "seen")
    return sum(n for how, n in counts.items() if how.partition(": ")[2] not in fine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=40, help="flipped bits in each file")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--short", action="store_true", help="few places, and no programs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # one line for each rebuilt file
    with tempfile.TemporaryDirectory() as folder:
        flips, compiled = (4, 0) if args.short else (args.flips, min(args.flips, 20))
        found = all_kinds(Path(folder), flips, compiled, random.Random(args.seed))
    total, bad = (sum(each(counts) for counts in found.values()) for each in (Counter.total, failures))
    told = {kind: dict(sorted(counts.items())) for kind, counts in found.items() if counts}
    sentence = f"{total - bad} of {total} damages were found or harmless."
    return common.end(sentence, not bad, damages=total, failures=bad, kinds=told)


if __name__ == "__main__":
    sys.exit(main())
