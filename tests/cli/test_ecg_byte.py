"""The command `ecg_byte`: what it prints, leaves and refuses, as a user meets it."""

import json
import os
import pickle
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import wfdb
from PIL import Image

from elm_jax import cli
from elm_jax.ecg.recording import LEADS, read_ecg, to_segment
from elm_jax.ecg_byte import main
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.corpus import Form, find_recordings

ROOT = Path(__file__).resolve().parents[2]
FORM = ("--segment-len", "400")
_needs_sklearn = pytest.mark.skipif(find_spec("sklearn") is None, reason="no scikit-learn")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twelve recordings: ten .npy files, in folders, and two WFDB records at 500 Hz."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    time_of = np.arange(500) / 250
    for i in range(10):
        place = folder / f"part{i % 2}"
        place.mkdir(exist_ok=True)
        beats = np.sin(2 * np.pi * (1 + i / 10) * time_of) ** 9
        np.save(place / f"{i}.npy", (beats + 0.05 * rng.normal(size=(12, 500))).astype(np.float32))
    for i in (1, 2):
        wfdb.wrsamp(
            f"{i:05d}_hr", fs=500, units=["mV"] * 12, sig_name=list(LEADS), fmt=["16"] * 12,
            p_signal=rng.normal(size=(1000, 12)).cumsum(0), write_dir=str(folder),
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tok(recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("tok") / "tok.json"
    assert cli.guard(main, ["train", str(recordings), *FORM, "--num-merges", "60", "--out", str(out)]) == 0
    return out


def _run(*arguments: object) -> int:
    return cli.guard(main, [str(argument) for argument in arguments])


# --- train -------------------------------------------------------------------------------------------------


def test_train_as_a_command_leaves_a_tokenizer_and_says_what_it_did(recordings, tmp_path):
    command = [sys.executable, "-m", "elm_jax.ecg_byte", "train", recordings, *FORM, "--num-merges", "40"]
    done = subprocess.run([*command, "--out", tmp_path / "new" / "t.json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "recordings: 12 of 12 (random, seed 0)"
    assert lines[1] == (
        "memory: about 0.0012 GB (20 bytes for each of 57600 symbols; two or three times that for noise or few ECGs)"
    )
    assert "merges: 40" in lines
    assert lines[-2].startswith("symbols for each token: ") and lines[-2].endswith("(merges), on 12 of the recordings")
    assert lines[-1].startswith("error of decoding: RMS ") and "%" in lines[-1]
    made = EcgByte.load(tmp_path / "new" / "t.json")
    assert len(made.merges) == 40
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "t.json"]


def test_the_merges_are_those_of_the_segments_and_the_file_says_all_that_decides_them(recordings, tok):
    made = EcgByte.load(tok)
    paths = sorted(recordings.rglob("*.npy")) + sorted(recordings.glob("*.hea"))
    letters = [EcgByte([]).to_symbols(to_segment(read_ecg(path), 250, 400)) for path in paths]
    assert made.merges == EcgByte.train(letters, 60).merges
    assert made.settings.pop("corpus_sha256")
    tokens = made.settings.pop("tokens")
    assert 0 < tokens < 57600
    assert made.settings == {
        "sampling_rate": 250.0, "segment_len": 400, "leads": list(LEADS), "files": 12, "unreadable": 0,
        "sample": "random", "seed": 0, "num_merges": 60, "records": 12, "across_records": False, "symbols": 57600,
    }  # fmt: skip
    assert str(recordings) not in tok.read_text()


@pytest.mark.parametrize("sample", ["random", pytest.param("stratified", marks=_needs_sklearn)])
def test_a_sample_is_that_of_its_seed_wherever_the_recordings_lie(recordings, tmp_path, sample):
    (tmp_path / "elsewhere").symlink_to(recordings)
    flags = (*FORM, "--records", 5, "--num-merges", 20, "--sample", sample)
    for name, place, seed, threads in (
        ("a", recordings, 3, 1), ("b", tmp_path / "elsewhere", 3, 4), ("c", recordings, 4, 1),
    ):  # fmt: skip
        out = tmp_path / f"{name}.json"
        assert _run("train", place, *flags, "--seed", seed, "--threads", threads, "--out", out) == 0
    a, b, c = ((tmp_path / f"{name}.json").read_bytes() for name in "abc")
    assert a == b and a != c
    settings = EcgByte.load(tmp_path / "a.json").settings
    assert settings["records"] == 5 and settings["files"] == 12
    if sample == "stratified":
        assert sum(settings["kinds"]["sizes"]) == 12


def test_leads_rate_lists_and_merges_across_records_are_as_asked(recordings, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{recordings / 'part0'}\n{recordings / '00001_hr.hea'}\n")
    flags = ("--leads", "V1,II", "--sampling-rate", 125, "--segment-len", 200, "--across-records", "--num-merges", 15)
    assert _run("train", tmp_path / "list.txt", *flags, "--out", tmp_path / "t.pkl") == 0
    printed = capsys.readouterr().out
    assert "recordings: 6 of 6" in printed and "of 2400 symbols" in printed
    assert "(lost, as a .pkl has no settings: sampling_rate, segment_len, leads" in printed
    paths = sorted((recordings / "part0").glob("*.npy")) + [recordings / "00001_hr.hea"]
    letters = [EcgByte([]).to_symbols(to_segment(read_ecg(path), 125, 200)[[6, 1]]) for path in paths]
    assert EcgByte.load(tmp_path / "t.pkl").merges == EcgByte.train(letters, 15, across_records=True).merges


def test_unreadable_recordings_are_left_out_named_and_bounded(recordings, tmp_path, capsys):
    np.save(tmp_path / "nan.npy", np.full((12, 500), np.nan))
    np.save(tmp_path / "short.npy", np.ones((12, 10)))
    flags = (recordings, tmp_path, *FORM, "--num-merges", 5, "--out", tmp_path / "t.json")
    assert _run("train", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "nan.npy: found nan" in error and "--max-bad-records" in error
    assert not (tmp_path / "t.json").exists()
    assert _run("train", *flags, "--max-bad-records", 0.2) == 0
    assert "unreadable: 2 recordings, named in" in capsys.readouterr().out
    log = (tmp_path / "t.unreadable.txt").read_text().splitlines()
    assert [Path(line.split("\t")[0]).name for line in log] == ["nan.npy", "short.npy"]
    settings = EcgByte.load(tmp_path / "t.json").settings
    assert settings["unreadable"] == 2 and settings["records"] == 12


@pytest.mark.parametrize("sample", ["random", pytest.param("stratified", marks=_needs_sklearn)])
def test_broken_recordings_alone_teach_nothing_however_few_of_them_are_sampled(tmp_path, capsys, sample):
    for i in range(300):
        (tmp_path / f"{i}.npy").write_bytes(b"broken")
    flags = ("--sample", sample, "--records", 2, "--max-bad-records", 0.4, "--out", tmp_path / "t.json")
    assert _run("train", tmp_path, *flags) == 2
    assert (
        f"({'1 of 2' if sample == 'random' else '121 of 300'} recordings unreadable)"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_sample_is_filled_up_from_the_recordings_that_it_left_out(recordings, tmp_path, threads):
    for i in range(6):
        np.save(tmp_path / f"nan{i}.npy", np.full((12, 500), np.nan))
    flags = ("--records", 9, "--max-bad-records", 0.9, *FORM, "--num-merges", 20, "--threads", threads)
    assert _run("train", recordings, tmp_path, *flags, "--out", tmp_path / "t.json") == 0
    made = EcgByte.load(tmp_path / "t.json")
    assert made.settings["records"] == 9 and made.settings["files"] == 18
    paths = find_recordings([recordings, tmp_path])
    good = [i for i in np.random.default_rng(0).permutation(18) if not paths[i].name.startswith("nan")][:9]
    letters = [EcgByte([]).to_symbols(Form(250, 400).read(paths[i])) for i in sorted(good)]
    assert made.merges == EcgByte.train(letters, 20).merges
    assert made.settings["unreadable"] == len((tmp_path / "t.unreadable.txt").read_text().splitlines()) > 0


def test_ctrl_c_while_learning_writes_what_there_is(tmp_path):
    """As from a terminal: SIGINT to the process."""
    rng = np.random.default_rng(0)
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", rng.normal(size=(12, 30000)).astype(np.float32))
    # A background job of a shell ignores SIGINT; a program in a terminal does not.
    heard = """
import runpy, signal, tqdm
signal.signal(signal.SIGINT, signal.default_int_handler)
class Bar(tqdm.tqdm):
    def update(self, n=1):
        print("update:", n, flush=True)  # of one recording read, or of all merges so far
tqdm.tqdm = Bar
"""
    module = "runpy.run_module('elm_jax.ecg_byte', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-uc", heard + module, "train", tmp_path, "--segment-len", "30000"]
    flags = ["--num-merges", "1000000", "--threads", "1", "--out", tmp_path / "t.json"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("update: ") and int(line.split()[-1]) > 1:
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    learnt = EcgByte.load(tmp_path / "t.json")
    assert f"merges: {len(learnt.merges)} of 1000000, interrupted" in out
    assert learnt.settings["interrupted_of"] == 1000000 and 0 < len(learnt.merges) < 1000000


# --- encode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["longest", "merges"])
def test_encode_prints_a_line_of_json_for_each_recording_in_the_form_of_training(recordings, tok, capsys, method):
    assert _run("encode", tok, recordings, "--method", method) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12
    made = EcgByte.load(tok)
    for line in lines:
        signal = to_segment(read_ecg(line["path"]), 250, 400)
        np.testing.assert_array_equal(made.encode(signal, method), line["ids"])
        back = made.decode(np.array(line["ids"]), line["shape"], line["low"], line["high"])
        np.testing.assert_allclose(np.sqrt(((back - signal) ** 2).mean()), line["rms_error"], rtol=1e-5)
        np.testing.assert_allclose(np.abs(back - signal).max(), line["max_error"], rtol=1e-5)
        assert line["max_error_of_range"] <= 0.5 / 26 + 1e-5
        assert (line["method"], line["symbols"], line["tokens"]) == (method, 4800, len(line["ids"]))
        np.testing.assert_allclose(line["compression"], 4800 / len(line["ids"]), rtol=1e-5)


def test_encode_into_a_file_and_in_another_form(recordings, tok, tmp_path):
    out = tmp_path / "new" / "ids.jsonl"
    flags = ("--leads", "II", "--segment-len", 100, "--out", out)
    assert _run("encode", tok, recordings / "part1/1.npy", recordings / "00002_hr", *flags) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["shape"] for line in lines] == [[1, 100]] * 2
    assert [Path(line["path"]).name for line in lines] == ["1.npy", "00002_hr"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sampling_rate": "250"}, "settings.sampling_rate: found '250'; expected a number"),
        ({"sampling_rate": None}, "settings.sampling_rate: found None"),
        ({"sampling_rate": True}, "settings.sampling_rate: found True"),
        ({"sampling_rate": -250.0}, "settings.sampling_rate: found -250.0"),
        ({"segment_len": 2500.5}, "settings.segment_len: found 2500.5; expected a whole number"),
        ({"segment_len": [400]}, "settings.segment_len: found [400]"),
        ({"leads": None}, "settings.leads: found None; expected a list (each text)"),
        ({"leads": "II"}, "settings.leads: found 'II'"),
        ({"leads": [["I"]]}, "settings.leads: found [['I']]; expected a list"),
        ({"leads": ["v1"]}, "settings.leads: found 'v1'"),
        ({"leads": ["I", "I"]}, "settings.leads: found ('I', 'I'); expected each item once"),
    ],
)
def test_a_setting_that_no_recording_has_is_refused_with_its_file(recordings, tmp_path, capsys, settings, says):
    EcgByte([], settings={"segment_len": 400, **settings}).save(tmp_path / "odd.json")
    for task in ("encode", "inspect"):
        assert _run(task, tmp_path / "odd.json", recordings, "--out", tmp_path / "out") == 2
        assert f"error: {tmp_path / 'odd.json'}: {says}" in capsys.readouterr().err
    told = {"sampling_rate": ("--sampling-rate", 250), "segment_len": ("--segment-len", 400), "leads": ("--leads", "I")}
    flags = [flag for name in settings for flag in told[name]]
    assert _run("encode", tmp_path / "odd.json", recordings / "part0", *flags) == 0, "a flag takes its place"


# --- inspect -----------------------------------------------------------------------------------------------


def test_inspect_leaves_pictures_and_a_summary(recordings, tok, tmp_path, capsys):
    assert _run("inspect", tok, recordings / "part0", "--pictures", 2, "--out", tmp_path / "p") == 0
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["001_0.png", "002_2.png", "lengths.png", "ranks.png", "summary.json"]
    for name in names[:-1]:
        with Image.open(tmp_path / "p" / name) as picture:
            page = np.asarray(picture.convert("RGB"), np.float64)
        assert min(page.shape[:2]) > 300 and page.std() > 5, f"{name} is empty"
    summary = json.loads((tmp_path / "p" / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out) == summary
    made = EcgByte.load(tok)
    assert summary["vocabulary"] == 256 + 60 and summary["merges"] == 60
    assert summary["merge_lengths"]["max"] == max(map(len, made.merges))
    signals = [to_segment(read_ecg(path), 250, 400) for path in sorted((recordings / "part0").glob("*.npy"))]
    ids = [made.encode(signal) for signal in signals]
    assert summary["used_ids"] == len(np.unique(np.concatenate(ids)))
    assert summary["tokens"]["longest"] == sum(map(len, ids))
    assert summary["tokens"]["merges"] == sum(len(made.encode(signal, "merges")) for signal in signals)
    assert summary["recordings"] == 5 and 0 < summary["max_error_of_range"] < 0.02


def test_a_tokenizer_alone_can_be_inspected(tok, tmp_path):
    assert _run("inspect", tok, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png", "summary.json"]


def test_odd_recordings_and_tokenizers_have_pictures_too(tmp_path):
    EcgByte([]).save(tmp_path / "empty.json")
    EcgByte([b"a" * 30]).save(tmp_path / "long.json")  # its merge has no order, and reaches over three leads
    np.save(tmp_path / "flat.npy", np.zeros((12, 10)))
    for name, length in (("empty", 1), ("long", 10)):
        flags = ("--segment-len", length, "--out", tmp_path / name)
        assert _run("inspect", tmp_path / f"{name}.json", tmp_path / "flat.npy", *flags) == 0
        assert (tmp_path / name / "001_flat.png").stat().st_size > 1000
    summary = json.loads((tmp_path / "long" / "summary.json").read_text())
    assert summary["tokens"] == {"longest": 4} and summary["max_error"] == 0


@pytest.mark.parametrize("name", ["costs $5 and $6", "open $", "\\\\frac{", "not utf-8: \udcff"])
def test_a_recording_may_have_any_name(tok, tmp_path, capsys, name):
    try:
        np.save(tmp_path / f"{name}.npy", np.ones((12, 500)))
    except (OSError, UnicodeEncodeError) as error:
        pytest.skip(f"no such name here: {error}")
    assert _run("inspect", tok, tmp_path, "--out", tmp_path / "p") == 0
    assert (tmp_path / "p" / f"001_{name}.png").stat().st_size > 1000
    np.save(tmp_path / f"{name}.npy", np.full((12, 500), np.nan))
    np.save(tmp_path / "good.npy", np.ones((12, 500)))
    flags = (*FORM, "--num-merges", 2, "--max-bad-records", 0.5, "--out", tmp_path / "t.json")
    assert _run("train", tmp_path, *flags) == 0
    assert len((tmp_path / "t.unreadable.txt").read_text(encoding="utf-8").splitlines()) == 1


# --- convert -----------------------------------------------------------------------------------------------


def test_convert_both_ways_and_says_what_is_lost(tok, tmp_path, capsys):
    assert _run("convert", tok, tmp_path / "t.pkl") == 0
    assert "60 merges (lost, as a .pkl has no settings: " in capsys.readouterr().out
    assert _run("convert", tmp_path / "t.pkl", tmp_path / "new" / "t.json") == 0
    assert "lost" not in capsys.readouterr().out
    ours, back = EcgByte.load(tok), EcgByte.load(tmp_path / "new" / "t.json")
    assert (back.merges, back.order, back.symbols) == (ours.merges, ours.order, ours.symbols)
    vocabulary, merges = pickle.loads((tmp_path / "t.pkl").read_bytes())
    assert len(vocabulary) == 316 and merges[0] == (list(ours.merges[0]), 256)


def test_the_reference_file_converts_and_encodes_alike(shared, recordings, tmp_path, capsys):
    theirs = shared / "real" / "ecg_byte" / "ecg_byte_tokenizer_10000.pkl"
    assert _run("convert", theirs, tmp_path / "t.json") == 0
    ids = []
    capsys.readouterr()
    for file in (theirs, tmp_path / "t.json"):
        assert _run("encode", file, recordings, "--segment-len", 500) == 0
        ids.append(capsys.readouterr().out)
    assert ids[0] == ids[1] and len(ids[0].splitlines()) == 12


# --- wrong input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "TASK"),
        (["learn"], "invalid choice: 'learn'"),
        (["train", "REC"], "--out"),
        (["train", "--out", "t.json"], "RECORDING"),
        (["train", "REC", "--out", "t.bin"], "t.bin: found a name that ends with '.bin'"),
        (["train", "REC", "--out", "file/t.json"], "file/t.json: found a place that cannot be written to"),
        (["train", "nowhere", "--out", "t.json"], "nowhere: found no such file or folder"),
        (["train", ".", "--out", "t.json"], "found no recording"),
        (["train", "REC", "--out", "t.json", "--num-merges", "0"], "--num-merges: found 0"),
        (["train", "REC", "--out", "t.json", "--num-merges", "many"], "invalid int value: 'many'"),
        (["train", "REC", "--out", "t.json", "--records", "0"], "--records: found 0"),
        (["train", "REC", "--out", "t.json", "--threads", "0"], "--threads: found 0"),
        (["train", "REC", "--out", "t.json", "--seed", "-1"], "--seed: found -1"),
        (["train", "REC", "--out", "t.json", "--sample", "best"], "invalid choice: 'best'"),
        (["train", "REC", "--out", "t.json", "--leads", "II,v7"], "--leads: found 'v7'"),
        (["train", "REC", "--out", "t.json", "--leads", ""], "--leads: found ''"),
        (["train", "REC", "--out", "t.json", "--sampling-rate", "nan"], "--sampling-rate: found nan"),
        (["train", "REC", "--out", "t.json", "--segment-len", "0"], "--segment-len: found 0"),
        (["train", "REC", "--out", "t.json", "--max-bad-records", "1"], "--max-bad-records: found 1"),
        (["train", "REC", "--out", "t.json"], "(1 of 12 recordings unreadable)"),
        (["train", "REC", "--out", "t.json", "--merges", "5"], "unrecognized arguments: --merges 5"),
        (["encode", "absent.json", "REC"], "absent.json"),
        (["encode", "TOK"], "RECORDING"),
        (["encode", "TOK", "REC", "--method", "merge"], "invalid choice: 'merge'"),
        (["encode", "TOK", "REC", "--segment-len", "501"], "found 500 samples"),
        (["encode", "TOK", "REC", "--out", "file/x.jsonl"], "file/x.jsonl"),
        (["inspect", "TOK", "REC"], "--out"),
        (["inspect", "TOK", "REC", "--out", "p", "--pictures", "-1"], "--pictures: found -1"),
        (["inspect", "TOK", "REC", "--out", "file/p"], "file/p"),
        (["convert", "TOK"], "OUT"),
        (["convert", "TOK", "t.txt"], "t.txt: found a name that ends with '.txt'"),
        (["convert", "TOK", "file/t.json"], "file/t.json"),
        (["convert", "file", "t.json"], "file: found a file that ends with ''"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(recordings, tok, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file, and no folder")
    known = {"REC": str(recordings), "TOK": str(tok)}
    assert cli.guard(main, [str(known.get(argument, argument)) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error, error
    assert [path.name for path in Path().rglob("*") if path.suffix in (".json", ".pkl", ".jsonl")] == []


def test_stratified_sampling_without_scikit_learn_names_the_extra_at_once(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    flags = ("--sample", "stratified", *FORM, "--out", tmp_path / "t.json")
    assert _run("train", recordings, *flags) == 2
    captured = capsys.readouterr()
    assert "run pip install scikit-learn" in captured.err and captured.out == ""


def test_without_the_extension_training_says_so_at_once(recordings, tok, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "elm_jax._bpe", None)
    assert _run("train", recordings, *FORM, "--out", tmp_path / "t.json") == 2
    captured = capsys.readouterr()
    assert "elm_jax._bpe: found no usable compiled extension" in captured.err and captured.out == ""
    assert _run("convert", tok, tmp_path / "t.pkl") == 0, "files need no extension"


def test_help_explains_each_task_without_jax(capsys):
    for arguments in (["--help"], *([task, "--help"] for task in ("train", "encode", "inspect", "convert"))):
        with pytest.raises(SystemExit) as done:
            cli.guard(main, arguments)
        told = capsys.readouterr().out
        assert done.value.code == 0 and "--help" in told
        assert arguments[0] != "train" or "reads all" in told
    code = "import sys, elm_jax.ecg_byte; print([m for m in ('jax', 'matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr
