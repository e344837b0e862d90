"""What is tried: each target has valid inputs, ways to spoil them, and a reader that reads or refuses."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elm_jax.ecg.pickled import read_pickle
from elm_jax.errors import UserError, printable
from scripts.fuzz import formats, models, recordings, texts
from scripts.fuzz.changes import Files, Way, changed

LONGEST_ERROR = 20_000  # characters


@dataclass(frozen=True)
class Target:
    """`read` gets the path of an input's first file, or with `in_memory` its bytes; it raises one of `refusals` for
    what it refuses, and whatever else it raises is a finding. `share`: inputs of a million."""

    valid: Callable[[], list[Files]]
    read: Callable[[Any], object]
    share: int
    in_memory: bool = False
    ways: tuple[Way, ...] = ()
    finish: Callable[[random.Random, Files], Files] = lambda rng, files: files
    refusals: tuple[type[Exception], ...] = (UserError,)
    longest: int = 1 << 20  # bytes of a file
    imports: tuple[str, ...] = ()  # packages that its libraries look for in odd files, or for names

    @cached_property
    def seeds(self) -> list[Files]:
        return self.valid()


TARGETS = {
    "npy": Target(recordings.npy, recordings.read_recording, 120_000),
    "shards": Target(
        recordings.shards_of_one, recordings.read_shard, 40_000, ways=(recordings.in_record,), finish=recordings.indexed
    ),
    "wfdb": Target(formats.records, recordings.read_recording, 60_000),
    "mat": Target(formats.mat, recordings.read_recording, 30_000),
    "edf": Target(formats.edf, recordings.read_recording, 20_000),
    "table_of_samples": Target(formats.tables, recordings.read_recording, 20_000),
    "xml": Target(formats.xml, recordings.read_recording, 30_000),
    "scp": Target(formats.scp, recordings.read_recording, 15_000, finish=formats.sealed),
    "dicom": Target(formats.dicom, recordings.read_recording, 3_000),
    "hdf5": Target(formats.hdf5, recordings.read_recording, 2_000),
    "unpickler": Target(recordings.pickles, read_pickle, 200_000, in_memory=True, refusals=(ValueError,)),
    "ecg_byte": Target(recordings.tokenizers, recordings.read_tokenizer, 100_000, finish=recordings.signed),
    "render": Target(
        texts.conversations, texts.read_conversation, 80_000, in_memory=True, finish=texts.new_conversation,
        longest=1 << 16,
    ),  # fmt: skip
    "overrides": Target(texts.command_lines, texts.read_command_line, 80_000, in_memory=True),
    "run_config": Target(texts.run_configs, texts.read_run_config, 30_000),
    "tables": Target(texts.tables, texts.read_table, 30_000),
    "lines": Target(texts.lines, texts.read_lines, 50_000),
    "compare": Target(texts.comparisons, texts.read_comparison, 3_000),
    "safetensors": Target(models.safetensors, models.read_safetensors, 80_000, ways=(models.in_header,)),
    "torch": Target(models.torch_files, models.read_torch, 20_000, ways=(models.in_zip,), imports=("encodings",)),
    "tokenizer": Target(models.tokenizers, models.read_tokenizer, 7_000, imports=("google",)),
    "llm_config": Target(models.llm_configs, models.read_llm_config, 15_000),
    "adapter": Target(models.adapters, models.read_adapter, 15_000),
}


def made(seed: int, number: int, name: str) -> Files:
    """Input `number` of a seed, by these alone."""
    rng, target = random.Random(f"{seed}:{number}:{name}"), TARGETS[name]
    files = target.finish(rng, changed(rng, rng.choice(target.seeds), target.seeds, target.ways))
    return {name: data[: target.longest] for name, data in files.items()}


def place(files: Files, folder: Path) -> Path:
    """Write an input into a folder, with nothing of another one; the path of its first file."""
    for name, data in files.items():
        path = folder / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / next(iter(files))


def ended(target: Target, at: Any) -> str:
    """`read` or `refused`; what else is raised passes through."""
    try:
        target.read(at)
    except target.refusals as error:
        if isinstance(error, UserError):
            said = str(error)
            assert said == printable(said) and len(said) < LONGEST_ERROR, f"an error that cannot be shown: {error!r}"
        return "refused"
    return "read"
