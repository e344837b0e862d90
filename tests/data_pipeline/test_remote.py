"""Tables that lie elsewhere: what of them is fetched, that rows are those of the files, and what is said of trouble."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import chat_tokenizer

from elm_jax.config import default_config, resolve
from elm_jax.data import remote
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.remote import RemoteTable, remote_tables
from elm_jax.data.sources import Split, load_records
from elm_jax.data.specs import signal_spec
from elm_jax.data.table_files import file_tables
from elm_jax.errors import Absent, UserError

ROWS, GROUP = 400, 50


class Place:
    """A web server of the files of a folder, which counts the bytes that it sends."""

    def __init__(self, folder: Path) -> None:
        self.sent, self.broken, self.tagged = 0, 0, True
        place = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(b"", head=True)

            def do_GET(self) -> None:
                self._answer((folder / self.path[1:]).read_bytes() if (folder / self.path[1:]).is_file() else b"")

            def _answer(self, content: bytes, head: bool = False) -> None:
                file = folder / self.path[1:]
                if not file.is_file() or place.broken > 0:
                    place.broken -= file.is_file()
                    self.send_error(503 if file.is_file() else 404)
                    return
                size, asked = file.stat().st_size, self.headers.get("Range", "")
                if asked and not head:
                    first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
                    content = content[first : last + 1]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                else:
                    self.send_response(200)
                self.send_header("Accept-Ranges", "bytes")
                time = file.stat().st_mtime_ns
                self.send_header(*(("ETag", str(time)) if place.tagged else ("Last-Modified", formatdate(time / 1e9))))
                self.send_header("Content-Length", str(size if head else len(content)))
                self.end_headers()
                self.wfile.write(content)
                place.sent += len(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A table of records with a column that is none of theirs and nine tenths of the file."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    rows = [
        {
            "ecg_path": f"ecg/{i}.npy", "text": json.dumps(["rhythm", f"What is it, {i}?", f"answer {i} " * 20]),
            "patient_id": str(i // 2), "split": "test" if i >= 300 else "train", "image": f"{i}" * 2000,
        }
        for i in range(ROWS)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=GROUP, compression="none", use_dictionary=["split"])
    found = Place(tmp_path)
    yield found
    found.server.shutdown()
    found.server.server_close()


def records(name: str, root: Path, split: Split = "train", val_fraction: float = 0.0) -> Any:
    data = resolve(default_config()).data
    return load_records(replace(data, names=(name,), root=str(root), val_fraction=val_fraction), split, 0)


def test_rows_are_those_of_the_file_and_only_what_is_asked_for_is_fetched(place: Place, tmp_path: Path) -> None:
    size = (tmp_path / "a.parquet").stat().st_size
    there, here = records(f"{place.url}/a.parquet", tmp_path), records("a.parquet", tmp_path)
    assert len(there) == len(here) == 300 and place.sent < size / 20
    for i in (7, 3, 299, 120):
        assert replace(there[i], id="") == replace(here[i], id="") and there[i].id.endswith(f":{i}")
    before = place.sent
    assert there[8].text == here[8].text and place.sent == before, "its row group is there"
    assert before < size / 8
    again = pickle.loads(pickle.dumps(there))  # as a loader's process has it
    assert again[3] == there[3] and place.sent - before < size / 20, "the rest is kept on disk"


def test_a_run_has_the_records_and_the_plan_of_the_same_file_on_disk(place: Place, tmp_path: Path) -> None:
    data = replace(resolve(default_config()).data, perturb="only_text", root=str(tmp_path))
    text, signal = text_spec(data, "qwen2", 1, "sft", ()), signal_spec(data, 0)
    for split in ("train", "val"):
        both = [records(name, tmp_path, split, 0.2) for name in (f"{place.url}/a.parquet", "a.parquet")]
        there, here = [[(one.text, one.patient, one.ecg_paths) for one in each] for each in both]
        assert there == here and 30 < len(here) < 300
        there, here = [Dataset(each, chat_tokenizer(), text, signal).length_index("system", 0.0) for each in both]
        for name, column in vars(here).items():
            np.testing.assert_array_equal(vars(there)[name], column)


def test_what_is_kept_on_disk_has_a_bound(place: Place, tmp_path: Path) -> None:
    table = RemoteTable(f"{place.url}/a.parquet", 40_000)
    for i in range(0, ROWS, 10):
        assert table[i]["patient_id"] == str(i // 2)
    kept = [path.stat().st_size for path in (tmp_path / "cache/elm_jax/row_groups").glob("*.arrow")]
    assert 1 <= len(kept) < ROWS // GROUP and sum(kept) <= 40_000


def test_another_process_may_make_room_and_what_was_half_written_goes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, taken = remote.keep, []

    def taken_away(*given: Any) -> Path:
        taken.append(keep(*given))
        if len(taken) == 1:
            taken[0].unlink()
        return taken[-1]

    monkeypatch.setattr(remote, "keep", taken_away)
    folder = tmp_path / "cache/elm_jax/row_groups"
    folder.mkdir(parents=True)
    for name in (".old", ".new"):
        (folder / name).touch()
    os.utime(folder / ".old", (0, 0))
    assert RemoteTable(f"{place.url}/a.parquet", 1)[0]["ecg_path"] == "ecg/0.npy" and len(taken) == 2
    assert {path.name for path in folder.iterdir()} == {".new", taken[-1].name}


def test_files_are_in_the_order_that_they_have_on_disk(place: Place, tmp_path: Path) -> None:
    content, system = (tmp_path / "a.parquet").read_bytes(), fsspec.filesystem("memory")
    for name in ("set/a-b/1.parquet", "set/a/1.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
        system.pipe(f"/{name}", content)
    here = [Path(where).relative_to(tmp_path).as_posix() for where, _, _ in file_tables(tmp_path / "set")]
    assert [where.removeprefix("/") for where, _, _ in remote_tables("memory://set", 1e9)] == here
    system.rm("/set", recursive=True)


def test_columns_are_fetched_without_the_rest_of_the_rows(place: Place, tmp_path: Path) -> None:
    there, before = records(f"{place.url}/a.parquet", tmp_path), place.sent
    part = there._rows[0].part
    assert list(part.values("patient_id")) == [str(i // 2) for i in range(300)]
    assert next(part.values("label")) is None
    assert place.sent - before < (tmp_path / "a.parquet").stat().st_size / 50
    assert not (tmp_path / "cache/elm_jax/row_groups").exists()


def test_a_file_that_its_place_knows_by_its_time_alone_may_not_change(place: Place, tmp_path: Path) -> None:
    place.tagged = False
    table = RemoteTable(f"{place.url}/a.parquet", 1e9)
    os.utime(tmp_path / "a.parquet", (0, 0))
    table._file = None
    with pytest.raises(UserError, match="another file than before"):
        table[0]


def test_trouble_is_waited_out_and_then_told(place: Place, tmp_path: Path) -> None:
    table = RemoteTable(f"{place.url}/a.parquet", 1e9)
    sent = pickle.dumps(table)  # as a loader's process gets it
    table._file = None
    place.broken = 1
    assert table[0]["ecg_path"] == "ecg/0.npy"
    place.broken = 1000
    with pytest.raises(Absent, match="no way to its rows"):
        table[GROUP]
    place.broken = 0
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "b.parquet").replace(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="another file than before"):
        table[GROUP]
    with pytest.raises(UserError, match="another file than before"):
        pickle.loads(sent)
    with pytest.raises(UserError, match="no such file"):
        RemoteTable(f"{place.url}/nowhere.parquet", 1e9)
