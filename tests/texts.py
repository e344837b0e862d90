"""What tests of text and records share: a tokenizer, records in a file, and what a rendered conversation learns."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.data.demo import demo_tokenizer
from elm_jax.text.render import Rendered, add_tokens


@functools.cache
def chat_tokenizer() -> Any:
    """The demo's tokenizer with the tokens of phase sft."""
    made = demo_tokenizer()
    add_tokens(made, "sft")
    return made


def write_records(folder: Path, texts: list[Any], paths: list[Any] | None = None, **columns: Any) -> None:
    """`records.jsonl`: one record a text, each of a patient of its own; two records share a recording by default."""
    paths = paths or [f"ecg_{i // 2}.npy" for i in range(len(texts))]
    rows = [
        {"ecg_path": path, "text": text, "name": "x", "patient_id": str(i), **columns}
        for i, (path, text) in enumerate(zip(paths, texts, strict=True))
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def learnt(rendered: Rendered) -> list[list[int]]:
    """The runs of supervised ids."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rendered.supervised, [False]]).astype(int)))
    return [rendered.ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]


def write_wordnet(folder: Path, synsets: dict[str, list[list[str]]] | None = None) -> None:
    """The files of a WordNet of these synsets: {part of speech: lists of words}."""
    folder.mkdir(parents=True)
    for part, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        index: dict[str, list[str]] = {}
        data = "  1 WordNet 3.0 Copyright\n"
        for words in (synsets or {}).get(part, []):
            for word in words:
                index.setdefault(word, []).append(f"{len(data):08d}")
            lemmas = " ".join(f"{word} 0" for word in words)
            data += f"{len(data):08d} 00 {letter} {len(words):02x} {lemmas} 000 | for a test\n"
        lines = [f"{w} {letter} {len(at)} 0 {len(at)} 0 {' '.join(at)}\n" for w, at in sorted(index.items())]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text("".join(lines))
        (folder / f"{part}.exc").write_text("")
    (folder / "index.sense").write_text("")
    (folder / "lexnames").write_text("00\tall\t0\n")
