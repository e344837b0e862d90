"""What is told of prepared tables: statistics, cards, and the way to the hub."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from texts import chat_tokenizer

from elm_jax import cli
from elm_jax.data.prepare.card import ALL, make_card, push
from elm_jax.data.prepare.stats import table_stats
from elm_jax.errors import UserError
from elm_jax.prepare import main

ASKED = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "sinus rhythm"}]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """As `prepare ptb_xl` leaves it: four windows of two patients, of which one file is gone and one row is twice."""
    folder = tmp_path / "ptb_xl/preprocessed_500"
    folder.mkdir(parents=True)
    paths = [f"ptb_xl/preprocessed_500/{name}_0.npy" for name in "abcd"]
    for path in paths[:3]:
        np.save(tmp_path / path, np.zeros((12, 500), np.float32))
    rows = [
        {"ecg_path": path, "text": json.dumps(ASKED), "name": kind, "patient_id": who, "split": split}
        for path, kind, who, split in zip(
            [*paths, paths[0]], ["rhythm", "rhythm", "axis", "axis", "rhythm"], ["17", "17.0", "18", "18", "17"],
            ["train", "train", "test", "test", "train"], strict=True,
        )
    ]  # fmt: skip
    rows.append({**rows[0], "text": "[]"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ptb_xl_reports.parquet")
    made = {"made_by": "elm_jax 0", "command": "python -m elm_jax.prepare ptb_xl --raw R --out O"}
    report = {"dataset": "ptb_xl", **made, "records": 4, "patients": 2, "rows": {"train": 3}, "flat": {"x": "lead I"}}
    (tmp_path / "ptb_xl_report.json").write_text(json.dumps(report))
    return tmp_path


def test_statistics_tell_what_a_table_holds(out: Path) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    found = table_stats([out], tokenizers={"demo": tokenizer}, progress=False)[str(out / "ptb_xl_reports.parquet")]
    assert (found["rows"], found["repeated"], found["without_conversation"]) == (6, 1, 1)
    assert (found["patients"], found["recordings"], found["missing"]) == (2, 4, 1)
    assert found["splits"] == {"train": 4, "test": 2} and found["types"] == {"rhythm": 4, "axis": 2}
    assert found["leads"] == {"12": 3} and found["hertz"] == {"250": 3} and found["seconds"] == {"2": 3}
    assert found["answers"] == {"sinus rhythm": 5} and found["turns"]["max"] == 2
    assert tokenizer.backend_tokenizer.truncation and tokenizer.backend_tokenizer.padding
    tokens = len(chat_tokenizer().backend_tokenizer.encode("sinus rhythm", add_special_tokens=False).ids)
    told = found["tokens"]["demo"]["answers"]
    assert told["n"] == 5 and told["min"] == told["p50"] == told["max"] == told["mean"] == tokens
    assert sum(count for _, count in told["bins"]) == 5


def test_statistics_are_tables_json_and_a_picture(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(main, ["stats", str(out), "--picture", str(out / "stats.png")]) == 0
    printed = capsys.readouterr().out
    assert "| types | rhythm: 4; axis: 2 |" in printed and (out / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert cli.guard(main, ["stats", str(out / "ptb_xl_reports.parquet"), "--root", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(out / "ptb_xl_reports.parquet")]["missing"] == 1
    assert cli.guard(main, ["stats", str(out), "--picture", "stats.doc"]) == 2
    assert cli.guard(main, ["stats", str(out / "nowhere")]) == 2


def test_a_card_is_read_by_the_hub_s_own_library(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(main, ["card", "--out", str(out)]) == 0
    text = (out / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "cc-by-4.0" and header["size_categories"] == "n<1K"
    assert "\npython -m elm_jax.prepare ptb_xl --raw R --out O\n" in text and "By elm_jax 0;" in text
    assert "| ptb_xl | 4 | 2 | flat 1 |" in text
    assert "| `ptb_xl_reports.parquet` | 6 | 4 | 2 |" in text
    table: Any = datasets.load_dataset(str(out), "ptb_xl_reports", split=ALL, cache_dir=str(out / "cache"))
    assert len(table) == 6 and table.column_names == ["ecg_path", "text", "name", "patient_id", "split"]


def test_what_is_restricted_or_unknown_is_pushed_under_a_named_licence_alone(out: Path) -> None:
    class Nowhere:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise AssertionError("asked")

    def refused(*licences: str) -> str:
        with pytest.raises(UserError) as error:
            push(out, "me/mine", licences, api=Nowhere())
        return str(error.value)

    rows = [{"ecg_path": "mimic_iv/preprocessed_500/p1_0.npy", "text": "x", "split": "train"}]
    pq.write_table(pa.Table.from_pylist(rows), out / "mine.parquet")  # of recordings that lie elsewhere
    assert "mimic_iv, of patients of MIMIC-IV" in refused() and 'give --licence "ODbL 1.0"' in refused("CC BY 4.0")
    assert "asked" in refused("ODbL 1.0")
    rows[0]["ecg_path"] = "clinic/preprocessed_500/1_0.npy"
    pq.write_table(pa.Table.from_pylist(rows), out / "mine.parquet")
    assert "clinic, recordings of your own" in refused() and "asked" in refused("CC0")
    assert "CC0" in make_card(out, ["CC0"]).text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers as the hub does, and what it was sent."""
    seen: dict[str, Any] = {"private": True, "files": set(), "created": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"id": "me/mine", "private": seen["private"], "siblings": [], "tags": []})

        def do_POST(self) -> None:
            address = f"http://{self.headers['Host']}"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                seen["created"].append(json.loads(body))
                return self._answer({"url": f"{address}/datasets/me/mine"})
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                plain = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
                return self._answer({"files": plain})
            if "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                seen["files"] |= {line["value"]["path"] for line in lines if line["key"] == "file"}
            commit = f"{address}/datasets/me/mine/commit/{'0' * 40}"
            self._answer({"commitUrl": commit, "commitOid": "0" * 40, "warnings": [], "errors": []})

        def _answer(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_a_folder_is_pushed_with_its_card_and_nothing_else(out: Path, hub: tuple[str, dict[str, Any]]) -> None:
    address, seen = hub
    for name in (
        "secret.txt",
        "raw/x.parquet",
        "old/mimic_iv/preprocessed_500/x_0.npy",
        "ptb_xl/preprocessed_500/old/x",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    api = huggingface_hub.HfApi(address, token="hf_x")
    assert push(out, "me/mine", api=api)["private"] == "True"
    assert seen["created"][0]["visibility"] == "private" and seen["created"][0]["type"] == "dataset"
    windows = {f"ptb_xl/preprocessed_500/{name}_0.npy" for name in "abc"}
    assert seen["files"] == windows | {"README.md", "ptb_xl_reports.parquet"}
    seen["private"] = False
    with pytest.raises(UserError, match="a public dataset"):
        push(out, "me/mine", api=api)
    assert push(out, "me/mine", public=True, api=api)["private"] == "False"


def test_without_the_hub_the_error_is_one_line(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.guard(main, ["push", str(out), "me/mine"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: hub, me/mine: found no way to push (")
