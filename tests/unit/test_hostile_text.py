"""What files and command lines hold is shown in escapes, and JSON and kept files that are damaged are said in words."""

import json
import logging
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_jax import cli
from elm_jax.config import Config, resolve
from elm_jax.data.kept_features import Features, FeatureWriter
from elm_jax.data.table_files import file_tables
from elm_jax.data.tables import open_source
from elm_jax.errors import UserError, printable
from elm_jax.evaluation.report import plots_of, report
from elm_jax.evaluation.results import asked_with, results_of
from elm_jax.json_text import parse_json
from elm_jax.pictures.page import filled
from elm_jax.pictures.svg import Bar, bars
from elm_jax.run.folder import is_done
from elm_jax.runtime.telemetry import MetricsFile
from elm_jax.scoring.metrics import Scorer
from elm_jax.text.vocabulary import load_tokenizer

HOSTILE = "a\x1b[2J\x00b\x7f\u202ec\u2028d\ud800e\ufffff"
DEEP = "[" * 100_000 + "]" * 100_000
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff\ufffe\uffff]")


# ---- shown in escapes


def test_what_no_terminal_may_get_is_written_in_escapes():
    assert printable("a\x1b[2J\n\x00", "\n") == "a\\x1b[2J\n\\x00"
    assert printable("\u202e\ud800\u2028") == "\\u202e\\ud800\\u2028"
    kept = "größe 正常\u3000窦性 می\u200cخواهم 👩\u200d⚕️ नमस्ते\xa0µV"
    assert printable(kept) == kept


def test_errors_show_no_control_character(capsys):
    def fails(_):
        raise UserError(HOSTILE, HOSTILE, HOSTILE, HOSTILE)

    assert cli.guard(fails, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a\\x1b[2J\\x00b") and not RAW.search(said)


def test_log_lines_show_no_control_character():
    assert logging.lastResort is not None
    cli.guard(lambda _: 0, [])
    shown = logging.lastResort.format(logging.makeLogRecord({"msg": "%s", "args": (HOSTILE,)}))
    assert "\\x1b" in shown and not RAW.search(shown)


def test_pages_and_plots_hold_no_control_character_and_plots_are_xml():
    plot = bars(HOSTILE, [Bar(HOSTILE, 0.5)])
    ElementTree.fromstring(plot)
    told = {"metrics": {}, "signal_dependence": None}
    result = {"evaluation": HOSTILE, "runs": {HOSTILE: told}, "differences": [], "unavailable": {HOSTILE: HOSTILE}}
    whole = filled("compare.html", result=result, plots={HOSTILE: plot}, said=["<b>"])
    assert "<b>" not in whole
    assert "\\x1b" in whole and not RAW.search(whole)
    whole.encode()


# ---- JSON


@pytest.mark.parametrize("text", [DEEP, "9" * 5000, '"\\ud800"', '{"a": "\\uDFFF\\uD800"}', "", "{", "\ud800"])
def test_json_that_is_none_is_a_value_error_in_words(text):
    with pytest.raises(ValueError) as refused:
        parse_json(text)
    assert "set_int_max_str_digits" not in str(refused.value)
    with pytest.raises(ValueError):
        parse_json(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("text", [b'"\xed\xa0\x80"', '"\\ud800"'.encode("utf-16"), '"\ud800"', "[" * 200 + "]" * 200])
def test_no_spelling_brings_half_a_pair_or_what_cannot_be_walked(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_may_be_a_hundred_levels_deep_and_of_any_width():
    assert parse_json(f"[{'[' * 99}{']' * 99}{', {}' * 200}]")[1:] == [{}] * 200


def test_json_with_whole_surrogate_pairs_is_read():
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize("value", [DEEP, "9" * 5000, '"\\ud800"'], ids=["deep", "long number", "half a pair"])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_table_whose_json_cannot_be_read_is_refused_with_its_place(tmp_path, value, ending):
    row = f'{{"ecg_path": "a.npy", "text": {value}}}'
    (tmp_path / f"t{ending}").write_text(f"[{row}]" if ending == ".json" else f"{json.dumps({})}\n{row}\n"[3:])
    with pytest.raises(UserError, match=rf"t\{ending}, line 1"):
        open_source(f"t{ending}", str(tmp_path), 1)


def parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_parquet_file_without_rows_has_no_records(tmp_path):
    parquet(tmp_path / "t.parquet", ecg_path=pa.array([], pa.string()), text=pa.array([], pa.string()))
    with pytest.raises(UserError, match="no records"):
        open_source("t.parquet", str(tmp_path), 1)


@pytest.mark.parametrize("column", ["ecg_path", "text", "name", "patient_id", "split"])
def test_text_in_a_parquet_file_that_is_not_unicode_is_refused(tmp_path, monkeypatch, column):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    good = {name: pa.array(["train"]) for name in ("ecg_path", "text", "name", "patient_id", "split")}
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, 3])), pa.py_buffer(b"\xed\xa0\x80")])
    parquet(tmp_path / "t.parquet", **{**good, column: bad})
    with pytest.raises(UserError, match=r"t\.parquet"):
        open_source("t.parquet", str(tmp_path), 1)


@pytest.mark.parametrize("key", ["data.names", "llm.scratch", "optim.lr", "seed", "workdir"])
@pytest.mark.parametrize("text", ["[" * 3000, "[" * 3000 + "]" * 3000, "(" * 3000, '{"a":' * 900 + "1" + "}" * 900])
def test_brackets_without_end_on_the_command_line_are_a_user_error_or_text(key, text):
    try:
        cli.ConfigFlags.parse([f"--config.{key}={text}"]).over({})
    except UserError as error:
        assert len(str(error)) < 4000


# ---- what a run keeps


@pytest.mark.parametrize("content", ["", "{", DEEP, "[]", '{"total_steps": "x"}', '{"total_steps": null}', "\ud800"])
def test_a_damaged_done_is_one_error(tmp_path, content):
    (tmp_path / "DONE").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="DONE"):
        is_done(tmp_path, 10)


@pytest.mark.parametrize("line", ["", "{", DEEP, "[]", '{"step": "x"}', "7", "\x00"])
def test_a_damaged_line_of_metrics_is_one_error_with_its_place(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        MetricsFile(tmp_path, 5, writes=True)


@pytest.mark.parametrize("content", [b"", b"{", DEEP.encode(), b"[]", b"\xff", b'{"model": 3}'])
def test_a_damaged_tokenizer_is_one_error(tmp_path, content):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place", [slice(0), slice(20_000), slice(None, None, -1)], ids=["empty", "half", "turned"])
def test_a_damaged_copy_of_a_table_is_written_again(tmp_path, monkeypatch, place, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"text {i}" for i in range(2000)]
    file = parquet(tmp_path / "t.parquet", ecg_path=pa.array(["a.npy"] * 2000), text=pa.array(texts))
    list(file_tables(file))
    (kept,) = (tmp_path / "cache").rglob("*.arrow")
    whole = kept.read_bytes()
    kept.write_bytes(whole[place])
    ((_, _, table),) = file_tables(file)
    assert table["text"][:] == texts
    assert kept.read_bytes() == whole and "damaged" in caplog.text


@pytest.mark.parametrize("damaged", [".json", ".rows"])
@pytest.mark.parametrize("content", [b"", b"[", DEEP.encode()])
def test_a_damaged_part_of_kept_features_counts_as_not_there(tmp_path, damaged, content, caplog):
    features = Features(str(tmp_path), (2, 3), "float32")
    for name in ("a", "b"):
        with FeatureWriter(features, [name]) as writer:
            writer.put(np.ones((1, 2, 3)))
    broken = sorted(tmp_path.glob(f"*{damaged}"))[0]
    broken.write_bytes(content)
    found = Features(str(tmp_path), (2, 3), "float32")
    assert [name in found for name in ("a", "b")].count(True) == 1 and "damaged" in caplog.text


def test_a_key_that_holds_a_control_character_is_shown_in_escapes():
    with pytest.raises(UserError) as refused:
        resolve({"data": {"representation": HOSTILE}})
    assert not RAW.search(str(refused.value))


def test_the_list_of_answers_stays_json_whatever_they_hold():
    line = dict.fromkeys(("id", "name", "question", "answer"), HOSTILE) | {"truth": "</script>", "seconds": 1.0}
    facts = {"split": HOSTILE, "step": 3, "bad": 0, "asked_with": asked_with(Config())}
    results = results_of({"real": [line]}, Scorer(), facts, {})
    found = report(HOSTILE, results, plots_of(results), [line], [])
    rows = json.loads(found.partition('id="rows">')[2].partition("</script>")[0])
    assert rows[0][0] == printable(HOSTILE) and rows[0][4] == "</script>" and not RAW.search(found)
