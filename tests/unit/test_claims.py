"""What a stranger's file claims is held against the file, and asks for no memory, time or other file before."""

from __future__ import annotations

import base64
import json
import os
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from elm_jax.data.dataset import read_system_prompt
from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.prepare.ptb_xl import INDEX as DATABASE
from elm_jax.data.prepare.ptb_xl import STATEMENTS, read_statements, read_truths
from elm_jax.data.table_files import csv_rows, file_tables
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.errors import UserError
from elm_jax.folders import MOST_JSON, check_checksums, json_lines, read_json, seal, write_json
from elm_jax.run import verification
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.corpus import find_recordings
from elm_jax.text.vocabulary import load_tokenizer
from elm_jax.weights.encoders import encoder_config
from elm_jax.weights.files import open_tensors
from elm_jax.weights.load import read_llm_config

READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": read_json,
    "metrics.jsonl": lambda path: json_lines(path, "x"),
    "model.safetensors": lambda path: open_tensors(path, "x"),
    "model.bin": lambda path: open_tensors(path, "x"),
    "table.parquet": lambda path: list(file_tables(path.parent)),
    "table.jsonl": lambda path: list(file_tables(path.parent)),
    "table.csv": lambda path: list(csv_rows(path, ("a",), path, "x", "x")),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "vocab.txt": lambda path: load_tokenizer(path.parent),
    "ecg_byte.json": EcgByte.load,
    "ecg_byte.pkl": EcgByte.load,
    "list.txt": lambda path: find_recordings([path]),
    "prompt.md": lambda path: read_system_prompt(str(path)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError):
        READERS[name](tmp_path / name)


def test_a_file_that_says_how_something_is_made_has_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MOST_JSON + 1)  # takes no room on the disk
    with pytest.raises(UserError, match=f"found {MOST_JSON + 1} bytes; expected at most {MOST_JSON}"):
        read_json(path)


# -- PyTorch's files


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may take half a GB more than it has."""
    torch = pytest.importorskip("torch")
    torch.zeros(1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def saved(path: Path, change: Callable[[bytes], bytes], packed: bool = False) -> Path:
    """A file of one tensor whose pickle is changed."""
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(10.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for part, data in parts.items():
            archive.writestr(part, change(data) if part.endswith("data.pkl") else data)
    return path


def test_a_packed_part_of_a_torch_file_is_not_unpacked(tmp_path: Path, little_memory: None) -> None:
    assert list(open_tensors(saved(tmp_path / "good.pt", lambda data: data), "x")) == ["a"]
    bomb = saved(tmp_path / "bomb.pt", lambda data: data + bytes(1 << 20), packed=True)
    with pytest.raises(UserError, match="packed parts"):
        open_tensors(bomb, "x")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
def test_a_torch_file_cannot_ask_for_bytes_by_their_number(tmp_path: Path, little_memory: None, old: bool) -> None:
    asks = b"cbuiltins\nbytearray\n\x8a\x05" + (3 * 10**9).to_bytes(5, "little") + b"\x85R0"
    path = tmp_path / "asks.pt"
    if old:
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.arange(10.0)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:2] + asks + path.read_bytes()[2:])
    else:
        saved(path, lambda data: data[:2] + asks + data[2:])
    with pytest.raises(UserError, match="a bytearray, which is no tensor"):
        open_tensors(path, "x")


def test_a_torch_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(10.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(open_tensors(tmp_path / "a.pt", "x")) == ["a"]


# -- lists of checksums


@pytest.mark.parametrize(
    "facts", [{"x": 1}, {"files": 3}, *({"files": {name: "a"}} for name in ("../t", "/t", "", ".", "a" * 300, "a\0"))]
)
def test_a_list_of_checksums_that_is_none_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    write_json(tmp_path / "checksums.json", seal(facts))
    with pytest.raises(UserError, match=r"or remove checksums\.json if you changed it yourself"):
        check_checksums(tmp_path)


@pytest.mark.parametrize(
    "files", [3, {"../a": [1, "x"]}, {"/a": [1, "x"]}, {"a": 3}, {"a": [1]}, {"a": ["1", "x"]}, {"a": [1, None]}]
)
def test_a_list_of_arrays_that_is_none_counts_as_not_there(tmp_path: Path, files: Any) -> None:
    write_json(tmp_path / "checksums-0-of-1.json", seal({"files": files}))
    assert verification.listed(tmp_path) == {}
    assert verification.wrong_file(tmp_path, {"a" * 300: [1, "x"]}).endswith("File name too long")


def test_only_a_run_s_own_tokenizer_is_held_against_checksums(tmp_path: Path) -> None:
    demo_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "checksums.json").write_text('{"model.safetensors": "as its publisher lists it"}')
    load_tokenizer(tmp_path)


# -- sizes


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
def test_sizes_of_a_language_model_have_bounds(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, key: 10**12}))
    with pytest.raises(UserError, match=r"found 1000000000000; expected a whole number from 1 to"):
        read_llm_config(tmp_path)


@pytest.mark.parametrize("field", ["embed_dim", "depth", "num_leads"])
def test_sizes_of_an_encoder_have_bounds(field: str) -> None:
    from flax import nnx

    from elm_jax.models.encoders import build_encoder

    with pytest.raises(UserError, match=f"encoder.config.{field}: found 1000000000000"):
        build_encoder("st_mem", encoder_config("st_mem", None, {field: 10**12}), 1, nnx.Rngs(0))


# -- tokenizers: their chat templates are only looked into, and never run


def changed_tokenizer(folder: Path, **parts: Any) -> Path:
    demo_tokenizer().save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**spec, **parts}))
    return folder


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_whose_text_has_no_end_is_refused(tmp_path: Path, part: str) -> None:
    ten = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 10}
    many = {"type": "Sequence", f"{part}s": [ten, {"type": "Sequence", f"{part}s": [ten] * 11}]}
    with pytest.raises(UserError, match=f"a {part} that writes 10000 characters for one"):
        load_tokenizer(changed_tokenizer(tmp_path / "t", **{part: many}))


def replaced(what: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": what}, "content": content}


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Prepend", "prepend": "x" * 1001}],
        [replaced("x", "ab"), *[replaced("b", "bb")] * 9],
        [replaced("x", "A" * 40), {"type": "Lowercase"}, replaced("a", "b" * 40)],
        [{"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 40}, replaced("y", "b" * 40)],
        [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"x" * 1001).decode()}],
    ],
)
def test_what_steps_of_a_normalizer_write_together_has_a_bound(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    spec = {"normalizer": {"type": "Sequence", "normalizers": steps}}
    with pytest.raises(UserError, match=r"a normalizer that writes \d+ characters for one"):
        load_tokenizer(changed_tokenizer(tmp_path / "t", **spec))


def test_many_replacements_that_do_not_find_each_other_are_taken(tmp_path: Path) -> None:
    steps = [replaced(chr(0xE000 + i), "ab"[i % 2] * 3) for i in range(100)]
    words = load_tokenizer(changed_tokenizer(tmp_path / "t", normalizer={"type": "Sequence", "normalizers": steps}))
    assert words.backend_tokenizer.normalizer.normalize_str("\ue000\ue001") == "aaabbb"


def test_a_further_chat_template_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "t")
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "a.jinja")
    with pytest.raises(UserError, match=r"a\.jinja: found no regular file"):
        load_tokenizer(folder)


def test_a_pattern_that_backtracks_without_end_is_given_up(tmp_path: Path) -> None:
    from elm_jax.text.vocabulary import vocabulary

    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    words = vocabulary(load_tokenizer(changed_tokenizer(tmp_path / "t", pre_tokenizer=split)))
    with pytest.raises(UserError, match="a tokenizer that fails at"):
        words.encode("a" * 40 + "!")


def test_a_stranger_s_chat_template_is_not_run(tmp_path: Path) -> None:
    endless = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"
    folder = changed_tokenizer(tmp_path / "t")
    told = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": endless}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    assert load_tokenizer(folder).chat_template == endless
    package = Path(__file__).parents[2] / "elm_jax"
    used = [str(file.relative_to(package)) for file in package.rglob("*.py") if "apply_chat" in file.read_text()]
    # Of a translator and of a reward model that the user names, in transformers' sandbox.
    assert sorted(used) == ["data/prepare/translation.py", "weights/judge.py"]


# -- WFDB records


def wfdb_record(folder: Path, frames: str = "10", form: str = "16", segments: str = "") -> Path:
    """A record of two bytes a sample, and ten samples; or, of `segments`, one that names them."""
    lines = [f"w 12 500 {frames}", *(f"w.dat {form} 1000/mV 16 0 0 0 0 {lead}" for lead in LEADS)]
    (folder / "w.hea").write_text("\n".join(lines) + "\n")
    (folder / "w.dat").write_bytes(bytes(10 * 12 * 2))
    if segments:
        names = segments.split()
        (folder / "m.hea").write_text(f"m/{len(names)} 12 500\n" + "".join(f"{name} 10\n" for name in names))
    return folder / ("m" if segments else "w")


@pytest.mark.parametrize(
    ("frames", "form"), [("999999999999", "16"), ("21", "16"), ("10", "16x999999"), ("99999999", "516")]
)
def test_a_header_claims_no_more_samples_than_the_file_can_hold(tmp_path: Path, frames: str, form: str) -> None:
    assert read_ecg(wfdb_record(tmp_path)).signal.shape == (12, 10)
    with pytest.raises(UserError, match=r"w\.hea: found \d+ samples of w\.dat, of 240 bytes; expected at most"):
        read_ecg(wfdb_record(tmp_path, frames, form))


@pytest.mark.parametrize("line", ["w 12 500(0)99999999999", "w 12 500/1)99999999999 10", "w 12 500 9\u00e999999999999"])
def test_wfdb_finds_no_claim_that_we_do_not_see(tmp_path: Path, line: str) -> None:
    path = wfdb_record(tmp_path)
    header = (tmp_path / "w.hea").read_text().splitlines()
    (tmp_path / "w.hea").write_text("\n".join([line, *header[1:]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"w\.hea: found the line"):
        read_ecg(path)


def test_a_file_of_samples_has_a_bound(tmp_path: Path) -> None:
    path = wfdb_record(tmp_path, "")
    os.truncate(tmp_path / "w.dat", 1 << 33)  # takes no room on the disk
    with pytest.raises(UserError, match="of 8589934592 bytes; expected .* in at most 1073741824 bytes"):
        read_ecg(path)


def test_a_segment_is_not_unfolded_by_naming_it_again(tmp_path: Path) -> None:
    assert read_ecg(wfdb_record(tmp_path, segments="w")).signal.shape == (12, 10)
    with pytest.raises(UserError, match="w more than once"):
        read_ecg(wfdb_record(tmp_path, segments="w " * 40_000))


# -- tables


def saved_table(folder: Path) -> Path:
    datasets.Dataset.from_dict({"ecg_path": ["a.npy"], "text": ["b"]}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/passwd", 3, None])
def test_a_saved_table_names_files_of_its_own_folder_alone(tmp_path: Path, name: Any) -> None:
    folder = saved_table(tmp_path / "t")
    assert len(list(file_tables(folder))) == 1
    state = json.loads((folder / "state.json").read_text()) | {"_data_files": [{"filename": name}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="names of files in it"):
        list(file_tables(folder))


def test_a_collection_of_saved_tables_names_folders_of_its_own_alone(tmp_path: Path) -> None:
    saved_table(tmp_path / "other")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(UserError, match="names of files in it"):
        list(file_tables(tmp_path / "t"))


def test_a_saved_table_whose_offsets_lead_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = saved_table(tmp_path / "t")
    (file,) = folder.glob("*.arrow")
    data = file.read_bytes()
    place = data.rindex(np.int32([0, 5]).tobytes())  # where a.npy begins and ends
    file.write_bytes(data[:place] + np.int32([0, 10**8]).tobytes() + data[place + 8 :])
    with pytest.raises(UserError, match="an unreadable file"):
        list(file_tables(folder))


@pytest.mark.parametrize("codes", ["", "{", "(" * 500, "-" * 5000 + "1", "__import__('os').getcwd()"])
def test_a_cell_of_ptb_xl_is_data(tmp_path: Path, codes: str) -> None:
    (tmp_path / DATABASE).write_text(f'ecg_id,scp_codes\n1,"{codes}"\n')
    with pytest.raises(UserError, match="a cell that is not as PTB-XL has it"):
        read_truths(tmp_path)
    (tmp_path / STATEMENTS).write_text(",description,diagnostic,form,rhythm\nNORM,normal,x,,\n")
    with pytest.raises(UserError, match="a cell that is not as PTB-XL has it"):
        read_statements(tmp_path)
