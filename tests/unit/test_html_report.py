"""The report is one file that needs nothing else, and says what metrics.json says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from elm_jax.config import Config
from elm_jax.evaluation.report import plots_of, write_report
from elm_jax.evaluation.report import report as page_of
from elm_jax.evaluation.results import asked_with, results_of, summary
from elm_jax.pictures.svg import Bar, bars
from elm_jax.scoring.metrics import Scorer

VOID = {"meta", "link", "img", "br", "input", "wbr"}


class Page(HTMLParser):
    """Tags that are opened and closed in order, what they load, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.scripts: list[tuple[str | None, str]] = []
        self.pictures = 0
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.pictures += tag == "img"
        self.ids.add(known.get("id") or "")
        self.loads += [known[key] for key in ("src", "href", "action", "data", "srcset") if known.get(key)]
        if tag == "script":
            self.scripts.append((known.get("type"), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def shown(results) -> str:
    return page_of("t", results, plots_of(results), [], [])


FACTS = {"split": "test", "step": 3, "bad": 0, "asked_with": asked_with(Config())}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    from fake_model import fake_config

    from elm_jax.data.dataset import Dataset, text_spec
    from elm_jax.data.demo import demo_tokenizer
    from elm_jax.data.sources import load_records
    from elm_jax.data.specs import signal_spec

    config = fake_config(data__names=["demo:train=8,val=4,test=2"])
    dataset = Dataset(load_records(config.data, "test", 0), demo_tokenizer(),
                      text_spec(config.data, "qwen2", 1, "sft", ()), signal_spec(config.data, 0))  # fmt: skip
    lines = [
        {"id": f"{r.id}#0", "name": r.name, "patient": r.patient, "question": "a<b & </script>?", "prompt": "<signal>",
         "answer": "ecg<script>" if i % 2 else "ecg", "truth": "ecg" if i % 3 else "noise", "seconds": 0.1}
        for i, r in enumerate(dataset.records)
    ]  # fmt: skip
    kept = {"answers": 6, "own_ecg": 1, "same_patient": 2}
    facts = {**FACTS, "labels_bad": 4, "shuffled_ecgs": kept}
    results = results_of({"real": lines, "zeros": [{**line, "answer": ""} for line in lines]}, Scorer(), facts, {})
    out = tmp_path_factory.mktemp("run") / "eval" / "demo-test"
    out.mkdir(parents=True)
    write_report(out, results, lines, dataset)
    return out


def test_the_page_loads_nothing_and_is_well_formed(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.pictures > 0
    assert [load[:40] for load in page.loads if not load.startswith(("data:", "#"))] == []
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"data:[^\"]*", "", text)), "an address of the network"
    assert "@import" not in text and "url(" not in text and "default-src 'none'" in text
    assert {load[1:] for load in page.loads if load.startswith("#")} <= page.ids, "a link to nowhere"


def test_the_page_says_what_was_left_out_of_labels_and_what_could_not_be_shuffled(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "4 more recordings left out of the labels" in text
    assert "of 6 answers 1 are about the question&#39;s own ECG and 2 about another one of the same patient" in text


def test_what_models_say_is_no_markup(report):
    text = (report / "report.html").read_text()
    assert "ecg<script>" not in text and "a&lt;b &amp; &lt;/script&gt;?" in text
    data = [body for kind, body in Page(text).scripts if kind == "application/json"]
    rows = json.loads(data[0])
    assert rows[1][3] == "ecg<script>" and rows[1][2] == "a<b & </script>?"


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here to read the script with")
def test_the_script_is_javascript_and_finds_its_elements(report, tmp_path):
    page = Page((report / "report.html").read_text())
    (script,) = [body for kind, body in page.scripts if kind is None]
    (tmp_path / "script.js").write_text(script)
    subprocess.run(["node", "--check", str(tmp_path / "script.js")], check=True)
    assert set(re.findall(r'by\("(\w+)"\)', script)) | {"kind", "mark"} <= page.ids


def test_benchmarks_are_tables_of_numbers_with_intervals():
    lines = [{"id": str(i), "name": "ptb-test", "truth": "NORM", "answer": "NORM"} for i in range(4)]
    text = shown(results_of({"real": lines}, Scorer(), FACTS, {}))
    assert "<td>4</td>" in text and "0.000 <small>[0.000, 0.000]</small>" in text and "&lt;" not in text
    assert "exact_<wbr>match, majority" in text


def test_right_and_wrong_confusions_have_colours_of_their_own(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    blue, orange = "47,93,155", "217,122,30"
    rows = re.findall(r"<tr><th>(ecg|noise)</th>(.*?)</tr>", text, re.DOTALL)
    columns = ["ecg", "noise", "Other"]
    for truth, cells in rows:
        shown = re.findall(r"<td(.*?)>(\d*)<", cells)[: len(columns)]
        for column, (style, count) in zip(columns, shown, strict=True):
            colour = blue if column == truth else orange
            assert (f"rgba({colour}," in style) if count else not style, (truth, column)
    assert rows and f"rgba({orange}," in text and f"rgba({blue}," in text


def test_what_is_absent_is_said_in_a_line_where_its_score_would_be(report, monkeypatch):
    text = (report / "report.html").read_text(encoding="utf-8")
    scores = text.index('<h2 id="s0">')
    assert text.index("no meteor: ") > scores, "not before all else"
    line = re.findall(r"<p>(no meteor: .*?)</p>", text)[0]
    assert "python -m nltk.downloader wordnet" in line and len(line) < 250 and "nltk_data" not in line


def test_tables_fit_a_page_and_a_p_is_never_zero(report):
    lines = [{"id": str(i), "name": "x", "truth": "yes", "answer": "yes", "patient": str(i)} for i in range(1500)]
    results = results_of({"real": lines, "zeros": [line | {"answer": "no"} for line in lines]}, Scorer(), FACTS, {})
    assert results["signal_dependence"]["mcnemar_p"] == 0.0, "too small for a float"
    assert "<td>&lt; 0.0001</td>" in shown(results) and "<td>0</td>" not in shown(results)
    assert "heart_<wbr>rate.<wbr>within_<wbr>5_<wbr>bpm" in (report / "report.html").read_text(encoding="utf-8")


def test_few_patients_are_said_where_p_is(report):
    lines = [{"id": str(i), "name": "x", "truth": "yes", "answer": "yes", "patient": str(i % 5)} for i in range(25)]
    results = results_of({"real": lines, "zeros": [line | {"answer": "no"} for line in lines]}, Scorer(), FACTS, {})
    assert results["signal_dependence"]["p"] == results["signal_dependence"]["least_p"] == 2 / 2**5
    for text in (shown(results), summary(results)):
        assert "p 0.062 (with so few patients it is at least 0.062)" in text


def test_plots_are_svg_files_of_their_own(report):
    found = sorted(path.name for path in (report / "plots").iterdir())
    assert {"scores.svg", "dependence.svg"} <= set(found)
    for name in found:
        assert xml.parse(report / "plots" / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_plots_of_an_earlier_scoring_do_not_stay(tmp_path):
    lines = [{"id": "0", "name": "x", "answer": "a", "truth": "b", "question": "", "prompt": "", "seconds": 0.1}]
    out, nobody = tmp_path / "eval" / "demo-test", SimpleNamespace(records=[])
    out.mkdir(parents=True)
    for answer, names in (("a", {"scores.svg", "wrong_x.svg"}), ("b", {"scores.svg"})):
        lines[0]["answer"] = answer
        results = results_of({"real": lines}, Scorer(), FACTS, {})
        write_report(out, results, lines, nobody)
        assert {path.name for path in (out / "plots").iterdir()} == names


def test_a_bar_is_as_long_as_its_value_and_its_interval_lies_about_it():
    root = xml.fromstring(bars("t", [Bar("half", 0.5, (0.4, 0.6)), Bar("one", 1.0)]))
    widths = [float(rect.attrib["width"]) for rect in root.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert "half" in "".join(root.itertext()) and "[0.400, 0.600]" in "".join(root.itertext())


BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here; set CHROMIUM to one")
def test_a_browser_opens_it_without_errors_or_network(report, tmp_path):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
               "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run",
               "--disable-background-networking", "--disable-component-update"]  # fmt: skip
    done = subprocess.run([str(BROWSER), *options, (report / "report.html").as_uri()], capture_output=True, text=True,
                          timeout=240)  # fmt: skip
    assert not re.search(r"CONSOLE|Uncaught|Refused", done.stderr), done.stderr[-3000:]
    lines = len(json.loads(re.findall(r'id="rows">(.*?)</script>', done.stdout, re.DOTALL)[0]))
    assert f'<span id="hits">{lines} of {lines}</span>' in done.stdout, "the script ran: the list is filled"
    assert len(re.findall(r"<figure(?![^>]*hidden)", done.stdout)) == 1, "one example at a time"
