"""Tokenizers are files that others wrote: they are read, and nothing of them is run."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from elm_jax.data.demo import demo_tokenizer
from elm_jax.errors import UserError
from elm_jax.text.vocabulary import load_tokenizer, vocabulary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def trapped(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer folder whose auto_map names a class in a .py beside it, and the file that its code would write."""
    folder, written = tmp_path / "tokenizer", tmp_path / "written"
    demo_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["trap.Trap", "trap.Trap"], "AutoConfig": "trap.Trap"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(written)!r}).write_text('run')\nclass Trap(PreTrainedTokenizerFast): pass\n"
    )
    return folder, written


@pytest.mark.parametrize("known_class", [True, False])
def test_code_beside_a_tokenizer_is_never_run_nor_asked_about(trapped, monkeypatch, known_class: bool) -> None:
    folder, written = trapped
    if not known_class:
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Trap"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": config["auto_map"]}))
    monkeypatch.setattr(sys, "stdin", answers := io.StringIO("y\n" * 9))
    try:
        loaded = load_tokenizer(folder)
    except UserError as error:
        assert not known_class and error.where == "llm.name"
    else:
        assert isinstance(loaded, PreTrainedTokenizerFast) and type(loaded).__name__ != "Trap"
        assert loaded("Normal?")["input_ids"] == demo_tokenizer()("Normal?")["input_ids"]
    assert not written.exists() and answers.tell() == 0


def test_everything_of_transformers_is_loaded_without_remote_code_and_tokenizers_in_one_place() -> None:
    for file in (ROOT / "elm_jax").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call in re.findall(r"\w+\.from_pretrained\([^'].*", text):
            assert "trust_remote_code=False" in call, f"{file}: {call}"
        assert ("AutoTokenizer" in text) == (file.name == "vocabulary.py"), file
        own = file.name == "page.py"  # which renders the package's templates, found in its folder by their names
        assert own or "jinja2" not in text, f"{file}: strangers' templates are rendered in transformers' sandbox alone"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[" * 5000),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_damaged_tokenizer_is_an_error_that_names_its_folder(tmp_path: Path, file: str, content: str) -> None:
    demo_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path, "config.init_from")


BROKEN = {
    "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 1}},
    "pre_tokenizer": {"type": "FixedLength", "length": 0},
    "decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99},
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
}


@pytest.mark.parametrize("part", BROKEN)
def test_a_tokenizer_that_fails_or_panics_at_a_text_is_a_user_error(tmp_path: Path, part: str) -> None:
    demo_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | {"added_tokens": [], part: BROKEN[part]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"llm\.name: found (a tokenizer that fails at|.* that can be read)"):
        words = vocabulary(load_tokenizer(tmp_path))
        words.text(list(words.encode("a")))
        words.encode("\u5fc3")


@pytest.mark.parametrize("largest", [1 << 22, 1 << 31, 1 << 70])
@pytest.mark.parametrize("part", ["model", "added_tokens"])
def test_an_id_beyond_all_vocabularies_is_refused_before_the_library_counts_up_to_it(
    tmp_path: Path, part: str, largest: int
) -> None:
    demo_tokenizer().save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    if part == "model":
        spec["model"]["vocab"][next(iter(spec["model"]["vocab"]))] = largest
    else:
        spec["added_tokens"][0]["id"] = largest
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=f"found a token with the id {largest}; expected ids below 4194304"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "added_tokens.json"])
def test_nor_is_it_counted_up_to_where_the_library_makes_a_tokenizer_of_older_files(tmp_path: Path, file: str) -> None:
    words = {chr(letter): letter - 33 for letter in range(33, 127)}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "!"}')
    assert load_tokenizer(tmp_path).encode("ab") == [words["a"], words["b"]]
    (tmp_path / file).write_text(json.dumps({**words, "far": 1 << 22}))
    with pytest.raises(UserError, match=f"{file}: found a token with the id 4194304"):
        load_tokenizer(tmp_path)
