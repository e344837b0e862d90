"""Reports: cleaned as MERL's and ECG-Chat's, with and without their faults, and what `prepare` makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import wfdb
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from elm_jax.data.prepare import translation
from elm_jax.data.prepare.runner import REPORT_QUESTION
from elm_jax.data.prepare.translation import Translator
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.prepare import main
from elm_jax.text.reports import clean_report, measured, merl_stripped, wave_text


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden("waveform_text") / "cases.json").read_text())


@pytest.fixture(scope="module")
def given(cases):
    """The statements of each report; empty cells are no statements."""
    return [[said for said in row if said is not None] for row in cases["ecg_chat_reports"]["reports_in"]]


def test_as_merls_notebook_and_class_do_by_name(cases, given):
    kept = [row["total_report"] * row["kept"] for row in cases["merl"]["notebook"]]
    assert [clean_report(said, "merl", published=True) for said in given] == kept
    assert [merl_stripped(said) for said in given] == cases["merl"]["dataset_class_text"]


@pytest.mark.parametrize("wave", [False, True])
def test_as_ecg_chat_does_by_name_with_its_wave_text(cases, given, wave):
    expected = {
        int(row["study"]) - 40000000: row["text"]
        for rows in cases["ecg_chat_reports"][f"wfep_{wave}"].values()
        for row in rows
    }
    common = {"PR_Interval": 150, "QRS_Complex": 90, "QT_Interval": 380, "QTc_Interval": 420}
    peaks = {"P_Wave_Peak": 1, "R_Wave_Peak": 2, "T_Wave_Peak": 3}
    for number, said in enumerate(given):
        text = clean_report(said, "ecg_chat", published=True)
        if wave and text:
            text += wave_text({"RR_Interval": 800 + number, **common, **peaks})
        assert text == expected.get(number, "")


def test_wave_text_is_ecg_chats(cases):
    for case in cases["wave_text"].values():
        assert wave_text({key: float("nan") if x is None else x for key, x in case["in"].items()}) == case["out"]
    for case in cases["waveform"].values():
        if "text" in case:
            assert wave_text(case["values"]) == case["text"]


@pytest.mark.parametrize(
    ("way", "said", "ours", "theirs"),
    [
        ("merl", ["*** Made without age ***", "Sinus rhythm"], "made without age. sinus rhythm.",
         "made without age ***. sinus rhythm."),
        ("merl", ["--- Poor quality, please repeat"], "poor quality, please repeat.", " poor quality, please repeat."),
        ("merl", ["Ekg within normal limits"], "ecg within normal limits.", "ekg within normal limits."),
        ("merl", [" ", "Normal sinus rhythm seen"], "normal sinus rhythm seen.", ". normal sinus rhythm seen."),
        ("merl", ["*** Sinus ***", "=== rhythm ==="], "", "sinus ***. === rhythm ."),  # marks are no words
        ("merl", ["normal ecg, sinus rhythm."], "normal ecg, sinus rhythm.", "normal ecg, sinus rhythm.."),
        ("ecg_chat", ["Within limits", "LBBB"], "within limits left bundle branch block",
         "within limyocardial infarctionts light bundle branch block"),
        ("ecg_chat", ["Intraventricular conduction defect"], "intraventricular conduction defect", ""),
        ("ecg_chat", ["One PVC", "EKG"], "one ventricular premature complex ecg", "one pvc ekg"),
        ("ecg_chat", ["Old MI - age undetermined", "*** Abnormal ***"], "old myocardial infarction abnormal",
         "old myocardial infarction  abnormal "),
    ],
)  # fmt: skip
def test_each_fault_is_mended(way, said, ours, theirs):
    assert clean_report(said, way) == ours
    assert clean_report(said, way, published=True) == theirs


def test_what_a_machine_measured_in_words():
    assert wave_text(measured(659, 40, 170, 258, 518)) == " RR: 659 PR: 130 QRS: 88 QT/QTc: 348/429"
    assert wave_text(measured(None, None, 170, 258, 518)) == " QRS: 88 QT: 348"
    assert wave_text(measured(659, 200, 170, 170, None)) == " RR: 659"


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def write_record(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(number).normal(size=(1000, 12))
    wfdb.wrsamp(path.name, fs=500, units=["mV"] * 12, sig_name=list(LEADS), fmt=["16"] * 12, p_signal=signal,
                write_dir=str(path.parent))  # fmt: skip


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    raw = tmp_path_factory.mktemp("mimic")
    paths = [f"files/p1/p{i}/s{i}/{i}" for i in (1, 2, 3)]
    for number, path in enumerate(paths):
        write_record(raw / path, number)
    header = ["subject_id", "study_id", *(f"report_{i}" for i in range(18))]
    measures = ["rr_interval", "p_onset", "qrs_onset", "qrs_end", "t_end"]
    said = (["Sinus rhythm", "*** Normal EKG ***"], ["Analysis error"], ["Atrial fibrillation", "LBBB is present"])
    values = ("800,40,160,250,560", "800,40,160,250,560", "600,29999,160,250,29999")
    lines = [",".join([*header, *measures])]
    for i, (statements, numbers) in enumerate(zip(said, values, strict=True), 1):
        lines.append(",".join([str(i), str(i), *statements, *[""] * (18 - len(statements)), numbers]))
    (raw / "machine_measurements.csv").write_text("\n".join(lines))
    listed = [f"{i},{i},{path}" for i, path in enumerate(paths, 1)]
    (raw / "record_list.csv").write_text("\n".join(["subject_id,study_id,path", *listed]))
    return raw


def prepare(name: str, raw: Path, out: Path, *flags: str) -> int:
    return main([name, "--raw", str(raw), "--out", str(out), "--segment-len", "500", "--workers", "1", *flags])


def test_reports_are_written_clean_and_with_measures_and_what_is_left_out_is_listed(mimic, tmp_path):
    prepare("mimic_iv", mimic, tmp_path, "--clean-reports", "ecg_chat", "--wave-text")
    found = [row["report"] for row in rows(tmp_path / "mimic_iv_records.parquet")]
    first = "sinus rhythm normal ecg RR: 800 PR: 120 QRS: 90 QT/QTc: 400/447"
    assert found == [first, "", "atrial fibrillation left bundle branch block is present RR: 600 QRS: 90"]
    told = rows(tmp_path / "mimic_iv_reports.parquet")[0]
    assert json.loads(told["text"])[0]["value"] == REPORT_QUESTION and json.loads(told["text"])[1]["value"] == first
    content = np.load(tmp_path / told["ecg_path"], allow_pickle=True).item()
    assert content["report"] == first
    report = json.loads((tmp_path / "mimic_iv_report.json").read_text())
    assert report["reports_left_out"] == {"files/p1/p2/s2/2": "Analysis error"} and report["without_report"] == 1
    with pytest.raises(UserError, match="reports as-is, cleaned as ecg_chat, wave text; expected reports as-is;"):
        prepare("mimic_iv", mimic, tmp_path)


def test_reports_are_as_they_were_written_unless_it_is_asked_for(mimic, tmp_path):
    prepare("mimic_iv", mimic, tmp_path)
    found = [row["report"] for row in rows(tmp_path / "mimic_iv_records.parquet")]
    assert found == ["Sinus rhythm *** Normal EKG ***", "Analysis error", "Atrial fibrillation LBBB is present"]
    prepare("mimic_iv", mimic, tmp_path / "p", "--clean-reports", "merl", "--compat", "published_report_cleaning")
    found = [row["report"] for row in rows(tmp_path / "p" / "mimic_iv_records.parquet")]
    assert found == ["sinus rhythm. *** normal ecg.", "", "atrial fibrillation. lbbb is present."]


@pytest.fixture(scope="module")
def ptb_xl(tmp_path_factory):
    raw = tmp_path_factory.mktemp("ptb_xl")
    lines = ["ecg_id,patient_id,report,scp_codes,strat_fold,filename_lr,filename_hr"]
    codes = ("{'SR': 0.0, 'LVH': 50.0, 'NORM': 100.0}", "{'ODD': 0.0}", "{'ABQRS': 0.0, 'SR': 0.0}")
    said = ("sinusrhythmus normales ekg", "", "sinusrhythmus")
    for i, (text, code) in enumerate(zip(said, codes, strict=True), 1):
        write_record(raw / f"records500/00000/{i:05d}_hr", i)
        lines.append(f'{i},{i}.0,{text},"{code}",{i},,records500/00000/{i:05d}_hr')
    (raw / "ptbxl_database.csv").write_text("\n".join(lines))
    statements = [
        ",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass",
        "NORM,normal ECG,1.0,,,NORM,NORM", "LVH,left ventricular hypertrophy,1.0,,,HYP,LVH",
        "ABQRS,abnormal QRS,,1.0,,,", "SR,sinus rhythm,,,1.0,,",
    ]  # fmt: skip
    (raw / "scp_statements.csv").write_text("\n".join(statements))
    return raw


def test_statements_have_english_names_the_likeliest_first(ptb_xl, tmp_path):
    prepare("ptb_xl", ptb_xl, tmp_path, "--report-language", "statements")
    found = [row["report"] for row in rows(tmp_path / "ptb_xl_records.parquet")]
    assert found == ["normal ECG. left ventricular hypertrophy. sinus rhythm", "", "abnormal QRS. sinus rhythm"]
    report = json.loads((tmp_path / "ptb_xl_report.json").read_text())
    assert report["unknown_codes"] == {"ODD": "first in records500/00000/00002_hr"}


@pytest.mark.parametrize(
    ("name", "flags", "found"),
    [
        ("ptb_xl", ["--wave-text"], "--wave-text: found a dataset without them"),
        ("mimic_iv", ["--report-language", "statements"], "invalid choice: 'statements'"),
        ("ptb_xl", ["--clean-reports", "mrl"], "invalid choice: 'mrl'"),
        ("ptb_xl", ["--compat", "published_report"], "did you mean 'published_report_cleaning'"),
    ],
)
def test_what_cannot_be_done_is_one_line(mimic, ptb_xl, tmp_path, name, flags, found):
    with pytest.raises(UserError, match=found):
        prepare(name, mimic if name == "mimic_iv" else ptb_xl, tmp_path, *flags)


def test_a_table_says_what_is_known_of_the_recordings_of_a_folder(tmp_path):
    raw = tmp_path / "raw"
    for number, path in enumerate(("a/one", "a/two", "b/three")):
        write_record(raw / path, number)
    (raw / "known.csv").write_text(
        "file,finding,more,person,split\na/one.dat,Sinus rhythm,EKG is normal,7,test\nthree,AF,,7.0,test\n"
        "a/one,again,,,\nfour,,,,\n"
    )
    flags = ["--table", str(raw / "known.csv"), "--patient-column", "person", "--clean-reports", "merl"]
    prepare("folder", raw, tmp_path, "--path-column", "file", "--report-columns", "finding,more", *flags)
    found = [(row["patient_id"], row["report"], row["split"]) for row in rows(tmp_path / "folder_records.parquet")]
    assert found[0] == ("7", "sinus rhythm. ecg is normal.", "test") and found[2] == ("7", "", "test")
    assert found[1][:2] == ("folder:a_two", "")
    report = json.loads((tmp_path / "folder_report.json").read_text())
    assert list(report["missing"]) == ["four"] and len(report["listed_twice"]) == 1 and not report["unreadable"]
    with pytest.raises(UserError, match="no column path among file, finding, .* name it with --path-column"):
        prepare("folder", raw, tmp_path / "o", *flags)
    write_record(raw / "b/one", 9)
    (raw / "known.csv").write_text("path,report\none,Sinus rhythm\n")
    with pytest.raises(UserError, match="'one', which may be a/one or b/one"):
        prepare("folder", raw, tmp_path / "o", *flags[:2])


def test_names_with_dots_are_names_and_what_a_table_lacks_is_told(tmp_path):
    """A part behind a dot is no ending unless a format has it; a table of patients alone is one, too."""
    raw, known = tmp_path / "raw", tmp_path / "raw/known.csv"
    write_record(raw / "ward", 1)
    (raw / "ward.hea").rename(raw / "ward.0001.hea")
    for number in (2, 3):
        np.save(raw / f"ward.000{number}.npy", np.random.default_rng(number).normal(size=(12, 500)))
    known.write_text("path,who,patient_id\nward.0001,7,1\nward.0002.npy,7,2\nward.0003,8,3\nward.0004,9,4\n")

    def patients(folder, *flags):
        prepare("folder", raw, tmp_path / folder, "--table", str(known), *flags)
        return [row["patient_id"] for row in rows(tmp_path / folder / "folder_records.parquet")]

    assert patients("a", "--patient-column", "who") == ["7", "7", "8"]
    assert patients("b", "--report-columns", "") == ["1", "2", "3"]
    report = json.loads((tmp_path / "b/folder_report.json").read_text())
    assert list(report["missing"]) == ["ward.0004"] and report["without_report"] == 3
    for kind in ("reports", "questions"):  # of which prepare says that it wrote one
        (tmp_path / f"b/folder_{kind}.parquet").touch()
    report["tables"]["folder_reports.parquet"] = {}
    (tmp_path / "b/folder_report.json").write_text(json.dumps(report))
    assert patients("b", "--report-columns", "") == ["1", "2", "3"]
    assert {path.name for path in (tmp_path / "b").glob("*.parquet")} == {
        "folder_records.parquet",
        "folder_questions.parquet",
    }
    with pytest.raises(UserError, match="segments made with table .* give another --out"):
        patients("a")
    with pytest.raises(UserError, match="segments made with assumed_unit None; expected assumed_unit uV"):
        patients("b", "--report-columns", "", "--assume-unit", "uV")
    for flag, fix in (("--patient-column", "name it with --patient-column"), ("--report-columns", "--report-columns")):
        with pytest.raises(UserError, match=f"no column nobody among path, who, patient_id; .* {fix}"):
            patients("c", flag, "nobody")


def words(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, made here."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate([*more, *letters])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """Of random weights: "t5", which makes one text of another, "gpt2", which continues texts, "bert", neither."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("translators"), words("<pad>", "</s>")
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    started: dict[str, Any] = {**ends, "decoder_start_token_id": 0}
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **started)
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=512, **ends)
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    kinds = {"t5": T5ForConditionalGeneration(t5), "gpt2": GPT2LMHeadModel(gpt2), "bert": BertModel(bert)}
    for name, model in kinds.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(translation, "_MOST_NEW", 6)


def test_reports_are_translated_once_and_a_second_run_goes_on(ptb_xl, translators, tmp_path, few_tokens, monkeypatch):
    prepare("ptb_xl", ptb_xl, tmp_path / "a", "--translator", str(translators / "t5"))
    first = [row["report"] for row in rows(tmp_path / "a" / "ptb_xl_records.parquet")]
    assert first[0] and first[1] == "" and not set(first) & {"sinusrhythmus", "sinusrhythmus normales ekg"}
    cache = tmp_path / "a" / "translations.jsonl"
    lines = [line for line in cache.read_text().splitlines() if line]
    assert {json.loads(line)["of"] for line in lines} == {"sinusrhythmus", "sinusrhythmus normales ekg"}
    report = json.loads((tmp_path / "a" / "ptb_xl_report.json").read_text())
    assert report["translations_cut_off"].keys() == {f"records500/00000/0000{i}_hr" for i in (1, 3)}  # six tokens

    asked = []
    whole = Translator._translate
    monkeypatch.setattr(Translator, "_translate", lambda self, texts: asked.extend(texts) or whole(self, texts))
    prepare("ptb_xl", ptb_xl, tmp_path / "a", "--translator", str(translators / "t5"))
    assert not asked  # nothing is translated twice
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "translations.jsonl").write_text(f"{lines[0]}\n{lines[1][:-9]}")  # stopped as it wrote
    prepare("ptb_xl", ptb_xl, tmp_path / "b", "--translator", str(translators / "t5"))
    assert asked == [json.loads(lines[1])["of"]]
    assert [row["report"] for row in rows(tmp_path / "b" / "ptb_xl_records.parquet")] == first
    with pytest.raises(UserError, match="found segments made with reports translated by"):
        prepare("ptb_xl", ptb_xl, tmp_path / "a", "--translator", str(translators / "gpt2"))


def test_a_causal_model_is_asked_by_its_template_or_by_the_prompt(translators, tmp_path, few_tokens):
    translator = Translator(translators / "gpt2", tmp_path / "c.jsonl", progress=False)
    assert translator._asked(["ekg"]) == (["German: ekg\nEnglish:"], False)
    assert set(translator(["ekg", "sinusrhythmus"])) == {"ekg", "sinusrhythmus"}
    translator._tokenizer.batch_decode = lambda *_, **__: [" AF\nGerman: e"]  # six tokens, without an end
    assert translator._translate(["vhf"]) == [("AF", True)]
    translator._tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert translator._translate(["vhf"]) == [("AF German: e", False)]
    assert translator._asked(["ekg"])[0] == ["[Translate this ECG report to English. Answer with the translation alone."
                                             "\n\nekg]"]  # fmt: skip
    said = "messages[0].content[0]"
    translator._tokenizer.chat_template = f"{{{{ {said}.source_lang_code }}}}:{{{{ {said}.text }}}}"
    assert translator._asked(["ekg"])[0] == ["de:ekg"]
    told = Translator(translators / "t5", tmp_path / "c.jsonl", "translate German to English: {report}")
    assert told._asked(["ekg"]) == (["translate German to English: ekg"], False)
    assert told.name != Translator(translators / "t5", tmp_path / "c.jsonl").name


def test_a_translation_does_not_depend_on_what_it_is_translated_with(translators, tmp_path, few_tokens):
    for kind in ("t5", "gpt2"):
        alone = Translator(translators / kind, tmp_path / f"{kind}_alone", progress=False)(["sinusrhythmus"])
        batch = Translator(translators / kind, tmp_path / kind, progress=False)(["sinusrhythmus", "ekg", "ü" * 40])
        assert batch["sinusrhythmus"] == alone["sinusrhythmus"]


@pytest.mark.parametrize(
    ("kind", "flags", "found"),
    [
        ("bert", [], "a BertModel; expected a sequence-to-sequence or causal language model"),
        ("none", [], "none without config.json"),
        ("t5", ["--translator-prompt", "to English:"], "a text with {report} in it"),
        ("t5", ["--report-language", "statements"], "which is English; expected one of them"),
        ("claims", [], "with num_layers=1000000000"),
        ("large", [], r"asks for \d+ numbers where its files hold"),
        ("cut", [], "cut, which cannot be read"),
        ("without", [], "without without a tokenizer"),
    ],
)
def test_a_folder_that_is_no_translator_is_one_line(ptb_xl, translators, tmp_path, kind, flags, found):
    folder = translators / kind
    if kind not in ("bert", "none", "t5"):
        shutil.copytree(translators / "t5", folder := tmp_path / kind)
        if kind == "without":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        elif kind == "cut":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
        else:
            claim = {"num_layers": 10**9} if kind == "claims" else {"d_ff": 10**9}
            told = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(told | claim))
    with pytest.raises(UserError, match=found):
        prepare("ptb_xl", ptb_xl, tmp_path / "out", "--translator", str(folder), *flags)
