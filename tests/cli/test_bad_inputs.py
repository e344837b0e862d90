"""A hundred mistakes and attacks by hand, over all commands: status 2, one line that names the place, nothing written.

What other files of tests/cli, tests/export and tests/import_weights try already is not repeated here.
"""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import fake_config

from elm_jax import cli
from elm_jax.config import to_dict
from elm_jax.ecg.recording import LEADS
from elm_jax.symbols.coder import EcgByte

LENGTH = 80
TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "an ecg"}]
ANSWER = {"id": "q1", "answer": "yes", "truth": "yes", "patient": "1"}
MODEL = {"llm__name": "demo", "llm__scratch": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "max_len": 2048}}


class Malicious:
    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (Path("run-by-a-pickle"),)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that commands are given: sound ones, and damaged ones."""
    world = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    recordings(world, rng)
    tables(world)
    runs(world)
    tokenizers(world)
    (world / "empty.py").touch()
    (world / "null.py").write_bytes(b"def get_config():\n    return {}\n\x00")
    (world / "exit.py").write_text("import no_such_module_\N{CYRILLIC SMALL LETTER IE}")
    (world / "prompt.txt").write_bytes(b"be \xff short")
    (world / "weights.pt").write_bytes(pickle.dumps(Malicious()))
    (world / "weights.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (world / "header.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (world / "weights.zip").write_bytes(b"PK\x03\x04")
    (world / "adapter").mkdir()
    (world / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1e9}')
    (world / "llm").mkdir()
    (world / "llm/config.json").write_text('{"model_type": ["llama"]}')
    (world / "raw").mkdir()
    (world / "raw/ptbxl_database.csv").write_text("a,b\n1,2\n")
    return world


def recordings(world: Path, rng: np.random.Generator) -> None:
    (world / "ecgs").mkdir()
    signal = rng.standard_normal((12, LENGTH)).astype(np.float32)
    for name, array in {
        "ok": signal, "transposed": signal.T, "flat": signal[0], "none": signal[:, :0], "no_leads": signal[:0],
        "texts": np.array(["a", "b"]), "complex": signal.astype(np.complex64),
    }.items():  # fmt: skip
        np.save(world / f"ecgs/{name}.npy", array)
    objects = np.empty((), object)
    for name, value in {
        "malicious": Malicious(), "named": {"ecg": signal, "leads": ["I"] * 12}, "key": {"signal": signal},
        "rate": {"ecg": signal, "report": "", "target_sf": 1e9},
    }.items():  # fmt: skip
        objects[()] = value
        np.save(world / f"ecgs/{name}.npy", objects, allow_pickle=True)
    (world / "ecgs/empty.npy").touch()
    (world / "ecgs/huge.npy").write_bytes(header("(12, 99999999999)"))
    (world / "ecgs/half.hea").write_text("half 12 500 80\nhalf.dat 16 1000/mV\n")
    lines = "".join(f"../../secret.dat 16 1000/mV 12 0 0 0 0 {lead}\n" for lead in LEADS)
    (world / "ecgs/climbs.hea").write_text(f"climbs 12 500 80\n{lines}")
    for name, text in {
        "entity.xml": '<!DOCTYPE a [<!ENTITY b "c">]><AnnotatedECG/>', "other.xml": "<html/>", "empty.scp": "",
        "whole.csv": f"# fs: 500\n{','.join(LEADS)}\n" + "7,2,5,1,1,1,1,1,1,1,1,1\n" * 90, "cut.edf": "0".ljust(200),
        "packed.mat": "MATLAB 5.0 MAT-file".ljust(124) + "\0\1IM\x0f\0\0\0\xff\0\0\0", "names.csv": "a,b\n1,2\n",
    }.items():  # fmt: skip
        (world / "ecgs" / name).write_text(text, encoding="latin-1")
    (world / "bad").mkdir()
    (world / "bad/only.npy").write_bytes(b"\x93NUMPY")
    (world / "list.txt").write_text("ecgs/ok.npy\necgs/absent.npy\n")
    (world / "folder").mkdir()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def tables(world: Path) -> None:
    sound = {"ecg_path": "ecgs/ok.npy", "text": TURNS, "name": "x", "patient_id": "1", "split": "train"}
    for name, changed in {
        "ok": {}, "absolute": {"ecg_path": "/etc/passwd"}, "climbs": {"ecg_path": "../elsewhere.npy"},
        "number": {"ecg_path": 7}, "silent": {"text": TURNS[:1]}, "null": {"text": None}, "empty_text": {"text": []},
        "surrogate": {"text": "\ud800"}, "control": {"ecg_path": "a\x1b[31m\x00.npy"}, "split": {"split": "trian"},
    }.items():  # fmt: skip
        (world / f"{name}.jsonl").write_text(json.dumps(sound | changed) + "\n")
    (world / "broken.jsonl").write_text(json.dumps(sound) + '\n{"ecg_path": \n')
    (world / "deep.jsonl").write_text('{"ecg_path": "a", "text": ' + "[" * 5000 + "]" * 5000 + "}\n")
    (world / "columns.jsonl").write_text('{"ecg": "a.npy", "texte": "un ecg"}\n')
    (world / "object.json").write_text('{"ecg_path": "a"}')
    (world / "nothing.jsonl").write_text("\n")
    (world / "fake.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    (world / "latin.jsonl").write_bytes('{"ecg_path": "ä"}'.encode("latin-1"))


def runs(world: Path) -> None:
    tree = to_dict(fake_config(**MODEL, encoder__config={"resnet_type": "resnet", "width": 4}))
    for name, changed in {
        "run": {}, "later": {"quantum": {"bits": 3}}, "typed": {"seed": "many"}, "section": {"data": 7},
        "other_elm": {"elm": "telepathy"},
    }.items():  # fmt: skip
        write(world / name / "config.json", json.dumps(tree | changed))
    write(world / "cut/config.json", json.dumps(tree)[:100])
    write(world / "list/config.json", "[]")
    write(world / "done/config.json", json.dumps(tree))
    write(world / "done/DONE", "yes")
    for name, lines in {
        "a": [ANSWER], "b": [ANSWER], "untrue": [ANSWER | {"truth": "no"}], "others": [ANSWER | {"id": "q2"}],
        "lacking": [{"id": "q1"}], "numbers": [ANSWER | {"answer": 3}], "listed": [ANSWER | {"answers": [[]]}],
        "none": [],
    }.items():  # fmt: skip
        write(world / f"compared/{name}/config.json", json.dumps(tree))
        write(world / f"compared/{name}/eval/demo/predictions.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        write(world / f"compared/{name}/eval/demo/metrics.json", "{}")
    write(world / "compared/broken/config.json", json.dumps(tree))
    line = json.dumps(ANSWER)
    write(world / "compared/broken/eval/demo/predictions.jsonl", f"{line}\nno json\n{line}\n")


def tokenizers(world: Path) -> None:
    EcgByte([b"aa", b"ab"], settings={"segment_len": LENGTH}).save(world / "tok.json")
    content = json.loads((world / "tok.json").read_text())
    (world / "edited.json").write_text(json.dumps(content | {"merges": ["zz", "ab"]}))
    (world / "malicious.pkl").write_bytes(pickle.dumps(Malicious()))
    (world / "list.pkl").write_bytes(pickle.dumps([1, 2]))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TRAIN = [
    "--config=configs/demo.py", "--config.workdir=out", "--config.data.root=.", "--config.data.names=ok.jsonl",
    f"--config.data.segment_len={LENGTH}", "--config.data.val_fraction=0", "--config.data.max_len=64",
    '--config.llm.scratch={"hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "max_len": 64}', "--config.train.steps=1",
    '--config.encoder.config={"resnet_type": "resnet18", "width": 2}', "--config.train.batch_size=8",
    "--config.mesh.data=8",
    "--noconfig.log.progress", "--noconfig.eval.at_end",
]  # fmt: skip
# What is said of values that cannot be, before anything is read: flags, and texts of the line.
VALUES: list[tuple[str, str, str]] = [
    ("config.seed", "-1", "from 0 to 4294967295"),
    ("config.seed", "99999999999999999999", "from 0 to 4294967295"),
    ("config.seed", "0x10", "a whole number"),
    ("config.optim.lr", "nan", "optim.lr: found nan"),
    ("config.optim.lr", "inf", "optim.lr: found inf"),
    ("config.optim.lr", "1e400", "optim.lr: found inf"),
    ("config.optim.lr", "-1e-4", "above 0"),
    ("config.optim.lr", "1,5", "a number"),
    ("config.optim.lr", "", "a number"),
    ("config.train.steps", "0", "at least 1"),
    ("config.train.batch_size", "1e3", "a whole number"),
    ("config.train.batch_size", "9" * 5000, "train.batch_size: found '999"),
    ("config.data.leads", "II,II", "each item once"),
    ("config.data.leads", "12", "data.leads: found 12"),
    ("config.data.leads", "avl", "did you mean 'aVL'?"),
    ("config.data.pack", "ja", "true or false"),
    ("config.data.subset", "1.5", "at most 1"),
    ("config.mesh.data", "0", "-1 or at least 1"),
    ("config.elm", "\x1b[31mred\x07", r"\x1b[31mred\x07"),
    ("config.elm", "\u202egnp.exe", r"\u202e"),
    ("config.objective", "sfft", "objective"),
    ("config.llm.scratch", '{"layers": 1', "a dictionary"),
    ("config.llm.scratch", "[" * 3000, "a dictionary"),
    ("config.llm.compute_dtype", "float8", "bfloat16"),
    ("config.update", "connector,connector", "each item once"),
    ("config.\N{CYRILLIC SMALL LETTER ES}eed", "1", "did you mean '--config.seed'?"),
    ("config.data", '{"names": "x"}', "section"),
    ("config.__class__", "1", "config.__class__"),
    ("config..seed", "1", "seed"),
    ("config.data.names.0", "x", "config.data.names.0"),
]
MADE: list[tuple[str, list[str], str]] = [  # command, arguments, what the line says; W/ begins a path of the world
    *[("train", [*TRAIN, f"--{key}={value}"], says) for key, value, says in VALUES],
    # config files
    ("train", ["--config="], "--config"),
    ("train", ["--config=W/folder"], "no file"),
    ("train", ["--config=W/empty.py"], "no function get_config"),
    ("train", ["--config=W/null.py"], "null.py"),
    ("train", ["--config=W/exit.py"], "no_such_module_"),
    ("train", ["--config=W/ok.jsonl"], "ok.jsonl"),
    ("train", ["--config=configs/demo.py:large"], "configs/demo.py"),
    ("train", ["--register=W/folder", *TRAIN], "--register"),
    # keys that do not go together, or name what is not there
    ("train", [*TRAIN, "--config.llm.scratch.layers=-1"], "llm.scratch, layers"),
    ("train", [*TRAIN, "--config.llm.scratch.hiden=8"], "did you mean 'hidden'?"),
    ("train", [*TRAIN, "--config.llm.scratch.heads=3"], "llm.scratch"),
    ("train", [*TRAIN, "--config.encoder.config.widht=4"], "did you mean 'width'?"),
    ("train", [*TRAIN, "--config.encoder.config.width=0"], "encoder.config.width"),
    ("train", [*TRAIN, "--config.train.batch_size=None"], "train.batch_size"),
    ("train", [*TRAIN, "--config.data.weights=1,2"], "data.weights"),
    ("train", [*TRAIN, "--config.data.representation=symbolic"], "data.representation"),
    ("train", [*TRAIN, "--config.mesh.fsdp=3000000000"], "mesh"),
    ("train", [*TRAIN, "--config.log.profile_steps=9"], "log.profile_steps"),
    ("train", [*TRAIN, "--config.llm.lora.rank=4", "--config.llm.lora.targets=q_prj"], "q_prj"),
    ("train", [*TRAIN, "--config.llm.name=W/llm", "--config.llm.scratch=None"], "config.json: found model_type"),
    ("train", [*TRAIN, "--config.init_from=W/folder"], "config.init_from"),
    ("train", [*TRAIN, "--config.workdir=W/ok.jsonl"], "config.workdir"),
    ("train", [*TRAIN, "--config.workdir=W/cut"], "cut/config.json"),
    ("train", [*TRAIN, "--config.data.system_prompt=W/prompt.txt"], "prompt.txt"),
    # data
    ("train", [*TRAIN, "--config.data.root=W/absent"], "absent"),
    ("train", [*TRAIN, "--config.data.names="], "data.names"),
    ("train", [*TRAIN, "--config.data.names=absent.jsonl"], "absent.jsonl"),
    ("train", [*TRAIN, "--config.data.names=folder"], "folder"),
    *[
        ("train", [*TRAIN, f"--config.data.names={name}"], says)
        for name, says in {
            "nothing.jsonl": "no records", "broken.jsonl": "broken.jsonl, line 2", "deep.jsonl": "deep.jsonl, line 1",
            "columns.jsonl": "columns.jsonl", "object.json": "a list of records", "fake.parquet": "fake.parquet",
            "latin.jsonl": "latin.jsonl", "absolute.jsonl": "/etc/passwd", "climbs.jsonl": "../elsewhere.npy",
            "number.jsonl": "number.jsonl", "silent.jsonl": "without an answer", "null.jsonl": "null.jsonl:0",
            "empty_text.jsonl": "empty_text.jsonl:0", "surrogate.jsonl": "surrogate", "control.jsonl": r"\x1b[31m",
            "split.jsonl": "trian",
        }.items()
    ],
    # runs
    *[
        (command, ["--checkpoint", f"W/{run}", *rest], says)
        for command, rest in {
            "evaluate": [], "export": ["--out", "out"], "chat": [],
            "analyze": ["--ecg", "W/ecgs/ok.npy", "--out", "out"],
            "probe": ["--task", "demo", "--labels", "demo:train=4,val=4,test=4"],
        }.items()
        for run, says in {
            "absent": "--checkpoint", "ok.jsonl": "--checkpoint", "later": "later/config.json, quantum",
            "typed": "seed", "section": "section/config.json, data", "other_elm": "telepathy", "cut": "cut/config.json",
            "list": "list/config.json",
            "run": "checkpoint", "done": "checkpoint",
        }.items()
    ],
    ("evaluate", [], "no config file"),
    ("evaluate", ["--checkpoint", "W/run", "--split", "dev"], "'dev'"),
    ("evaluate", ["--checkpoint", "W/run", "--step", "seven"], "no checkpoint"),
    ("evaluate", ["--checkpoint", "W/run", "--config.eval.temperature=-1"], "eval.temperature"),
    ("evaluate", ["--checkpoint", "W/run", "--config.eval.top_p=0"], "eval.top_p"),
    ("evaluate", ["--checkpoint", "W/run", "--config.eval.controls=zeroes"], "did you mean 'zeros'?"),
    ("evaluate", ["--checkpoint", "W/run", "--config.eval.protocol=theirs"], "eval.protocol"),
    ("evaluate", ["--checkpoint", "W/run", "--config.elm=llava"], "elm"),
    ("evaluate", ["--checkpoint", "W/run", "extra"], "extra"),
    ("evaluate", ["--checkpoint=W/run", "--checkpoint"], "--checkpoint"),
    # compare
    ("compare", [], "W"),
    ("compare", ["W/compared/a"], "at least two"),
    ("compare", ["W/compared/a", "W/folder"], "without config.json"),
    ("compare", ["W/compared/a", "W/run"], "one evaluation that all runs have"),
    ("compare", ["W/compared/a", "W/compared/b", "--eval", "dmo"], "did you mean 'demo'?"),
    ("compare", ["W/compared/a", "W/compared/b", "--protocol", "mine"], "'mine'"),
    ("compare", ["W/compared/a", "W/compared/b", "--wordnet", "W/folder"], "wordnet"),
    ("compare", ["W/compared/a", "W/compared/b", "--out", "W/ok.jsonl"], "--out"),
    ("compare", ["W/compared/a", "W/compared/untrue"], "other true answers to q1"),
    ("compare", ["W/compared/a", "W/compared/others"], "no question that all runs answered"),
    ("compare", ["W/compared/a", "W/compared/lacking"], "predictions.jsonl, line 1: found no text as answer"),
    ("compare", ["W/compared/a", "W/compared/numbers"], "predictions.jsonl, line 1"),
    ("compare", ["W/compared/a", "W/compared/listed"], "predictions.jsonl, line 1"),
    ("compare", ["W/compared/a", "W/compared/none"], "no answer"),
    ("compare", ["W/compared/a", "W/compared/broken"], "predictions.jsonl, line 2"),
    # probe
    ("probe", ["--task", "demo"], "--checkpoint"),
    ("probe", ["--checkpoint", "W/run", "--task", "dmo"], "did you mean 'demo'?"),
    ("probe", ["--checkpoint", "W/run", "--task", "demo", "--labels", "demo:tain=4"], "did you mean 'train'?"),
    ("probe", ["--checkpoint", "W/run", "--labels", "W/ok.jsonl"], ".csv, .parquet"),
    ("probe", ["--checkpoint", "W/run", "--task", "ptbxl_super", "--labels", "W/folder"], "scp_statements.csv"),
    ("probe", ["--checkpoint", "W/run", "--task", "csn", "--labels", "W/folder"], "0 recordings"),
    ("probe", ["--checkpoint", "W/run", "--task", "demo", "--fractions", "200"], "--fractions"),
    ("probe", ["--checkpoint", "W/run", "--task", "demo", "--prompts", "W/absent.json"], "absent.json"),
    # analyze, chat
    ("analyze", ["--checkpoint", "W/run"], "--ecg"),
    ("analyze", ["--checkpoint", "W/run", "--ecg", "W/ecgs/ok.npy", "--out", "W/ok.jsonl"], "--out"),
    *[
        ("chat", ["--checkpoint", "W/run", "--ecg", f"W/ecgs/{name}"], says)
        for name, says in {
            "empty.npy": "no numpy header", "flat.npy": "shape (80,)", "none.npy": "none.npy", "texts.npy": "dtype",
            "complex.npy": "complex.npy", "key.npy": "the key ecg", "rate.npy": "sampling rate",
            "malicious.npy": "it names pathlib.Path.touch",
            "huge.npy": "truncated", "half.hea": "lines after the first", "climbs.hea": "climbs.hea", "": "ecgs",
            "absent": "no file", "\x1b[2Jx.npy": r"\x1b[2Jx.npy", "entity.xml": "definitions of its own",
            "other.xml": "begins with html", "empty.scp": "SCP-ECG", "whole.csv": "whole numbers without a unit",
            "cut.edf": "EDF", "packed.mat": "255 bytes of which there are 0", "names.csv": "no lead I",
        }.items()
    ],
    # pairs
    ("pairs", ["--checkpoint", "W/run"], "--out"),
    ("pairs", ["--checkpoint", "W/absent", "--out", "out/pairs.jsonl"], "--checkpoint"),
    ("pairs", ["--checkpoint", "W/run", "--out", "out/pairs.txt"], ".jsonl"),
    ("pairs", ["--checkpoint", "W/run", "--out", "out/pairs.jsonl", "--judge", "W/folder"], "without config.json"),
    ("pairs", ["--checkpoint", "W/run", "--out", "out/pairs.jsonl", "--config.rl.rewards=formt"], "'format'"),
    ("pairs", ["--checkpoint", "W/run", "--out", "out/pairs.jsonl", "--config.rl.answers=1"], "at least 2"),
    ("chat", ["--checkpoint", "W/run", "--sampling-rate", "0"], "--sampling-rate"),
    ("chat", ["--checkpoint", "W/run", "--sampling-rate", "fast"], "--sampling-rate"),
    ("chat", ["--checkpoint", "W/run", "--ecg", "demo:test:-1"], "demo:"),
    # export, import_weights
    ("export", ["--checkpoint", "W/run"], "--out"),
    ("export", ["--checkpoint", "W/run", "--out", "out", "--max_shard_size", "-5GB"], "--max_shard_size"),
    ("export", ["--checkpoint", "W/run", "--out", "out", "--max_shard_size", "nanGB"], "--max_shard_size"),
    ("export", ["--checkpoint", "W/run", "--out", "out", "--push_to_hub", "../me/x"], "--push_to_hub"),
    *[
        ("import_weights", [f"W/{name}", "--out", "out", "--config=configs/demo.py"], says)
        for name, says in {
            "absent.pt": "absent.pt", "weights.pt": "weights.pt", "weights.safetensors": "weights.safetensors",
            "header.safetensors": "no JSON object", "weights.zip": "'.zip'", "folder": "folder",
            "adapter": "adapter_model.safetensors",
        }.items()
    ],
    ("import_weights", ["W/weights.safetensors"], "--out"),
    # prepare
    ("prepare", ["ptb_xl", "--raw", "W/ok.jsonl", "--out", "out"], "ok.jsonl"),
    ("prepare", ["ptb_xl", "--raw", "W/raw", "--out", "out"], "ptbxl_database.csv"),
    ("prepare", ["ptb_xl", "--raw", "W/raw", "--out", "out", "--segment-len", "99999999999"], "--segment-len"),
    ("prepare", ["ptb_xl", "--raw", "W/raw", "--out", "out", "--segment-len", "10s"], "--segment-len"),
    ("prepare", ["ptb_xl", "--raw", "W/raw", "--out", "out", "--sampling-rate", "1e9"], "--sampling-rate"),
    ("prepare", ["ptb_xl", "--raw", "W/raw", "--out", "out", "--compat", "splines"], "compat"),
    ("prepare", ["ecg_qa", "--raw", "W/raw", "--out", "out", "--split", "random"], "'random'"),
    ("prepare", ["ecg_qa", "--raw", "W/absent", "--out", "out"], "no segments of PTB-XL or MIMIC-IV-ECG"),
    ("prepare", ["ptb-xl", "--raw", "W/raw", "--out", "out"], "ptb-xl"),
    # ecg_byte
    ("ecg_byte", [], "TASK"),
    ("ecg_byte", ["trian"], "'trian'"),
    ("ecg_byte", ["train", "W/folder", "--out", "t.json"], "folder"),
    ("ecg_byte", ["train", "W/absent", "--out", "t.json"], "absent"),
    ("ecg_byte", ["train", "W/list.txt", "--out", "t.json"], "absent.npy"),
    ("ecg_byte", ["train", "W/ecgs/ok.npy", "--out", "W/folder"], "folder"),
    ("ecg_byte", ["train", "W/ecgs/ok.npy", "--out", "t.json", "--num-merges", "1e6"], "--num-merges"),
    ("ecg_byte", ["train", "W/ecgs/ok.npy", "--out", "t.json", "--threads", "0"], "--threads"),
    ("ecg_byte", ["encode", "W/edited.json", "W/ecgs/ok.npy"], "checksum"),
    ("ecg_byte", ["encode", "W/malicious.pkl", "W/ecgs/ok.npy"], "malicious.pkl"),
    ("ecg_byte", ["encode", "W/folder", "W/ecgs/ok.npy"], "folder"),
    ("ecg_byte", ["encode", "W/tok.json", "W/ecgs/no_leads.npy"], "no_leads.npy"),
    ("ecg_byte", ["encode", "W/tok.json", "W/ecgs/ok.npy", "--leads", "I;II"], "--leads"),
    ("ecg_byte", ["inspect", "W/list.pkl", "W/ecgs/ok.npy", "--out", "out"], "list.pkl"),
    ("ecg_byte", ["inspect", "W/tok.json", "W/ecgs/ok.npy", "--out", "W/tok.json"], "tok.json"),
    ("ecg_byte", ["convert", "W/absent.pkl", "t.json"], "absent.pkl"),
    ("ecg_byte", ["convert", "W/edited.json", "t.pkl"], "edited.json"),
    # plan, doctor
    *[
        ("plan", ["--config=configs/demo.py", f"--topology={name}"], "topology")
        for name in ("", "h100:0x8", "cpu:-1", "cpu:eight", "v5p:2x2", "tpu:4", "h100:99999999999x8", "cpu:1e3")
    ],
    ("plan", ["--topology=cpu:8"], "no config file"),
    ("plan", ["--config=configs/demo.py", "--topology=cpu:8", "--rows=\N{ARABIC-INDIC DIGIT THREE}x"], "--rows"),
    ("plan", ["--config=configs/demo.py", "--topology=cpu:8", "--signals=-1"], "--signals"),
    ("plan", ["--config=configs/demo.py", "--topology=cpu:8", "--json=W/folder/none/p.json"], "no folder"),
    ("doctor", ["--json"], "--json"),
    ("doctor", ["--josn=x"], "--josn"),
    ("doctor", ["everything"], "everything"),
    ("doctor", ["--json", "W/folder"], "a folder"),
    ("plan", ["--config=configs/demo.py", "--topology=cpu:8", "--json=W/folder"], "found a folder"),
    ("export", ["--checkpoint", "W/run", "--out", "out", ""], "unrecognized arguments"),
]  # fmt: skip


def named(case: Any) -> str:
    return case if isinstance(case, str) and case.isidentifier() else ""


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
        for path in folder.rglob("*")
    }


# A run's folder may be there, with what it was to be; and a list of recordings that could not be read.
BEGUN = ("out", "t.unreadable.txt")
DONE = ("checkpoints", "DONE", "eval")


@pytest.fixture
def here(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run a command in; no result may be left in it, and nothing changed in the world."""
    monkeypatch.setenv("ELM_JAX_CACHE", str(tmp_path / "cache"))
    folder, before = tmp_path / "here", tree(world)
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    left = [Path(path).parts for path in tree(folder)]
    assert all(parts[0] in BEGUN and not set(parts) & set(DONE) for parts in left) and tree(world) == before


@pytest.mark.parametrize(("command", "arguments", "says"), MADE, ids=named)
def test_a_bad_input_is_one_line_and_leaves_nothing(
    command: str, arguments: list[str], says: str, here: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument.replace("W/", f"{world}/") for argument in arguments]
    argv = [f"--config.data.root={world}" if argument == "--config.data.root=." else argument for argument in argv]
    main = importlib.import_module(f"elm_jax.{command}").main
    if command == "train":
        with pytest.raises(SystemExit) as stop:
            cli.run(main, argv)
        status = stop.value.code
    else:
        try:
            status = cli.guard(main, argv)
        except SystemExit as stopped:
            status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert says in err and err.rstrip("\n").isprintable(), err


def test_there_are_enough() -> None:
    assert len(MADE) >= 100 and {command for command, *_ in MADE} == {
        "train", "evaluate", "compare", "analyze", "chat", "export", "import_weights", "prepare", "ecg_byte", "plan",
        "doctor", "pairs", "probe",
    }  # fmt: skip
