"""The embedded demo: questions about synthetic ECGs, and a tokenizer for them. No download, no file.

The data set `demo` (or `demo:train=13600,val=200,test=1000`, counts of recordings) asks every recording for
its heart rate and whether its rhythm is regular, and some of them what kind of signal they are, beside as
many of noise and flat lines. Recordings come from `synthetic_ecg` and depend on their path alone, which is
`demo:<split>:<index>`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from elm_jax.data.tables import Lazy
from elm_jax.ecg.synthetic import RATE_RANGE, Rhythm, draw_rhythm, synthesize
from elm_jax.errors import UserError, nearest

if TYPE_CHECKING:  # slow to import, and loader workers only need the recordings
    from transformers import PreTrainedTokenizerFast

SECONDS = 10.0
SAMPLING_RATE, LENGTH = 50.0, 500  # coarse, but heart rates are learnt fastest so
SYSTEM_PROMPT = "You read ECGs. Answer in one word."
SPLITS = ("train", "val", "test")
# One recording in so many is also asked for its kind of signal, and brings one of noise and one flat line.
_SIGNAL_TYPE_EVERY = {"train": 16, "val": 16, "test": 1}
_SEED = 2003
_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_QUESTIONS = {
    "heart_rate": (
        "What is the heart rate?",
        "What is the heart rate in beats per minute?",
        "How fast is the heart beating?",
        "How many times does the heart beat in a minute?",
        "Give the heart rate of this recording.",
        "Please estimate the rate in beats per minute.",
        "At what rate does this heart beat?",
        "Read the heart rate from this recording.",
    ),
    "regularity": (
        "Is the rhythm regular or irregular?",
        "Does the heart beat regularly or irregularly?",
        "Are the beats evenly spaced? Answer regular or irregular.",
        "Say whether this rhythm is regular or irregular.",
    ),
    "signal_type": (
        "Is this an ECG, noise or a flat line?",
        "What kind of signal is this: ecg, noise or flatline?",
        "Which is it, an ecg, noise or a flatline?",
        "Tell me the type of this signal.",
        "What type of signal do you see?",
        "Does this show a heartbeat, noise or nothing at all? Answer ecg, noise or flatline.",
    ),
}
_SIGNAL_TYPES = ("ecg", "noise", "flatline")
_RHYTHMS = ("irregular", "regular")


@dataclass(frozen=True)
class DemoSizes:
    """Recordings per split. 16 recordings bring 35 conversations to train and val, 80 to test."""

    train: int = 13600
    val: int = 200
    test: int = 1000


def parse_sizes(dataset: str) -> DemoSizes:
    """The sizes that a data set's name states: "demo" or "demo:train=20000,test=1200". Raises UserError."""
    name, colon, options = dataset.partition(":")
    where, fix = f"data.names '{dataset}'", "write it like demo:train=13600,val=200,test=1000"
    if name != "demo":
        raise UserError(where, repr(name), "demo", fix)
    sizes: dict[str, int] = {}
    for option in options.split(",") if colon else ():
        split, _, count = option.partition("=")
        if split not in SPLITS:
            raise UserError(
                where, repr(option), f"a split of {', '.join(SPLITS)}", nearest(split, SPLITS) or fix
            )
        if split in sizes:
            raise UserError(where, f"{split} twice", "each split once", "remove one of them")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", count):
            raise UserError(where, repr(option), f"{split}=<recordings>, from 1 to 999999999", fix)
        sizes[split] = int(count)
    return DemoSizes(**sizes)


class DemoRecords(Lazy[dict[str, str]]):
    """Lazy records of one split; record i is made when it is asked for, and always the same."""

    def __init__(self, split: str, recordings: int) -> None:
        every = _SIGNAL_TYPE_EVERY[split]
        self._split, self._every = split, every
        self._block = [item for offset in range(every) for item in _asked_of(offset)]
        blocks, rest = divmod(recordings, every)
        self._length = blocks * len(self._block) + sum(offset < rest for offset, *_ in self._block)

    def __len__(self) -> int:
        return self._length

    def make(self, index: int) -> dict[str, str]:
        block, place = divmod(index, len(self._block))
        offset, name, kind = self._block[place]
        recording = block * self._every + offset
        path = f"demo:{self._split}:{recording}" if kind == "ecg" else kind
        answer = kind if name == "signal_type" else _answer(name, demo_rhythm(path))
        question = random.Random(f"{self._split}:{index}").choice(_QUESTIONS[name])
        return {
            "ecg_path": path,
            "text": json.dumps([{"from": "human", "value": question}, {"from": "gpt", "value": answer}]),
            "name": name,
            "patient_id": "-".join(["demo", self._split, str(recording)] + [kind] * (kind != "ecg")),
        }


def _asked_of(offset: int) -> Iterator[tuple[int, str, str]]:
    """(recording within its block, question, kind of signal) for one recording."""
    yield offset, "heart_rate", "ecg"
    yield offset, "regularity", "ecg"
    if offset == 0:
        for kind in _SIGNAL_TYPES:
            yield offset, "signal_type", kind


def _answer(name: str, rhythm: Rhythm) -> str:
    return str(rhythm.heart_rate) if name == "heart_rate" else _RHYTHMS[rhythm.regular]


def demo_records(split: str, dataset: str = "demo") -> DemoRecords:
    """The records of `split` ("train", "val" or "test") of the data set `dataset`. Raises UserError."""
    return DemoRecords(split, asdict(parse_sizes(dataset))[split])


@lru_cache(maxsize=64)
def demo_rhythm(path: str) -> Rhythm:
    """What is true of the recording at `path`, without making its signal."""
    return draw_rhythm(_key(path), SECONDS)


def load_demo_ecg(path: str, sampling_rate: float = SAMPLING_RATE, length: int = LENGTH) -> np.ndarray:
    """The recording at `path`, "demo:<split>:<index>": (12, length) float32 in mV at `sampling_rate` Hz.

    The truth holds for ten seconds: raises UserError if `length` samples are more or less.
    """
    if length != round(SECONDS * sampling_rate):
        found = f"{length} samples at {sampling_rate:g} Hz"
        fix = f"set data.segment_len to {round(SECONDS * sampling_rate)} or change data.sampling_rate"
        raise UserError("data.segment_len", found, f"the {SECONDS:g} s of a demo recording", fix)
    return synthesize(_key(path), sampling_rate, length)


def _key(path: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"demo:(train|val|test):(\d{1,9})", path)
    if not match:
        raise UserError(
            f"ecg_path '{path}'",
            "no demo recording",
            "demo:<split>:<index>",
            "use the paths of the data set demo",
        )
    return _SEED, SPLITS.index(match[1]), int(match[2])


def demo_tokenizer(cache_dir: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerFast:
    """The demo's tokenizer: byte-level BPE over the demo's own text, ChatML tokens, a token per digit.

    Trained in a fraction of a second, always the same. With `cache_dir` it is loaded from there, and put
    there first if need be, as a Hugging Face tokenizer folder.
    """
    if cache_dir is None:
        return _train_tokenizer()
    folder = Path(cache_dir)
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as fresh:  # processes that start together see whole files
            _train_tokenizer().save_pretrained(fresh)
            for name in sorted(os.listdir(fresh)):  # tokenizer.json before tokenizer_config.json
                os.replace(Path(fresh, name), folder / name)
    from elm_jax.text.vocabulary import load_tokenizer

    return load_tokenizer(folder, str(folder))


def _train_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # Words with the blank before them, single digits, runs of punctuation, line breaks, other blanks.
    pattern = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=768, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_corpus(), trainer)
    # PreTrainedTokenizerFast adds the special tokens itself, behind the learnt ones.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_TURN_END,
        pad_token=_END_OF_TEXT,
        additional_special_tokens=[_TURN_START],
    )


def _corpus() -> Iterator[str]:
    yield from (SYSTEM_PROMPT, "system\n", "user\n", "assistant\n")
    for questions in _QUESTIONS.values():
        yield from questions
    yield from _SIGNAL_TYPES + _RHYTHMS
    yield from map(str, range(RATE_RANGE[0], RATE_RANGE[1] + 1))
